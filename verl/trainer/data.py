"""From parquet files to batches of rows.

In: ``DataConfig`` and a tokenizer. Out: data sets, and loaders whose position can be saved and restored.
Tokenises nothing itself: chat templates are applied by the data set (to count) and by the agent loops (to generate).
"""

import copy
import logging
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.onerec_dataset import create_rl_dataset
from verl.utils.dataset.parquet_files import expand_data_files, read_header
from verl.utils.dataset.rl_dataset import DropReport, RLHFDataset, collate_fn

logger = logging.getLogger(__name__)


def build_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dropped_rows_folder: str | Path,
    made: Path | None = None,
    **options: Any,
) -> tuple[RLHFDataset, RLHFDataset | None]:
    """Read the training prompts and, where ``data.val_files`` is set, the validation prompts.

    Args:
        dropped_rows_folder: receives ``dropped_rows.jsonl`` (training) and ``dropped_rows_val.jsonl``, a line per row
            left out.
        made: a file of training prompts that was made for this run; it comes first and whole, whatever
            ``data.train_max_samples`` is.
        options: of both data sets, as in ``RLHFDataset``: ``extend_vocab_start_token``, ``tool_schemas`` (OpenAI
            function schemas of the run's tools, which count towards a prompt's length) and ``extended_sources``
            (patterns of the sources whose prompts may hold extended tokens, whatever the settings say).

    Raises:
        ValueError: files that cannot be read, or hold no usable prompt.
    """
    build: Any = partial(create_rl_dataset, tokenizer=tokenizer, config=config, **options)
    files: Any = config.train_files
    samples, folder = config.train_max_samples, Path(dropped_rows_folder)
    own: dict[str, Any] = {}
    if made is not None:
        own["made_rows"] = read_header(made)[1]  # a class of the user's own need not take it otherwise
        files, samples = [made, *expand_data_files(files)], samples if samples < 0 else own["made_rows"] + samples
    train = build(files, max_samples=samples, dropped_rows_path=folder / "dropped_rows.jsonl", **own)
    if not config.val_files:
        return train, None
    val_path = folder / "dropped_rows_val.jsonl"
    return train, build(config.val_files, max_samples=config.val_max_samples, dropped_rows_path=val_path)


class PromptStream:
    """Endless batches of ``data.train_batch_size`` training prompts, and the position in them.

    The order is drawn from ``data.seed`` and the epoch, and nothing else, so a position is an epoch and a number of
    batches. With ``data.source_weights`` the order is that of a `Mixture`, and an epoch as many batches as without.

    Args:
        steered: whether ``mixture`` may change the shares of ``data.source_weights``; a position holds its state then.

    Raises:
        ValueError: fewer usable prompts than one batch.
    """

    def __init__(self, dataset: RLHFDataset, config: DataConfig, steered: bool = False) -> None:
        # The incomplete last batch of an epoch is left out: every step has the same number of rows.
        self.batches_per_epoch = len(dataset) // config.train_batch_size
        if self.batches_per_epoch == 0:
            raise ValueError(
                f"data.train_batch_size={config.train_batch_size} is more than the {len(dataset)} usable prompts of "
                f"data.train_files={config.train_files}; lower it, or see the data summary for dropped rows"
            )
        self._dataset, self._config, self._steered = dataset, config, steered
        weights, report = config.source_weights, getattr(dataset, "drop_report", None)  # a user's class may have none
        self.mixture = Mixture(config, group_by_weight(dataset.sources, weights, report)) if weights else None
        """Whose turn it is; None where sources have no shares."""
        self.epoch = 0
        """Epochs that are over."""
        self._taken = 0
        """Batches of this epoch."""

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches of rows from the current position on; never ends."""
        mixture = self.mixture
        while True:
            # Before the loader is made: its processes copy the data set when they start.
            self._dataset.set_epoch(self.epoch)
            shares = mixture and mixture.shares
            for rows in _loader(self._dataset, self._config, self._rest_of_epoch()):
                # Counted when it is handed out, not when it is loaded: loader processes read ahead of the steps.
                self._taken += 1
                if mixture is not None:
                    mixture.take(self._config.train_batch_size)
                yield rows
                if mixture is not None and mixture.shares != shares:  # what was read ahead has the old ones
                    break
            else:
                self.epoch, self._taken = self.epoch + 1, 0

    def _rest_of_epoch(self) -> Iterable[list[int]]:
        """Places of the rows of each batch that this epoch has left."""
        size, batches = self._config.train_batch_size, range(self._taken, self.batches_per_epoch)
        if self.mixture is not None:
            ahead = copy.deepcopy(self.mixture)
            return (ahead.take(size) for _ in batches)
        # The seeds of neighbouring epochs have nothing in common: both numbers go through SeedSequence.
        random, rows = np.random.default_rng([self._config.seed, self.epoch]), len(self._dataset)
        order = random.permutation(rows).tolist() if self._config.shuffle else list(range(rows))
        return [order[batch * size : (batch + 1) * size] for batch in batches]

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was taken last, and what it is a position in."""
        mixture = {"mixture": copy.deepcopy(self.mixture.state)} if self.mixture is not None and self._steered else {}
        return {"epoch": self.epoch, "batches": self._taken, "data": self._describe_data(), **mixture}

    def load_state_dict(self, state: Mapping[str, Any], may_start_over: bool = False) -> None:
        """Continue from a saved position.

        Args:
            state: with ``other_files`` it belongs to other data, whatever their rows add up to.
            may_start_over: where it belongs to other data, warn and start over.

        Raises:
            ValueError: it belongs to other data, where it would repeat some prompts and leave others out.
        """
        others = " of other files" if state.get("other_files") else ""
        difference = f"saved after {state['data']}, now {self._describe_data()}{others}"
        if state["data"] == self._describe_data() and not others:
            self.epoch, self._taken = state["epoch"], state["batches"]
            steered = state.get("mixture", {}) if self._steered else {}
            if self.mixture is not None and list(steered) == list(self.mixture.state):
                self.mixture.state = copy.deepcopy(steered)
            elif self.mixture is not None:
                self.mixture.move_to(self.epoch * self.batches_per_epoch + self._taken)
        elif may_start_over:
            logger.warning("the data start over: %s", difference)
        else:
            raise ValueError(
                f"the position in the training data is of other data: {difference}; give the same files, tools and "
                "data.* settings, or let the data start over with trainer.resume_allow_changed=[data]"
            )

    def _describe_data(self) -> str:
        return f"{len(self._dataset)} prompts in batches of {self._config.train_batch_size}"


class Mixture:
    """Places of rows without end, of groups in shares that may change between two batches.

    The next row is one of the group that is furthest behind its share, so that any stretch has the shares, to within a
    row or two. A group has an order of its own for each pass over it, drawn from ``data.seed``, the group's number and
    the pass's; so its position is how many rows it has given, and none of them comes again before all have come. Where
    one pass ends and the next begins, a batch may hold a row twice.

    Args:
        groups: share and places of each group of ``data.source_weights``.
    """

    def __init__(self, config: DataConfig, groups: list[tuple[float, np.ndarray]]) -> None:
        self._config, self._places = config, [places for _, places in groups]
        names = zip(config.source_weights, groups, strict=True)
        self.state = {name: {"share": share, "behind": 0.0, "given": 0} for name, (share, _) in names}
        """Of each group its share of a batch, how many rows it lags behind that, and how many it has given."""
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        """Of each group, by number, the pass it gave its last row in, and its order there."""

    @property
    def shares(self) -> dict[str, float]:
        """Share of each group in the batches to come."""
        return {name: of["share"] for name, of in self.state.items()}

    def move_to(self, batches: int) -> None:
        """Go to where so many batches have been given in the shares as they are."""
        for of in self.state.values():
            of["behind"], of["given"] = 0.0, 0
        for _ in range(batches):
            self.take(self._config.train_batch_size)

    def take(self, count: int) -> list[int]:
        """The next places."""
        return [self._next() for _ in range(count)]

    def _next(self) -> int:
        for of in self.state.values():
            of["behind"] += of["share"]
        group, chosen = max(enumerate(self.state.values()), key=lambda numbered: numbered[1]["behind"])
        places = self._places[group]
        number, place = divmod(int(chosen["given"]), len(places))
        chosen["behind"], chosen["given"] = chosen["behind"] - 1, chosen["given"] + 1
        if group not in self._orders or self._orders[group][0] != number:  # a position may be set to any pass
            random = np.random.default_rng([self._config.seed, group, number])
            self._orders[group] = number, random.permutation(places) if self._config.shuffle else places
        return int(self._orders[group][1][place])


def group_by_weight(
    sources: Sequence[str], weights: Mapping[str, float], report: DropReport | None = None
) -> list[tuple[float, np.ndarray]]:
    """Share and places of each group of rows: those whose source a pattern is the first to match.

    Args:
        weights: all above 0, which ``DataConfig`` sees to.
        report: of the data set, for an error's text.

    Raises:
        ValueError: a source that no pattern matches, or a pattern that matches none.
    """
    first = {source: next((p for p in weights if fnmatchcase(source, p)), None) for source in set(sources)}
    unmatched = sorted(source for source, pattern in first.items() if pattern is None)
    if unmatched:
        raise ValueError(
            f"data.source_weights={dict(weights)} matches no source {unmatched}; add them, or a pattern '*'"
        )
    if empty := [pattern for pattern in weights if pattern not in first.values()]:
        message = f"data.source_weights: no usable row has a source like {empty}; there are {sorted(first)}"
        raise ValueError(f"{message}{report.of_sources(empty) if report else ''}")
    chosen, total = np.array([first[source] for source in sources]), sum(weights.values())
    return [(weight / total, np.flatnonzero(chosen == pattern)) for pattern, weight in weights.items()]


def build_val_loader(dataset: RLHFDataset, config: DataConfig) -> DataLoader:
    """All validation prompts in file order, the last batch as short as it comes."""
    places, size = list(range(len(dataset))), config.val_batch_size or len(dataset)
    return _loader(dataset, config, [places[start : start + size] for start in range(0, len(dataset), size)])


def _loader(dataset: RLHFDataset, config: DataConfig, batches: Iterable[list[int]]) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=detach_loader,
        collate_fn=collate_fn,
        generator=torch.Generator(),  # for the loader's own seed, which would be drawn from the run's
    )


def detach_loader(_: int) -> None:
    """A signal to the run's process group is for the driver, which decides when the loader's processes end.

    They have inherited its handlers: SIGTERM of the driver ends them, as torch expects.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
