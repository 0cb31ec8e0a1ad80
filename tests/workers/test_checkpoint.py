"""What a checkpoint brings back, part by part. Checkpoints of several ranks: ``test_two_ranks``."""

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from support.file_faults import disk_full_text
from support.tiny_workers import draw_rows, load_plain, rollouts, with_loss_inputs, worker_config, write_model
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoTokenizer

from verl.config import CheckpointConfig, OptimizerConfig
from verl.model_merger import merge
from verl.protocol import DataProto
from verl.utils.durable_files import write_durably
from verl.utils.save_outcome import SaveOutcome
from verl.weight_sync.send import named_weights
from verl.workers.fsdp import checkpoint
from verl.workers.student_worker import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")


def student(folder: Path, **actor: object) -> StudentWorker:
    optim = OptimizerConfig(lr=1e-2, lr_scheduler_type="linear", total_training_steps=10)
    worker = StudentWorker(config=worker_config(folder, actor={"optim": optim, **actor}), device="cpu")
    worker.init_model()
    return worker


def weights(worker: StudentWorker) -> dict[str, torch.Tensor]:
    return {name: value.full_tensor().clone() for name, value in named_weights(worker._state.module).items()}


def some_batch() -> DataProto:
    return with_loss_inputs(rollouts(draw_rows(8, 200)))


def test_a_resumed_run_goes_on_exactly(student_model: Path, tmp_path: Path) -> None:
    first = student(student_model)
    first.update_actor(some_batch())
    first.compute_log_prob(some_batch())  # a pass without backward must leave no gathered parameters behind
    first.save_checkpoint(str(tmp_path), 1)
    drawn = torch.rand(3)
    first.update_actor(some_batch())

    second = student(student_model)
    second.compute_log_prob(some_batch())
    second.load_checkpoint(str(tmp_path))
    assert torch.equal(torch.rand(3), drawn)
    metrics = second.update_actor(some_batch()).meta_info["metrics"]
    assert metrics["actor/lr"] == pytest.approx(0.9e-2)
    right = weights(first)
    assert all(torch.equal(value, right[name]) for name, value in weights(second).items())


def test_the_huggingface_folder_is_a_model(student_model: Path, tmp_path: Path) -> None:
    worker = student(student_model)
    worker.update_actor(some_batch())
    worker.save_checkpoint(str(tmp_path), 1)
    exported = tmp_path / "huggingface"
    plain = load_plain(exported)
    right = weights(worker)
    assert all(torch.equal(value, right[name]) for name, value in plain.named_parameters())
    assert plain.config.tie_word_embeddings == load_plain(student_model).config.tie_word_embeddings
    assert "packed_sdpa" not in (exported / "config.json").read_text()
    assert len(AutoTokenizer.from_pretrained(exported)) == len(AutoTokenizer.from_pretrained(student_model))


def test_only_the_parts_asked_for_are_written_and_read(student_model: Path, tmp_path: Path) -> None:
    parts = CheckpointConfig(save_contents=["model"], load_contents=["model"])
    first = student(student_model, checkpoint=parts)
    first.update_actor(some_batch())
    first.save_checkpoint(str(tmp_path), 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huggingface", "shards"]
    assert not list(tmp_path.glob("huggingface/*.safetensors")), "what a merge needs beside the shards, and no weights"
    second = student(student_model, checkpoint=parts)
    second.load_checkpoint(str(tmp_path))
    right = weights(first)
    assert all(torch.equal(value, right[name]) for name, value in weights(second).items())
    assert second._state.schedule.steps == 0
    assert not any(state["exp_avg"].full_tensor().any() for state in second._state.optimizer.state.values())


@pytest.mark.parametrize(
    ("contents", "words"), [(["model"], "no whole shards"), (["extra"], "leave 'extra' out")], ids=["shards", "extra"]
)
def test_a_missing_part_is_an_error(student_model: Path, tmp_path: Path, contents: list[str], words: str) -> None:
    worker = student(student_model, checkpoint=CheckpointConfig(load_contents=contents))
    with pytest.raises(ValueError, match=words):
        worker.load_checkpoint(str(tmp_path))


def test_a_checkpoint_overwrites_an_older_one(student_model: Path, tmp_path: Path) -> None:
    worker = student(student_model)
    worker.save_checkpoint(str(tmp_path), 1)
    worker.update_actor(some_batch())
    worker.save_checkpoint(str(tmp_path), 1)
    again = student(student_model)
    again.load_checkpoint(str(tmp_path))
    right = weights(worker)
    assert all(torch.equal(value, right[name]) for name, value in weights(again).items())


def test_training_goes_on_while_a_checkpoint_is_written(
    student_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = student(student_model)
    worker.update_actor(some_batch())
    at_save = weights(worker)
    released = threading.Event()
    monkeypatch.setattr(checkpoint, "write_durably", lambda *file: (released.wait(30), write_durably(*file)))
    worker.begin_checkpoint(str(tmp_path), 1)
    assert worker.checkpoint_outcome(wait=False) == SaveOutcome(done=False)
    worker.update_actor(some_batch())
    released.set()
    outcome = worker.checkpoint_outcome(wait=True)
    assert outcome.done and not outcome.error and outcome.seconds > 0
    assert worker.checkpoint_outcome(wait=False) == SaveOutcome(done=True), "nothing is being written any more"

    again = student(student_model)
    again.load_checkpoint(str(tmp_path))
    assert all(torch.equal(value, at_save[name]) for name, value in weights(again).items())
    exported = dict(load_plain(tmp_path / "huggingface").named_parameters())
    assert all(torch.equal(value, at_save[name]) for name, value in exported.items())
    assert again._state.schedule.steps == 1


@pytest.mark.parametrize("limit", [2_000, 60_000], ids=["in what is not sharded", "in the shards"])
def test_a_full_disk_is_told_and_costs_only_the_checkpoint(student_model: Path, tmp_path: Path, limit: int) -> None:
    worker = student(student_model)
    before = weights(worker)
    with disk_full_text(limit):
        worker.begin_checkpoint(str(tmp_path / "full"), 1)
        outcome = worker.checkpoint_outcome(wait=True)
        assert outcome.done
        assert "File too large" in outcome.error and "\n" not in outcome.error.strip()
        with pytest.raises(OSError, match="is not whole"):
            worker.save_checkpoint(str(tmp_path / "full"), 1)
    assert all(torch.equal(value, before[name]) for name, value in weights(worker).items())
    worker.save_checkpoint(str(tmp_path / "whole"), 1)
    worker.load_checkpoint(str(tmp_path / "whole"))


def test_weights_alone_leave_no_shards(student_model: Path, tmp_path: Path) -> None:
    worker = student(student_model, checkpoint=CheckpointConfig(save_contents=["hf_model"]))
    worker.save_checkpoint(str(tmp_path), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["huggingface"]
    right = weights(worker)
    assert all(torch.equal(v, right[name]) for name, v in load_plain(tmp_path / "huggingface").named_parameters())


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(
    student_model: Path, tiny_tokenizers: tuple[Path, Path], tmp_path: Path
) -> None:
    student(student_model).save_checkpoint(str(tmp_path / "checkpoint"), 1)
    other = student(write_model(tmp_path / "model", tiny_tokenizers[1], tied=False, rows=700))
    with pytest.raises(ValueError, match="of another model") as refusal:
        other.load_checkpoint(str(tmp_path / "checkpoint"))
    lines = str(refusal.value).splitlines()
    assert "- model.lm_head.weight: nothing there, [700, 64] here" in lines
    assert any(line.startswith("- model.model.embed_tokens.weight: [") and "[700, 64] here" in line for line in lines)


def test_a_shard_that_lost_its_content_but_not_its_size_is_named(student_model: Path, tmp_path: Path) -> None:
    worker = student(student_model)
    worker.save_checkpoint(str(tmp_path / "checkpoint"), 1)
    [shard] = (tmp_path / "checkpoint" / "shards").glob("*.distcp")
    shard.write_bytes(b"\0" * shard.stat().st_size)
    with pytest.raises(ValueError, match=r"shards cannot be read \(Unpickling.* on rank 0: .*earlier checkpoint"):
        worker.load_checkpoint(str(tmp_path / "checkpoint"))
    with pytest.raises(ValueError, match="shards cannot be read"):
        merge(tmp_path / "checkpoint", tmp_path / "model")


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.folder),)

    def __init__(self, folder: Path) -> None:
        self.folder = folder


def test_a_checkpoint_of_a_stranger_runs_no_code(student_model: Path, tmp_path: Path) -> None:
    worker = student(student_model)
    worker.save_checkpoint(str(tmp_path), 1)
    (tmp_path / "shards" / ".metadata").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(ValueError, match=r"is no description of shards: it names posix\.mkdir"):
        worker.load_checkpoint(str(tmp_path))
    (tmp_path / "shards" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="is no description of shards"):
        worker.load_checkpoint(str(tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_what_torch_would_unpickle_beside_tensors_is_refused(student_model: Path, tmp_path: Path) -> None:
    """An entry of another kind in the place of a tensor: torch reads those without ``weights_only``."""
    worker = student(student_model)
    worker.save_checkpoint(str(tmp_path), 1)
    path = tmp_path / "shards" / ".metadata"
    description = pickle.loads(path.read_bytes())
    key = next(iter(description.state_dict_metadata))
    description.state_dict_metadata[key] = BytesStorageMetadata()
    path.write_bytes(pickle.dumps(description))
    with pytest.raises(ValueError, match="BytesStorageMetadata, which is not read"):
        worker.load_checkpoint(str(tmp_path))
