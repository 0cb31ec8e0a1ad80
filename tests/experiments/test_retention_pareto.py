"""Models that cost no training beside distilled ones: shares by hand, and a picture of all of them."""

from dataclasses import replace
from xml.etree import ElementTree

from experiments.retention.pareto import (
    BEFORE,
    FAMILIES,
    GENERAL,
    TEACHER,
    made_with,
    picture,
    runs_of,
    summarise,
    table_text,
    weighted_sums,
)
from experiments.retention.variants import VARIANTS


def line(student, family, share, general, recall):
    metrics = {"general_accuracy": general, "rec_recall": recall, "rec_recall_at_1": recall / 2, "free_rate": 0.0}
    return {"student_seed": student, "family": family, "share": share, "metrics": metrics}


LINES = [
    line(0, TEACHER, 1.0, 0.8, 0.0),
    line(0, BEFORE, 1.0, 0.0, 0.5),
    line(1, TEACHER, 1.0, 1.0, 0.0),
    line(1, BEFORE, 1.0, 0.1, 0.8),
    line(0, "before-teacher", 0.5, 0.4, 0.25),
    line(1, "before-teacher", 0.5, 0.8, 0.2),
    line(0, "before-teacher", 0.1, 0.2, 0.5),
    line(0, "exact", 1.0, 0.76, 0.3),
]


def test_each_model_is_held_against_its_own_student_and_teacher():
    found = summarise(LINES)
    assert list(found) == [(BEFORE, 1.0), ("before-teacher", 0.1), ("before-teacher", 0.5), ("exact", 1.0)]
    half = found["before-teacher", 0.5]
    assert half[GENERAL].mean == (0.5 + 0.8) / 2 and half["R@5 kept"].mean == (0.5 + 0.25) / 2
    assert "free kept" not in half, "a metric that was 0 before cannot be kept"
    assert found["exact", 1.0][GENERAL].deviation is None
    text = table_text(found)
    assert "| before and teacher, averaged | 0.5 | 65% ± 21% | 38% ± 18% | 38% ± 18% | – | – |" in text
    assert "| distilled on general prompts |  | 95% | 60% | 60% | – | – |" in text
    drawn = ElementTree.fromstring(picture(found))
    circles = [node for node in drawn.iter() if node.tag.endswith("circle")]
    assert len(circles) == len(found) + len(FAMILIES)


def test_coefficients_add_up_to_one():
    sums = list(weighted_sums())
    assert len(sums) == 16 and all(abs(sum(mix.parts.values()) - 1) < 1e-9 for mix in sums)
    assert {mix.family for mix in sums} < set(FAMILIES)


def test_lines_of_other_settings_do_not_count(monkeypatch):
    assert {run.variant: run.steps for run in runs_of(3, 7)} == {"exact": 7, "exact-self": 7, "quickstart": 175}
    before, variant = made_with(7), VARIANTS["quickstart"]
    monkeypatch.setitem(VARIANTS, "quickstart", replace(variant, settings={**variant.settings, "data.seed": 1}))
    assert before != made_with(7) and before != made_with(8)
