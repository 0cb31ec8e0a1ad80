"""Means, spreads and shares of results made by hand."""

from typing import Any

import pytest

from experiments.retention.results import DONE, FAILED, Record, Run, record_of
from experiments.retention.table import Spread, summarise, table_text

BEFORE: dict[str, float] = {"general_accuracy": 0.1, "rec_recall_at_1": 0.5, "rec_recall": 0.8, "free_rate": 0.4}
BEFORE |= {"rec_text_accuracy": 0.0, "extend_mass": 0.2, "leak_rate": 0.3}


def trained(student: int, seed: int, recall: float, curve: list[list[float]], variant: str = "exact") -> Record:
    metrics = BEFORE | {"general_accuracy": curve[-1][1], "rec_recall_at_1": recall, "extend_mass": 4e-4 * (1 + seed)}
    run = Run("quickstart", student, variant, seed, steps=20)
    return record_of(run, DONE, metrics=metrics, curve=curve, steps=20, seconds=10.0 + seed)


@pytest.fixture
def records() -> list[Record]:
    starts: list[tuple[int, float, dict[str, Any]]] = [(0, 1.0, BEFORE), (1, 0.8, BEFORE | {"rec_recall_at_1": 0.25})]
    measured = [record_of(Run("quickstart", s, "teacher"), DONE, metrics={"general_accuracy": t}) for s, t, _ in starts]
    measured += [record_of(Run("quickstart", s, "before"), DONE, metrics=metrics) for s, _, metrics in starts]
    return [
        *measured,
        trained(0, 0, 0.5, [[0, 0.1], [10, 0.96], [20, 0.9]]),  # at 95% of 1.0 after 10 steps, though not at the end
        trained(0, 1, 0.4, [[0, 0.1], [10, 0.5], [20, 0.94]]),  # never
        trained(1, 0, 0.25, [[0, 0.1], [10, 0.5], [20, 0.76]]),  # 95% of 0.8, after 20
        record_of(Run("quickstart", 0, "stitched", 0, steps=20), FAILED, message="ValueError: unknown\nand more"),
    ]


def test_each_run_is_compared_with_its_own_student_and_teacher(records: list[Record]) -> None:
    assert table_text(summarise([])) == "no results yet"
    overall, first, second = summarise(records)
    [summary, _] = overall.summaries
    assert (overall.students, first.students, second.students) == ((0, 1), (0,), (1,))
    assert summary.runs == 3
    # 0.5/0.5, 0.4/0.5 and 0.25/0.25
    assert summary.metrics["recall_1_kept"].mean == pytest.approx((1.0 + 0.8 + 1.0) / 3)
    assert summary.metrics["recall_1_kept"].deviation == pytest.approx(0.2 / 3**0.5)
    assert summary.metrics["recall_5_kept"] == Spread(1.0, 0.0)
    assert summary.metrics["item_mass"].mean == pytest.approx(4e-4 * 4 / 3)
    assert "text_kept" not in summary.metrics, "what was 0 before cannot be kept"
    assert (summary.recovered, summary.steps_to_recover) == (2, Spread(15.0, pytest.approx(50**0.5)))
    assert overall.start.teacher.mean == pytest.approx(0.9)
    assert overall.start.before["rec_recall_at_1"].mean == pytest.approx(0.375)
    assert second.summaries[0].metrics["general"] == Spread(0.76, None)


def test_the_text_has_every_metric_and_what_did_not_run(records: list[Record]) -> None:
    text = table_text(summarise(records)[:1])
    assert "### quickstart, 20 steps, student seeds 0, 1" in text
    assert (
        "| exact, shared support | 3 | 0.867 ± 0.095 | 93 ± 12% | 100 ± 0% | 100 ± 0% | – | 5.3e-04 ± 2.3e-04 "
        "| 0.300 ± 0.000 | 15 ± 7 (2 of 3) | 20 | 10 ± 1 |"
    ) in text.splitlines()
    assert "- exact + stitched, histories: ValueError: unknown" in text


def test_a_longer_list_that_a_run_did_not_measure_is_left_open(records: list[Record]) -> None:
    for record in records[2:5]:  # the students before, and one run
        record["metrics"] = record["metrics"] | {"rec_recall_at_20": 0.5}
    [with_it, without] = records[4], records[5]
    text = table_text(summarise([*records[:4], with_it]))
    assert "| R@20 kept |" in text and " | 100% | " in text
    assert "| R@20 kept |" in table_text(summarise([*records[:4], without]))


def test_only_results_of_these_settings_that_ran_on_all_students_are_compared(records: list[Record]) -> None:
    extra = [trained(0, 0, 0.1, [[20, 0.5]], "exact-leak"), trained(0, 2, 0.1, [[20, 0.5]])]
    extra[1]["settings"]["data.train_batch_size"] = 1
    overall, first, second = summarise([*records, *extra])
    assert [(summary.variant, summary.runs) for summary in overall.summaries] == [("exact", 3), ("stitched", 0)]
    assert [summary.variant for summary in first.summaries] == ["exact", "exact-leak", "stitched"]
    assert [summary.variant for summary in second.summaries] == ["exact"]
