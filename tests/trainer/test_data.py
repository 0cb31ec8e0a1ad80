"""The loader's position: the same prompts with the same think switches, however often a run stops in between."""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from contextlib import suppress
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.config import DataConfig
from verl.trainer.data import build_datasets, build_train_loader, build_val_loader
from verl.utils.tokenizer import hf_tokenizer

ROWS, BATCH, EPOCHS = 22, 4, 3
STEPS = ROWS // BATCH * EPOCHS


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of chats, the last without an answer."""
    folder = tmp_path_factory.mktemp("data")
    chats = [[{"role": "user", "content": f"q{row}"}, {"role": "assistant", "content": "a"}] for row in range(ROWS)]
    chats.append(chats[0][:1])
    pq.write_table(pa.table({"messages": [json.dumps(chat) for chat in chats]}), folder / "train.parquet")
    return folder


def config_of(data, workers, **settings):
    return DataConfig(
        train_files=str(data / "train.parquet"),
        cache_dir=str(data / "cache"),
        train_batch_size=BATCH,
        dataloader_num_workers=workers,
        enable_think=True,
        **settings,
    )


def loader_of(config, data, tiny_tokenizers):
    dataset, _ = build_datasets(config, hf_tokenizer(tiny_tokenizers[1]), dropped_rows_folder=data / "run")
    return dataset, build_train_loader(dataset, config)


def test_a_signal_to_the_process_group_does_not_reach_the_loaders_processes(data, tiny_tokenizers):
    """They are in groups of their own, which terminals and schedulers do not send it to; the driver still ends them."""
    dataset, loader = loader_of(config_of(data, 1), data, tiny_tokenizers)
    dataset.set_epoch(0)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the driver's, which they would inherit
    try:
        batches = iter(loader)
        next(batches)
        [child] = multiprocessing.active_children()
        assert os.getpgid(child.pid) == child.pid
        with suppress(RuntimeError):  # torch tells the process that waits for a batch, whenever it hears of it first
            child.terminate()
            child.join(10)
        child.join(10)
        assert child.exitcode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
        del batches, loader
        gc.collect()  # else torch goes on to look after a process that is gone


def test_ctrl_c_does_not_reach_the_loaders_processes(data, tiny_tokenizers):
    dataset, loader = loader_of(config_of(data, 1), data, tiny_tokenizers)
    dataset.set_epoch(0)
    batches = iter(loader)
    next(batches)
    children = multiprocessing.active_children()
    assert children
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    assert len(list(batches)) == ROWS // BATCH - 1


def test_batches_hold_sources_in_their_shares(tmp_path, tiny_tokenizers):
    sources = ["general"] * 40 + ["rec_next"] * 5
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    table = pa.table({"messages": [json.dumps(chat)] * len(sources), "source": sources})
    pq.write_table(table, tmp_path / "train.parquet")
    dataset, loader = loader_of(
        config_of(tmp_path, 0, source_weights={"rec_*": 0.25, "*": 0.75}), tmp_path, tiny_tokenizers
    )
    dataset.set_epoch(0)
    batches = [list(batch["source"]) for batch in loader]
    assert len(batches) == 11 and all(batch.count("rec_next") == 1 for batch in batches)


def prompts(batch):
    return [messages[-1]["content"] for messages in batch["raw_prompt"]]


def train(loader_and_dataset, state, steps):
    """Steps as the trainer takes them, from a saved state or the beginning; returns the batches and the new state."""
    dataset, loader = loader_and_dataset
    step, epoch = 0, 0
    if state is not None:
        loader.load_state_dict(state["loader"])
        step, epoch = state["step"], state["epoch"]
    seen = []
    while step < steps:
        dataset.set_epoch(epoch)
        for batch in loader:
            seen.append(prompts(batch))
            step += 1
            if step >= steps:
                return seen, {"loader": loader.state_dict(), "step": step, "epoch": epoch}
        epoch += 1
    return seen, {"loader": loader.state_dict(), "step": step, "epoch": epoch}


@pytest.fixture(scope="module")
def whole_run(data, tiny_tokenizers):
    """All batches of a run without a stop and without loader processes."""
    return train(loader_of(config_of(data, 0), data, tiny_tokenizers), None, STEPS)[0]


def test_every_epoch_has_its_own_order_and_switches(whole_run):
    per_epoch = ROWS // BATCH
    epochs = [[*chain(*whole_run[start : start + per_epoch])] for start in range(0, STEPS, per_epoch)]
    assert len(epochs) == EPOCHS
    rows = [[prompt.partition(" ")[0] for prompt in epoch] for epoch in epochs]
    assert all(len(set(numbers)) == len(numbers) == 20 for numbers in rows)
    assert rows[0] != rows[1] != rows[2] != rows[0]
    switches = [dict(prompt.partition(" ")[::2] for prompt in epoch) for epoch in epochs]
    assert any(switches[1].get(row, switch) != switch for row, switch in switches[0].items())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_order_does_not_depend_on_the_worker_count(data, tiny_tokenizers, whole_run, workers):
    assert train(loader_of(config_of(data, workers), data, tiny_tokenizers), None, STEPS)[0] == whole_run


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stops", [(2,), (5,), (7, 10), (1, 2, 3)], ids=str)
def test_a_resumed_run_goes_on_where_it_stopped(data, tiny_tokenizers, whole_run, stops, workers):
    # Five steps are an epoch: stops in the middle of one, at its last step, across two, and one after the other.
    seen, state = [], None
    for stop in (*stops, STEPS):
        batches, state = train(loader_of(config_of(data, workers), data, tiny_tokenizers), state, stop)
        seen += batches
    assert seen == whole_run


def test_another_seed_is_another_order(data, tiny_tokenizers, whole_run):
    assert train(loader_of(config_of(data, 0, seed=2), data, tiny_tokenizers), None, STEPS)[0] != whole_run


def test_without_shuffling_rows_come_as_they_lie(data, tiny_tokenizers):
    seen, _ = train(loader_of(config_of(data, 0, shuffle=False), data, tiny_tokenizers), None, 2)
    assert [prompt.partition(" ")[0] for batch in seen for prompt in batch] == [f"q{row}" for row in range(8)]


def test_too_few_prompts_for_a_batch(data, tiny_tokenizers):
    config = config_of(data, 0)
    config.train_batch_size = ROWS + 1
    with pytest.raises(ValueError, match=r"data\.train_batch_size=23 is more than the 22 usable prompts"):
        loader_of(config, data, tiny_tokenizers)


def test_dropped_rows_of_both_parts_are_recorded_beside_the_run(data, tiny_tokenizers, tmp_path):
    config = config_of(data, 0, val_files=str(data / "train.parquet"), val_max_samples=3)
    train_set, val_set = build_datasets(config, hf_tokenizer(tiny_tokenizers[1]), dropped_rows_folder=tmp_path)
    (line,) = (tmp_path / "dropped_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "no_assistant_turn"
    assert (tmp_path / "dropped_rows_val.jsonl").read_text() == ""
    assert (len(train_set), len(val_set)) == (ROWS, 3)
    (batch,) = build_val_loader(val_set, config)
    assert [prompt.partition(" ")[0] for prompt in prompts(batch)] == ["q0", "q1", "q2"]


def test_loader_processes_tokenize_beside_the_tokenizers_threads(data, tiny_tokenizers, repo):
    # In a process of its own, forked once the tokenizer has used its threads: a deadlock must not take this one along.
    script = f"""
from verl.config import DataConfig
from verl.trainer.data import build_datasets, build_train_loader
from verl.utils.tokenizer import hf_tokenizer
config = DataConfig(train_files={str(data / "train.parquet")!r}, cache_dir={str(data / "another cache")!r},
    train_batch_size={BATCH}, dataloader_num_workers=2, truncation="left", max_prompt_length=8)
dataset, _ = build_datasets(config, hf_tokenizer({str(tiny_tokenizers[1])!r}),
    dropped_rows_folder={str(data / "run")!r})
print(sum(len(ids) for batch in build_train_loader(dataset, config) for ids in batch["prompt_ids"]))
"""
    environment = {"PYTHONPATH": str(repo), "TOKENIZERS_PARALLELISM": "true", "HOME": str(data)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, env=environment, check=False
    )
    assert result.stdout.strip() == str(20 * 8), result.stderr
