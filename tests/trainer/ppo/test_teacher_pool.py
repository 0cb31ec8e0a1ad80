"""A teacher with ranks of its own, on Ray: the same update as beside the student, GPUs of its own, nodes checked."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import ray
import torch
from ray.cloudpickle import register_pickle_by_value
from support import tiny_workers as tiny
from support.loop_fakes import bare_trainer
from support.tiny_pairs import Pair

from verl.config import ActorRolloutRefConfig, DistillConfig, PPOConfig, TeacherConfig, TrainerConfig
from verl.experimental.agent_loop.actors import plan_replicas
from verl.protocol import DataProto
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, register
from verl.trainer.ppo.worker_groups import WorkerGroups
from verl.workers.model_workers import StudentWorker, TeacherWorker

register_pickle_by_value(sys.modules[__name__])  # ranks do not import test modules


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One node of four CPUs that says it has four GPUs, for Ray's accounts alone.

    On one core, so that every rank computes with one thread: with more of them sums are rounded differently.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    ray.init(num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    os.sched_setaffinity(0, cores)


class Bystander(Worker):
    """A student that does nothing, beside which the teacher runs."""

    def __init__(self, config: ActorRolloutRefConfig, device: str) -> None:
        super().__init__()

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def ranks(self) -> tuple[int, int]:
        return self.rank, self.world_size


class Student(StudentWorker):
    """One that shows its gradient."""

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def gradient(self) -> dict[str, torch.Tensor]:
        return tiny.first_gradient(self)


class Update(NamedTuple):
    metrics: dict[str, float]
    scores: torch.Tensor
    gradient: dict[str, torch.Tensor]


@contextmanager
def started(trainer: TrainerConfig, config: ActorRolloutRefConfig, distill: DistillConfig) -> Iterator[Any]:
    """A trainer whose ranks have their models."""
    driver = bare_trainer(device_name="cpu")
    driver.config.actor_rollout_ref, driver.config.trainer, driver.config.algorithm.distill = config, trainer, distill
    groups = WorkerGroups(driver.config, driver.roles)
    try:
        classes = {"actor": Student, **dict.fromkeys(distill.roles, TeacherWorker)}
        driver.role_groups = groups.start(classes, driver.worker_arguments, "cpu")
        driver.actor_wg = driver.role_groups["actor"]
        for role in driver.roles:
            driver.role_groups[role].init_model()
        driver.fetch_heads()
        yield driver
    finally:
        groups.shutdown()


def update(trainer: TrainerConfig, config: ActorRolloutRefConfig, distill: DistillConfig, batch: DataProto) -> Update:
    """One step of the student, as the trainer makes it."""
    batch.meta_info["validate"] = False
    with started(trainer, config, distill) as driver:
        assert driver.uses_reference == driver.exports_hidden_states, "co-located teachers run in the update"
        batch = batch.union(driver.ref_log_prob(batch)) if driver.uses_reference else batch
        assert ("teacher_states" in batch.non_tensor_batch) == driver.exports_hidden_states
        largest = max(value.nbytes for value in batch.batch.values())
        assert largest <= batch.tensor("input_ids").nbytes, "what the driver holds does not grow with the hidden size"
        batch.reorder(torch.arange(len(batch)).flip(0))
        batch = batch.union(driver.update_actor(batch))
        assert "teacher_states" not in batch.non_tensor_batch, "hidden states are freed with their handles"
        return Update(driver.stage_metrics, batch.tensor("ref_log_prob"), driver.actor_wg.gradient()[0])


def test_a_student_learns_from_a_teacher_of_its_own_ranks_what_it_learns_from_one_beside_it(tiny_pair: Pair) -> None:
    """Base, full and stitched teachers, on two ranks each; hidden states go from rank to rank."""
    start = tiny_pair.extend_vocab_start_token
    further = {"self": TeacherConfig(sources=["rec"]), "mixed": TeacherConfig(vocabulary="stitched", sources=["mixed"])}
    distill = DistillConfig("exact", support="shared", leak_coef=0.5, leak_target=0.2, teachers=further)
    config = tiny.worker_config(tiny_pair.student, tiny_pair.teacher, extend_start=start, rows_per_step=8)
    batch = tiny.with_loss_inputs(tiny.rollouts(tiny.draw_rows(8, start + 20), start, temperature=0.9))
    batch = batch.union(DataProto.from_dict({"teacher": torch.arange(8) % 3}))
    beside = update(TrainerConfig(n_gpus_per_node=2), config, distill, batch.select())
    ranks = TrainerConfig(n_gpus_per_node=2, teacher_nnodes=1, teacher_n_gpus_per_node=2)
    apart = update(ranks, config, distill, batch.select())
    for name in ("actor/distill_loss", "actor/distill_divergence", "actor/leak_loss", "actor/grad_norm"):
        assert apart.metrics[name] == pytest.approx(beside.metrics[name], rel=1e-5), name
    tiny.assert_same_gradient(apart.gradient, beside.gradient)
    torch.testing.assert_close(apart.scores, beside.scores, rtol=0, atol=1e-5)
    assert (beside.scores != 0).equal(batch.tensor("response_mask").flip(0).bool())


def test_answers_scored_part_by_part_get_the_scores_of_the_whole_batch(tiny_pair: Pair) -> None:
    """To the bit where a row is a micro-batch; all are asked before one is waited for, and two ranks share each."""
    start = tiny_pair.extend_vocab_start_token
    further = {"self": TeacherConfig(sources=["rec"]), "mixed": TeacherConfig(vocabulary="stitched", sources=["mixed"])}
    distill = DistillConfig("topk", topk=4, teachers=further)
    one_row = {"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": 1}
    config = tiny.worker_config(tiny_pair.student, tiny_pair.teacher, extend_start=start, ref=one_row)
    batch = tiny.rollouts(tiny.draw_rows(8, start + 20), start, temperature=0.9)
    batch = batch.union(DataProto.from_dict({"teacher": torch.arange(8) % 3}, None, {"validate": False}))
    with started(TrainerConfig(teacher_nnodes=1, teacher_n_gpus_per_node=2), config, distill) as driver:
        begun = [driver.begin_scores(batch.slice(*part)) for part in [(0, 3), (3, 4), (4, 8)]]
        whole = driver.ref_log_prob(batch)
        parts = DataProto.concat([scores() for scores in begun])
    assert {"ref_log_prob", "teacher_top_log_probs"} <= set(whole.batch.keys()) == set(parts.batch.keys())
    assert whole.tensor("ref_log_prob").any()
    for key, values in whole.batch.items():
        assert torch.equal(parts.tensor(key), values), key


def test_each_pool_has_gpus_of_its_own_and_replicas_those_of_the_student() -> None:
    trainer = TrainerConfig(n_gpus_per_node=2, teacher_nnodes=1, teacher_n_gpus_per_node=2)
    groups = WorkerGroups(PPOConfig(trainer=trainer), ["actor", "ref"])
    config = ActorRolloutRefConfig()
    views = groups.start({"actor": Bystander, "ref": Bystander}, lambda _: {"config": config, "device": "cuda"}, "cuda")
    try:
        student, teacher = views["actor"].get_placement(), views["ref"].get_placement()
        students, teachers = ({rank["cuda_visible_devices"] for rank in ranks} for ranks in (student, teacher))
        assert len(students) == len(teachers) == 2 and students | teachers == {"0", "1", "2", "3"}
        assert views["actor"].ranks() == views["ref"].ranks() == [(0, 2), (1, 2)], "a process group each"
        (replica,) = plan_replicas(student, "cuda", 2)
        assert set(str(replica.cuda_visible_devices).split(",")) == students
        assert ray.available_resources().get("GPU", 0) == 0
    finally:
        groups.shutdown()
