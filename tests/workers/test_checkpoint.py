"""What a checkpoint brings back, part by part. Checkpoints of several ranks: ``test_two_ranks``."""

from pathlib import Path

import pytest
import torch
from tiny_workers import draw_rows, load_plain, rollouts, with_loss_inputs, worker_config
from transformers import AutoTokenizer

from verl.protocol import DataProto
from verl.workers.config import CheckpointConfig, OptimizerConfig
from verl.workers.fsdp.weight_export import named_weights
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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
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
