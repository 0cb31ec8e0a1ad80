"""A teacher that follows the student: after each optimizer step ``ema * average + (1 - ema) * student``, saved and
loaded with the student, on one rank and on two."""

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import Models, workers

from verl import model_merger
from verl.config import AlgoConfig, DistillConfig, OptimizerConfig, PPOConfig, TeacherConfig, TrainerConfig
from verl.config.algorithm import AdvantageEstimator
from verl.weight_sync import named_weights
from verl.workers.model_workers import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

Weights = dict[str, torch.Tensor]


def distill_of(objective: str = "exact", **emas: float | None) -> DistillConfig:
    teachers = {name: TeacherConfig(ema=ema, sources=[name]) for name, ema in emas.items()}
    return DistillConfig(objective, teachers=teachers)


def average_of(student: StudentWorker, name: str = "slow") -> Weights:
    """Whole weights of a teacher."""
    module = student.colocated_roles[name].model.module
    return {key: tiny.whole(weight.detach()) for key, weight in named_weights(module).items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("tied", [True, False])
def test_averages_are_those_of_the_formula(models: Models, tied: bool) -> None:
    """Of the weights after each step; a step that is skipped leaves them alone. 1 stays, 0 is the student."""
    config = models.config(models.student if tied else models.untied)
    student, batch = workers(config, distill_of("sampled", slow=0.75, stays=1.0, equal=0.0, again=0.75)), models.batch()
    start = average_of(student)
    assert same(start, tiny.weights_of(student))
    assert student.colocated_roles["again"].model is student.colocated_roles["slow"].model, "loaded once"
    expected = {name: value.clone() for name, value in start.items()}
    for _ in range(3):
        student.update_actor(batch)
        now = tiny.weights_of(student)
        expected = {name: 0.75 * value + 0.25 * now[name] for name, value in expected.items()}
        assert same(average_of(student, "stays"), start) and same(average_of(student, "equal"), now)
    torch.testing.assert_close(average_of(student), expected, rtol=0, atol=1e-6)
    assert not same(average_of(student), start)
    before, broken = average_of(student), models.batch()
    broken.tensor("advantages")[:] = math.nan
    assert student.update_actor(broken).meta_info["metrics"]["actor/skipped_updates"] == 1
    assert same(average_of(student), before)


def test_an_update_reads_the_average_as_it_is_at_that_step(models: Models) -> None:
    """Two optimizer steps in each update. 1 is the frozen student, bit for bit."""
    config, batch = models.config(actor={"ppo_mini_batch_size": 4}), models.batch(2)
    students = {ema: workers(config, distill_of(slow=ema)) for ema in (None, 1.0, 0.5)}
    for _ in range(3):
        frozen, never, _ = (student.update_actor(batch) for student in students.values())
        assert never.meta_info == frozen.meta_info
        assert torch.equal(never.tensor("ref_log_prob"), frozen.tensor("ref_log_prob"))
    after = {ema: tiny.weights_of(student) for ema, student in students.items()}
    assert same(after[1.0], after[None]) and not same(after[0.5], after[None])


def program(models: Models, folder: Path) -> None:
    """On each rank: a step, a checkpoint, a step more; and the same of a worker that goes on from the checkpoint."""
    # A gradient that is nearly 0 must not decide on a step by its rounding.
    config = models.config(actor={"optim": OptimizerConfig(lr=1e-2, eps=1e-2)})
    distill, batch = distill_of(slow=0.5, slower=0.9), models.batch(3)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    share, seen = batch.chunk(ranks)[rank], {}
    first, second = workers(config, distill), workers(config, distill)
    first.update_actor(share)
    tiny.save_checkpoint(first, folder / "actor")
    second.load_checkpoint(str(folder / "actor"))
    for name, student in (("first", first), ("second", second)):
        seen[name] = [average_of(student, role) for role in ("slow", "slower")]
        metrics = student.update_actor(share).meta_info["metrics"]
        seen[name] += [tiny.weights_of(student), average_of(student), metrics["actor/distill_loss"]]
    torch.save(seen, folder / f"seen_{rank}.pt")


def test_ranks_and_checkpoints(models: Models, tmp_path: Path) -> None:
    seen, folders = {}, {ranks: tmp_path / str(ranks) for ranks in (1, 2)}
    for ranks, folder in folders.items():
        folder.mkdir()
        program(models, folder) if ranks == 1 else tiny.run_ranks(2, program, models, folder)
        seen[ranks] = torch.load(folder / "seen_0.pt", weights_only=False)
        first, second = seen[ranks]["first"], seen[ranks]["second"]
        assert all(same(*pair) for pair in zip(first[:4], second[:4], strict=True)) and first[4] == second[4]
        assert not same(first[0], first[1]) and not same(first[0], first[3])
    for one, two in zip(seen[1]["first"][:4], seen[2]["first"][:4], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    alone = workers(models.config(), distill_of(slow=0.5, slower=0.9))
    alone.load_checkpoint(str(folders[2] / "actor"))
    assert same(average_of(alone), seen[2]["first"][0]) and same(average_of(alone, "slower"), seen[2]["first"][1])
    # What is made of the checkpoint is the student alone.
    merged = tmp_path / "merged"
    for path in (folders[2] / "actor/huggingface").glob("*.safetensors"):
        path.unlink()
    command = ["merge", "--backend", "fsdp", "--local_dir", str(folders[2] / "actor"), "--target_dir", str(merged)]
    assert model_merger.main(command) == 0
    assert same(dict(tiny.load_plain(merged).named_parameters()), tiny.weights_of(alone))


def test_an_average_that_a_checkpoint_lacks_begins_at_its_student(models: Models, tmp_path: Path) -> None:
    plain = workers(models.config())
    plain.update_actor(models.batch())
    tiny.save_checkpoint(plain, tmp_path)
    student = workers(models.config(), distill_of(slow=0.5))
    student.load_checkpoint(str(tmp_path))
    assert same(average_of(student), tiny.weights_of(plain))


@pytest.mark.parametrize(
    ("teacher", "trainer", "lora_rank", "message"),
    [
        ({"path": "/models/self"}, {}, 0, "is an average of the student, and not of /models/self; leave one out"),
        ({"engine": "vllm"}, {}, 0, "is an average of the student, and not of vllm; leave one out"),
        ({"url": ["http://a"]}, {}, 0, "and not of ['http://a']; leave one out"),
        ({}, {"teacher_nnodes": 1, "teacher_n_gpus_per_node": 2}, 0, "; set trainer.teacher_n_gpus_per_node=2 to null"),
        ({}, {}, 4, "all weights, and actor_rollout_ref.model.lora_rank=4 trains an adapter; set it to 0"),
    ],
)
def test_what_cannot_follow_is_refused(
    teacher: dict[str, Any], trainer: dict[str, Any], lora_rank: int, message: str
) -> None:
    algorithm = AlgoConfig(AdvantageEstimator.ON_POLICY_DISTILL)
    algorithm.distill.teachers["slow"] = TeacherConfig(ema=0.5, **teacher)
    with pytest.raises(ValueError, match=rf"teachers\.slow\.ema=0\.5.*{re.escape(message)}"):
        PPOConfig(
            tiny.worker_config(Path("s"), model={"lora_rank": lora_rank}), algorithm, trainer=TrainerConfig(**trainer)
        )


def test_an_average_is_fp32_beside_a_student_that_computes_in_bf16(models: Models) -> None:
    """In bf16 a thousandth of a step would be rounded away."""
    half = {"fsdp_config": {"mixed_precision": {"param_dtype": "bf16"}}}
    student = workers(models.config(actor=half), distill_of(slow=0.999))
    start = average_of(student)
    assert {value.dtype for value in start.values()} == {torch.float32}
    student.update_actor(models.batch(2))
    assert not same(average_of(student), start)
