"""Which teacher judges which rows."""

from verl.workers.config import DistillConfig, TeacherConfig


def test_rows_belong_to_the_first_teacher_their_source_matches() -> None:
    distill = DistillConfig(
        "exact",
        teachers={
            "self": TeacherConfig(sources=["rec_*"], weight=0.5),
            "items": TeacherConfig(path="x", vocabulary="stitched", sources=["rec_next", "video"]),
            "code": TeacherConfig(path="y", vocabulary="base", sources=["code"]),
        },
    )
    assert distill.roles == ["ref", "self", "items", "code"]
    sources = ["general", "rec_next", "video", "code", "Rec_next"]
    assert [distill.teacher_of(source) for source in sources] == [0, 1, 2, 3, 0]
    assert [distill.reads_extended(source) for source in sources] == [False, True, True, False, False]
    assert distill.extended_sources == ["rec_*", "rec_next", "video"]
    assert [distill.weight_of(role) for role in distill.roles] == [1.0, 0.5, 1.0, 1.0]


def test_without_further_teachers_all_rows_are_the_one_teachers() -> None:
    distill = DistillConfig()
    assert (distill.roles, distill.teacher_of("rec_next"), distill.reads_extended("rec_next")) == (["ref"], 0, False)
    assert not distill.is_exact and DistillConfig("jsd").is_exact
