"""The position in the data: the same prompts with the same think switches, however often a run stops in between."""

import gc
import json
import multiprocessing
import os
import signal
from contextlib import suppress
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from support.chat_files import chat, write_rows

from verl.config import DataConfig
from verl.trainer.data import PromptStream, build_datasets, build_val_loader
from verl.utils.tokenizer import hf_tokenizer

ROWS, BATCH, EPOCHS = 22, 4, 3
PER_EPOCH = ROWS // BATCH
STEPS = PER_EPOCH * EPOCHS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with chats in ``train.parquet``, the last without a turn."""
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.parquet", [*(chat(f"q{row}") for row in range(ROWS)), {"messages": "[]"}])
    return folder


@pytest.fixture
def stream(data: Path, tiny_tokenizers: Any) -> Any:
    """Builds the prompt stream of a run; the settings differ from those of a run with 0 loader processes."""

    def build(folder: Path = data, steered: bool = False, **settings: Any) -> PromptStream:
        config = config_of(folder, **settings)
        dataset, _ = build_datasets(config, hf_tokenizer(tiny_tokenizers[1]), dropped_rows_folder=folder / "run")
        return PromptStream(dataset, config, steered)

    return build


def config_of(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(
        train_files=str(folder / "train.parquet"),
        cache_dir=str(folder / "cache"),
        **{"train_batch_size": BATCH, "enable_think": True, "dataloader_num_workers": 0, **settings},
    )


def prompts(batch: dict[str, Any]) -> list[str]:
    return [messages[-1]["content"] for messages in batch["raw_prompt"]]


def take(stream: PromptStream, steps: int) -> list[list[str]]:
    return [prompts(batch) for batch in islice(stream.batches(), steps)]


@pytest.fixture
def whole_run(stream: Any) -> list[list[str]]:
    """All batches of a run without a stop."""
    return take(stream(), STEPS)


def test_every_epoch_has_its_own_order_and_switches(stream: Any, whole_run: Any) -> None:
    epochs = [[*chain(*whole_run[start : start + PER_EPOCH])] for start in range(0, STEPS, PER_EPOCH)]
    rows = [[prompt.partition(" ")[0] for prompt in epoch] for epoch in epochs]
    assert all(len(set(numbers)) == len(numbers) == 20 for numbers in rows)
    assert rows[0] != rows[1] != rows[2] != rows[0]
    switches = [dict(prompt.partition(" ")[::2] for prompt in epoch) for epoch in epochs]
    assert any(switches[1].get(row, switch) != switch for row, switch in switches[0].items())
    assert take(stream(seed=2), STEPS) != whole_run
    in_file_order = chain(*take(stream(shuffle=False), 2))
    assert [prompt.partition(" ")[0] for prompt in in_file_order] == [f"q{row}" for row in range(8)]


@pytest.mark.parametrize("workers", [(0, 0, 0, 0), (2, 2, 2, 2), (0, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("stops", [(), (5,), (7, 10), (1, 2, 3)], ids=str)
def test_a_resumed_run_takes_the_same_batches(
    stream: Any, whole_run: Any, stops: tuple[int, ...], workers: tuple[int, ...]
) -> None:
    # Five steps are an epoch: stops at its last step, across two, and one after the other.
    taken: list[list[str]] = []
    state: dict[str, Any] | None = None
    for stop, count in zip((*stops, STEPS), workers, strict=False):
        part = stream(dataloader_num_workers=count)
        if state is not None:
            part.load_state_dict(state)
        taken += take(part, stop - len(taken))
        state = part.state_dict()
    assert taken == whole_run


def test_batches_hold_sources_in_their_shares(tmp_path: Path, stream: Any) -> None:
    sources = ["general"] * 40 + ["rec_next"] * 5
    write_rows(tmp_path / "train.parquet", [chat("q", source=source) for source in sources])
    weighted = stream(tmp_path, source_weights={"rec_*": 0.25, "*": 0.75})
    assert weighted.batches_per_epoch == 11
    assert all(list(batch["source"]).count("rec_next") == 1 for batch in islice(weighted.batches(), 11))


def test_a_position_in_a_mixture_is_an_epoch_and_a_number_of_batches(tmp_path: Path, stream: Any) -> None:
    rows = [chat(f"q{number}", source=name) for number, name in enumerate(["a"] * 40 + ["b"] * 5)]
    write_rows(tmp_path / "train.parquet", rows)
    weights = {"source_weights": {"a": 0.75, "b": 0.25}}
    first, second, steered, other = (stream(tmp_path, steered=turn == 2, **weights) for turn in range(4))
    begin = take(first, 14)  # an epoch are 11
    state = first.state_dict()
    assert state.keys() == {"epoch", "batches", "data"}
    take(second, 5)
    for later in (second, steered):  # steering may begin at a resume
        later.load_state_dict(state)
    assert take(second, 9) == take(steered, 9) == take(first, 9)
    other.load_state_dict(state | {"other_files": True}, may_start_over=True)
    assert take(other, 14) == begin, "other files with as many prompts"


@pytest.mark.parametrize("stops", [(), (3,), (1, 11, 12)], ids=str)
@pytest.mark.parametrize("workers", [0, 2])
def test_shares_change_behind_a_batch_whatever_was_read_ahead(
    tmp_path: Path, stream: Any, workers: int, stops: tuple[int, ...]
) -> None:
    rows, changes = ["a"] * 40 + ["b"] * 5, {3: (0.5, 0.5), 9: (1.0, 0.0)}
    write_rows(tmp_path / "train.parquet", [chat(f"q{number}", source=name) for number, name in enumerate(rows)])
    settings = {"steered": True, "source_weights": {"a": 0.75, "b": 0.25}, "dataloader_num_workers": workers}
    taken, expected, state, reference = [], [], None, stream(tmp_path, **settings).mixture
    for first, end in pairwise((0, *stops, 20)):
        part = stream(tmp_path, **settings)
        part.load_state_dict(state or part.state_dict())
        for step, batch in zip(range(first + 1, end + 1), part.batches(), strict=False):
            taken += [int(prompt.partition(" ")[0][1:]) for prompt in prompts(batch)]
            expected += reference.take(BATCH)
            for mixture in (part.mixture, reference) if step in changes else ():
                mixture.state["a"]["share"], mixture.state["b"]["share"] = changes[step]
            state = part.state_dict()
    of_b = [number >= 40 for number in taken]
    assert [sum(of_b[start : start + BATCH]) for start in range(0, 80, BATCH)] == [1] * 3 + [2] * 6 + [0] * 11
    assert taken == expected and len({number for number in taken if number < 40}) == 40
    passes = [[number for number in taken if number >= 40][start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(one) == [*range(40, 45)] for one in passes) and passes[0] != passes[1] != passes[2]


def test_too_few_prompts_for_a_batch(stream: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.train_batch_size=23 is more than the 22 usable prompts"):
        stream(train_batch_size=ROWS + 1)


def test_dropped_rows_are_recorded(data: Path, tiny_tokenizers: Any, tmp_path: Path) -> None:
    config = config_of(data, val_files=str(data / "train.parquet"), val_max_samples=3)
    train_set, val_set = build_datasets(config, hf_tokenizer(tiny_tokenizers[1]), dropped_rows_folder=tmp_path)
    (line,) = (tmp_path / "dropped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "no_messages"
    assert (tmp_path / "dropped_rows_val.jsonl").read_text() == ""
    assert val_set is not None and (len(train_set), len(val_set)) == (ROWS, 3)
    (batch,) = build_val_loader(val_set, config)
    assert [prompt.partition(" ")[0] for prompt in prompts(batch)] == ["q0", "q1", "q2"]


# ------------------------------------------------------------------ processes of the loader


def test_signals_of_the_run_do_not_reach_the_loaders_processes(stream: Any) -> None:
    """They are in groups of their own, which terminals and schedulers do not send to; the driver still ends them."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the driver's handler, which they would inherit
    try:
        others = set(multiprocessing.active_children())  # of other tests in this process
        batches = stream(dataloader_num_workers=1).batches()
        next(batches)
        [child] = set(multiprocessing.active_children()) - others
        assert os.getpgid(child.pid) == child.pid
        os.kill(child.pid, signal.SIGINT)
        assert len([next(batches) for _ in range(PER_EPOCH - 1)]) == PER_EPOCH - 1
        with suppress(RuntimeError):  # torch tells the process that waits for a batch
            child.terminate()
            child.join(10)
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
        del batches
        gc.collect()  # else torch goes on to look after a process that is gone
