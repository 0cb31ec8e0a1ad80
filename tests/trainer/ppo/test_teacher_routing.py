"""Rows go to the teacher of their source, and come back in their places."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.loop_fakes import bare_trainer

from verl.config import PPOConfig, TeacherConfig, TrainerConfig
from verl.protocol import DataProto

SOURCES = ["rec_next", "general", "code", "rec_caption", "general", "code"]


class Teacher:
    """Scores a token by its id and a number of its own, and remembers its rows."""

    def __init__(self, number: float) -> None:
        self.number = number
        self.seen: list[list[int]] = []

    def compute_ref_log_prob(self, batch: DataProto) -> DataProto:
        responses = batch.tensor("responses")
        self.seen.append(responses[:, 0].tolist())
        return DataProto.from_dict({"ref_log_prob": -self.number * responses.float()})


def trainer_of(teachers: dict[str, TeacherConfig]) -> Any:
    config = PPOConfig()
    config.algorithm.distill.teachers = teachers
    return bare_trainer(config, global_steps=3, prompts=SimpleNamespace(epoch=0))


def test_rows_of_three_teachers_get_the_numbers_that_each_gives_alone() -> None:
    further = {"self": TeacherConfig(sources=["rec_*"]), "coder": TeacherConfig(vocabulary="base", sources=["code"])}
    trainer = trainer_of(further)
    groups = {role: Teacher(number) for role, number in (("ref", 1.0), ("self", 10.0), ("coder", 100.0))}
    trainer.role_groups = groups
    rows = {"source": np.array(SOURCES, dtype=object), "index": np.arange(6)}
    batch = trainer.prepare(rows, n=2)
    assert batch.tensor("teacher").tolist() == [1, 1, 0, 0, 2, 2, 1, 1, 0, 0, 2, 2]
    reads = batch.non_tensor_batch["teacher_knows_extended"].tolist()
    assert reads == [place == 1 for place in batch.tensor("teacher").tolist()]
    responses = torch.arange(12)[:, None].expand(12, 4).clone()
    batch = batch.union(DataProto.from_dict({"responses": responses, "response_mask": torch.ones_like(responses)}))
    scores = trainer.ref_log_prob(batch).tensor("ref_log_prob")
    number_of = torch.tensor([1.0, 10.0, 100.0])[batch.tensor("teacher")]
    torch.testing.assert_close(scores, -number_of[:, None] * responses)
    assert groups["ref"].seen == [[2, 3, 8, 9]] and groups["coder"].seen == [[4, 5, 10, 11]]
    trainer.ref_log_prob(batch.select_idxs(batch.tensor("teacher") == 0))
    assert [len(teacher.seen) for teacher in groups.values()] == [2, 1, 1], "without rows it is not called"


def test_the_prompt_decides_where_a_teacher_asks_for_it() -> None:
    reader = TeacherConfig(sources=["rec_*"], prompts="with_items")
    trainer = trainer_of({"reader": reader, "writer": TeacherConfig(sources=["*"], prompts="without_items")})
    rows = {"source": np.array(SOURCES, dtype=object), "index": np.arange(6)}
    rows["has_extended"] = np.array([True, True, False, False, False, False], dtype=object)
    batch = trainer.prepare(rows, n=1)
    assert batch.tensor("teacher").tolist() == [1, 0, 2, 2, 2, 2]
    assert batch.non_tensor_batch["teacher_knows_extended"].tolist() == [True, False, True, True, True, True]
    del rows["has_extended"]
    with pytest.raises(KeyError, match=r"has_extended.*dataset"):
        trainer.prepare(rows, n=1)


def test_every_teacher_needs_a_row() -> None:
    trainer = trainer_of({"reader": TeacherConfig(sources=["rec_*"], prompts="with_items")})
    trainer.train_dataset = SimpleNamespace(sources=["rec_next", "general"], has_extended=[True, False])
    trainer._check_teachers_have_rows()
    trainer.train_dataset.has_extended = [False, True]
    with pytest.raises(ValueError, match=r"teachers\.reader\.sources.*prompts=with_items matches.*have \['general'"):
        trainer._check_teachers_have_rows()


def test_the_base_teacher_needs_a_row_too_unless_a_stitched_one_speaks_with_its_weights() -> None:
    trainer = trainer_of({"reader": TeacherConfig()})
    trainer.train_dataset = SimpleNamespace(sources=["rec_next", "general"], has_extended=[True, False])
    with pytest.raises(ValueError, match=r"ref\.model\.path has no training row.*\{'reader': \['\*'\]\}"):
        trainer._check_teachers_have_rows()
    trainer.config.algorithm.distill.teachers = {"reader": TeacherConfig(vocabulary="stitched", sources=["*"])}
    trainer._check_teachers_have_rows()
    trainer.config.algorithm.distill.support = "shared"
    with pytest.raises(ValueError, match=r"support=shared has no effect: .* all rows to \['reader'\], which know them"):
        trainer._check_teachers_have_rows()


class TeacherApart(Teacher):
    """One on other ranks, which exports something for each row before the update."""

    def score_for_update(self, batch: DataProto) -> DataProto:
        scores = self.compute_ref_log_prob(batch).tensor("ref_log_prob")
        handles = np.array([f"{self.number:g} {row}" for row in self.seen[-1]], dtype=object)
        return DataProto.from_dict({"ref_log_prob": scores}, {"teacher_states": handles})


def test_what_teachers_export_is_there_for_the_update_alone() -> None:
    """Joined by row; validation has scores only; after the update the driver holds no handle."""
    trainer = trainer_of({"self": TeacherConfig(sources=["rec_*"])})
    trainer.config.algorithm.distill.objective = "exact"
    trainer.config.trainer = TrainerConfig(teacher_nnodes=1, teacher_n_gpus_per_node=1)
    trainer.role_groups = {"ref": TeacherApart(1.0), "self": TeacherApart(10.0)}
    rows = {"source": np.array(SOURCES, dtype=object), "index": np.arange(6)}
    tokens = torch.arange(6)[:, None].expand(6, 4).clone()
    responses = DataProto.from_dict({"responses": tokens, "response_mask": torch.ones_like(tokens)})
    batch = trainer.prepare(rows, n=1).union(responses)
    batch = batch.union(trainer.ref_log_prob(batch))
    assert batch.array("teacher_states").tolist() == ["10 0", "1 1", "1 2", "10 3", "1 4", "1 5"]
    seen: list[DataProto] = []

    def update_actor(batch: DataProto) -> DataProto:
        seen.append(batch.select())
        return DataProto(meta_info={"metrics": {"actor/distill_loss": [1.0]}})

    trainer.actor_wg = SimpleNamespace(update_actor=update_actor)
    trainer.update_actor(batch)
    assert "teacher_states" in seen[0].non_tensor_batch and "teacher_states" not in batch.non_tensor_batch
    validation = trainer.prepare(rows, n=1, validate=True).union(responses)
    assert "teacher_states" not in trainer.ref_log_prob(validation).non_tensor_batch
