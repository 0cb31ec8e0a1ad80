"""From parquet files to batches of prompts.

In: ``DataConfig`` and a tokenizer. Out: data sets, and loaders whose position can be saved and restored.
Tokenises nothing itself: chat templates are applied by the data set (to count) and by the agent loops (to generate).
"""

import logging
import os
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.items import make_prompt_file
from verl.utils.dataset.onerec_dataset import create_rl_dataset, get_dataset_class
from verl.utils.dataset.parquet_files import expand_data_files
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn, group_by_weight, mixed_order

# torchdata calls what torch has deprecated; nothing a user of either could do about it.
warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)

logger = logging.getLogger(__name__)

TRAIN_DROPPED_ROWS = "dropped_rows.jsonl"
VAL_DROPPED_ROWS = "dropped_rows_val.jsonl"


def build_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    extend_vocab_start_token: int | None = None,
    extended_sources: Sequence[str] = (),
    dropped_rows_folder: str | Path,
    tool_schemas: list[dict[str, Any]] | None = None,
) -> tuple[RLHFDataset, RLHFDataset | None]:
    """Read the training prompts and, where ``data.val_files`` is set, the validation prompts.

    Prompts of ``data.synthetic_item_prompts`` are made and join the training prompts.

    Args:
        extended_sources: patterns of the sources whose prompts may hold extended tokens, whatever the settings say.
        dropped_rows_folder: receives ``dropped_rows.jsonl`` (training) and ``dropped_rows_val.jsonl``, a line per row
            left out.
        tool_schemas: OpenAI function schemas of the run's tools, which count towards a prompt's length.

    Raises:
        ValueError: files that cannot be read, or hold no usable prompt.
    """

    files: Any = config.train_files
    samples, synthetic = config.train_max_samples, config.synthetic_item_prompts
    if synthetic.count:
        prompt_column = config.prompt_key if get_dataset_class(files, config) is RLHFDataset else None
        made = make_prompt_file(config, tokenizer, prompt_column)
        # The made file comes first and whole; data.train_max_samples limits the user's own files.
        files, samples = [made, *expand_data_files(files)], samples if samples < 0 else synthetic.count + samples

    def build(files: Any, max_samples: int, dropped_rows: str) -> RLHFDataset:
        return create_rl_dataset(
            files,
            tokenizer,
            config,
            extend_vocab_start_token=extend_vocab_start_token,
            extended_sources=extended_sources,
            dropped_rows_path=Path(dropped_rows_folder) / dropped_rows,
            max_samples=max_samples,
            tool_schemas=tool_schemas,
        )

    train = build(files, samples, TRAIN_DROPPED_ROWS)
    return train, build(config.val_files, config.val_max_samples, VAL_DROPPED_ROWS) if config.val_files else None


class EpochSampler(Sampler[int]):
    """The places of a data set in an order drawn from the seed and the data set's epoch, and nothing else.

    With ``weights`` (``data.source_weights``) every stretch of it holds each group of sources in its share.

    So the position in the data is an epoch and a number of batches, whatever the number of loader processes. The order
    of a generator that runs on would depend on that: torchdata starts a sampler once more where it has processes.
    """

    def __init__(
        self, dataset: RLHFDataset, seed: int, shuffle: bool, weights: Mapping[str, float] | None = None
    ) -> None:
        self._dataset = dataset
        self._groups = group_by_weight(dataset.sources, weights) if weights else None
        self._seed = seed
        self._shuffle = shuffle

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[int]:
        # The seeds of neighbouring epochs have nothing in common: both numbers go through SeedSequence.
        random = np.random.default_rng([self._seed, self._dataset.epoch])
        if self._groups is not None:
            return iter(mixed_order(self._groups, random, self._shuffle))
        return iter(random.permutation(len(self)).tolist() if self._shuffle else range(len(self)))


class PromptStream:
    """Endless batches of ``data.train_batch_size`` training prompts, and the position in them.

    The order depends on ``data.seed`` and the epoch alone, whether or not a run stops in between.

    Raises:
        ValueError: fewer usable prompts than one batch.
    """

    def __init__(self, dataset: RLHFDataset, config: DataConfig) -> None:
        if len(dataset) < config.train_batch_size:
            raise ValueError(
                f"data.train_batch_size={config.train_batch_size} is more than the {len(dataset)} usable prompts of "
                f"data.train_files={config.train_files}; lower it, or see the data summary for dropped rows"
            )
        self._dataset, self._config = dataset, config
        self._loader = StatefulDataLoader(
            dataset,
            batch_size=config.train_batch_size,
            sampler=EpochSampler(dataset, config.seed, config.shuffle, config.source_weights),
            num_workers=config.dataloader_num_workers,
            worker_init_fn=detach_loader,
            drop_last=True,
            collate_fn=collate_fn,
        )
        self.epoch = 0
        """Complete passes over the data."""
        self.batches_per_epoch = len(self._loader)

    def batches(self) -> Iterator[dict[str, Any]]:
        """Batches of rows from the current position on; never ends."""
        while True:
            self._dataset.set_epoch(self.epoch)
            yield from self._loader
            self.epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch that was taken last."""
        return {"loader": self._loader.state_dict(), "epoch": self.epoch, **self._shape()}

    def _shape(self) -> dict[str, int]:
        """What a position belongs to: it means nothing for other data, and loader processes change its form."""
        config = self._config
        sizes = {"batch_size": config.train_batch_size, "num_workers": config.dataloader_num_workers}
        return {"prompts": len(self._dataset), **sizes}

    def load_state_dict(self, state: Mapping[str, Any], *, may_start_over: bool) -> None:
        """Continue from a saved position.

        Args:
            may_start_over: if the position belongs to other data, start over instead of raising.

        Raises:
            ValueError: the data, the batch size or the loader's processes are not those of the position.
        """
        was, now = (
            "{prompts} prompts in batches of {batch_size} by {num_workers} loader processes".format_map(shape)
            for shape in (state, self._shape())
        )
        if was == now:
            self._loader.load_state_dict(state["loader"])
            self.epoch = state["epoch"]
            return
        difference = f"the checkpoint was saved after training on {was}, and this run has {now}"
        if not may_start_over:
            raise ValueError(
                f"{difference}: its position would repeat some and leave out others; give the same data.* settings, or "
                "start the data over with trainer.resume_allow_changed=[data]"
            )
        logger.warning("%s: the training data start over", difference)


def build_val_loader(dataset: RLHFDataset, config: DataConfig) -> StatefulDataLoader:
    """All validation prompts in file order, the last batch as short as it comes."""
    return StatefulDataLoader(
        dataset,
        batch_size=config.val_batch_size or len(dataset),
        num_workers=config.dataloader_num_workers,
        worker_init_fn=detach_loader,
        drop_last=False,
        collate_fn=collate_fn,
    )


def detach_loader(_: int) -> None:
    """A signal to the run's process group is for the driver, which decides when the loader's processes end.

    They have inherited its handlers: SIGTERM of the driver ends them, as torch expects.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
