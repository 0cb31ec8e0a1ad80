"""Which teacher scores which rows, and settings that nothing reads."""

from contextlib import nullcontext
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import pytest

from verl.config import ActorRolloutRefConfig, AlgoConfig, DistillConfig, PPOConfig, RolloutConfig, TeacherConfig


def test_rows_belong_to_the_first_teacher_their_source_matches() -> None:
    teachers = {
        "self": TeacherConfig(sources=["rec_*"], weight=0.5),
        "items": TeacherConfig(path="x", vocabulary="stitched", sources=["rec_next", "video"]),
        "code": TeacherConfig(path="y", vocabulary="base", sources=["code"]),
    }
    distill = DistillConfig("exact", teachers=teachers)
    assert distill.roles == ["ref", "self", "items", "code"]
    sources = ["general", "rec_next", "video", "code", "Rec_next"]
    assert [distill.teacher_of(source) for source in sources] == [0, 1, 2, 3, 0]
    assert [distill.teacher_knows_extended(source) for source in sources] == [False, True, True, False, False]
    assert distill.extended_sources == ["rec_*", "rec_next", "video"]
    assert [distill.weight_of(role) for role in distill.roles] == [1.0, 0.5, 1.0, 1.0]
    assert [DistillConfig().teacher_of(source) for source in sources] == [0] * 5


def test_rows_may_belong_by_what_their_prompt_holds() -> None:
    """Sources and prompts must both match; the first teacher counts."""
    teachers = {
        "reader": TeacherConfig(sources=["rec_*"], prompts="with_items"),
        "writer": TeacherConfig(path="w", sources=["rec_*", "mixed"], prompts="without_items"),
        "code": TeacherConfig(path="c", vocabulary="base", sources=["code"]),
    }
    distill = DistillConfig(teachers=teachers)
    kinds = [*product(("rec_next", "mixed", "code", "general"), (True, False))]
    assert [distill.teacher_of(*kind) for kind in kinds] == [1, 2, 0, 2, 3, 3, 0, 0]
    assert [int(distill.teacher_knows_extended(*kind)) for kind in kinds] == [1, 1, 0, 1, 0, 0, 0, 0]
    assert distill.routes_by_prompt and not DistillConfig(teachers={"self": TeacherConfig()}).routes_by_prompt


def test_sources_with_items_are_those_whose_teacher_knows_items() -> None:
    """What the data keep is decided by patterns, and must be what a row's own teacher can read; over all settings."""
    sources, prompts = (["a*"], ["b"], ["*"]), ("any", "with_items", "without_items")
    kinds = [*product(sources, prompts, ("full", "base"))]
    for first, second in product(kinds, kinds):
        if (first[2], second[2]) == ("base", "full"):
            continue  # refused: those with the vocabulary full come first
        teachers = {
            name: TeacherConfig("path", vocabulary, patterns, wanted)
            for name, (patterns, wanted, vocabulary) in (("one", first), ("two", second))
        }
        distill = DistillConfig(teachers=teachers)
        for source in ("a1", "b", "c"):
            kept = any(fnmatchcase(source, pattern) for pattern in distill.extended_sources)
            assert kept == distill.teacher_knows_extended(source, True), (first, second, source)


ALL_ROWS = {"self": TeacherConfig()}


def test_a_reference_knows_the_items_where_it_is_the_student_in_this_run() -> None:
    config = PPOConfig()
    assert config.knows_extended("ref")
    config.actor_rollout_ref.ref.engine = "vllm"  # what servers give is of the shared ids
    assert not config.knows_extended("ref")


SPLIT = {"reads": TeacherConfig(prompts="with_items"), "writes": TeacherConfig("w", prompts="without_items")}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "exact", "beta": 0.3}, r"beta=0.3 has no effect with .*objective=exact; set .*=jsd, or leave i"),
        ({"objective": "jsd", "topk": 8}, r"topk=8 has no effect with algorithm.distill.objective=jsd; set .*=topk"),
        ({"support": "shared"}, r"support=shared has no effect with algorithm.distill.objective=sampled; set .*=exact"),
        ({"objective": "exact", "leak_target": 0.01}, r"leak_target=0.01 has no effect .*; set .*leak_coef above 0"),
        ({"objective": "exact", "leak_coef": 1.0, "teachers": ALL_ROWS}, r"leak_coef=1.0 has .* to \['self'\], which"),
        ({"objective": "exact", "support": "shared", "teachers": SPLIT}, r"support=shared .* \['reads', 'writes'\]"),
        ({"objective": "jsd", "beta": 0.3}, None),
        ({"objective": "exact", "leak_coef": 1.0, "leak_target": 0.01}, None),
        ({"objective": "exact", "leak_coef": 1.0, "support": "shared", "teachers": {"reads": SPLIT["reads"]}}, None),
        ({"objective": "exact", "support": "shared", "teachers": {"base": TeacherConfig("b", "base")}}, None),
        ({"objective": "exact", "teachers": ALL_ROWS}, None),
    ],
)
def test_what_nothing_reads_is_refused(settings: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ValueError, match=rf"^algorithm\.distill\.{message}") if message else nullcontext():
        DistillConfig(**settings)


def test_what_no_row_of_the_data_needs_is_refused_once_they_are_known() -> None:
    """The patterns leave room for rows of the base teacher, and the data have none."""
    teachers = {"mixed": TeacherConfig(vocabulary="stitched", sources=["a*"])}
    distill = DistillConfig("exact", leak_coef=1.0, teachers=teachers)
    distill.check_base_settings({("a1", True), ("a2", False), ("b", False)})
    with pytest.raises(ValueError, match=r"leak_coef=1.0 has no effect: .* gives all rows to \['mixed'\]"):
        distill.check_base_settings({("a1", True), ("a2", False)})
    DistillConfig("exact", teachers=ALL_ROWS).check_base_settings({("a", True)})


@pytest.mark.parametrize(
    ("rollout", "estimator", "stops"),
    [
        ({}, "on_policy_distill", True),
        ({"mask_after_extend_token": False}, "on_policy_distill", False),
        ({"mask_response_if_have_extend_token": True}, "on_policy_distill", True),
        ({"stop_at_extended_token": False}, "on_policy_distill", False),
        ({}, "grpo", False),
    ],
)
def test_answers_end_at_an_item_where_nothing_reads_on(rollout: dict[str, bool], estimator: str, stops: bool) -> None:
    settings = ActorRolloutRefConfig(rollout=RolloutConfig(**rollout))
    assert PPOConfig(actor_rollout_ref=settings, algorithm=AlgoConfig(estimator)).stops_at_extended == stops
