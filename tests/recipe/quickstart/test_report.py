"""The report: what it draws, what it leaves out, that it escapes everything and needs no network."""

import html
import json
import re

import pytest

import verl
from recipe.onpolicy_distill.quickstart.report import pair_samples, write_report
from recipe.onpolicy_distill.quickstart.scoreboard import comparison, comparison_table, verdict

BEFORE = {"general_accuracy": 0.1, "general_accuracy_by_task": {"copy": 0.1}, "rec_recall": 0.8, "leak_rate": 0.4}
AFTER = {"general_accuracy": 0.82, "general_accuracy_by_task": {"copy": 0.82}, "rec_recall": 0.4, "leak_rate": 0.01}
SUMMARY = {
    "seed": 3,
    "steps": 2,
    "seconds": {"total": 61.4},
    "teacher": {"general_accuracy": 0.9, "general_accuracy_by_task": {"copy": 0.9}},
    "before": BEFORE,
    "after": AFTER,
}
STEPS = [
    {"distill/reverse_kl": 2.0, "distill/entropy": 1.0, "timing_s/gen": 1.0, "timing_s/ref": 0.5, "timing_s/step": 1.6},
    {"distill/reverse_kl": 1.0, "distill/entropy": None, "val/general_copy/reward": 0.5, "timing_s/gen": 1.2},
]


def token(text, advantage, extended=False, masked=False):
    log_probs = {"student_log_prob": -0.5, "teacher_log_prob": -0.5 + advantage}
    return {"text": text, "advantage": advantage, "extended": extended, "masked": masked, **log_probs}


def sample(uuid, *tokens):
    named = {"uuid": uuid, "source": "copy", "prompt": '<b>"a" & b</b>', "wanted": "a<b"}
    return {**named, "exact": False, "tokens": list(tokens)}


PAIRS = pair_samples(
    [
        sample("1", token("plain", -1.5)),
        sample("2", token("<script>", -6.0), token("<s_a_1>", -30.0, extended=True), token("\n", 0.0, masked=True)),
        sample("gone", token("x", 0.0)),
    ],
    [sample("1"), sample("2", token("a", 0.3))],
)


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "data": data}) for step, data in enumerate(STEPS, 1)]
    path.write_text("\n".join([*lines, '{"step": 3, "da']))
    return path


def test_the_page_is_whole_and_needs_no_network(tmp_path, metrics):
    page = write_report(tmp_path / "out" / "report.html", SUMMARY, metrics, PAIRS).read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,"]
    assert not re.search(r"<script|https?:|@import|url\(", page)
    titles = {"General accuracy", "Recommendation", "Reverse KL to the teacher", "Entropy", "Step time by stage"}
    shown = {html.unescape(text.strip()) for text in re.findall(r">([^<>]+)<", page)}
    assert (
        titles | {f"2 steps · seed 3 · 61 s · kai-verl {verl.__version__}", "<s_a_1>", "<script>", '<b>"a" & b</b>'}
        <= shown
    )
    assert "Leak" not in shown, "no such metric was logged"
    assert page.count("<svg") == 5
    for tag in ("div", "span", "figure", "svg", "table", "tr", "td", "h3"):
        assert len(re.findall(rf"<{tag}\b", page)) == page.count(f"</{tag}>"), tag


def test_tokens_show_how_training_sees_them(tmp_path, metrics):
    page = write_report(tmp_path / "r.html", SUMMARY, metrics, PAIRS).read_text(encoding="utf-8")
    assert re.findall(r'class="(t\b[^"]*)"[^>]* title="([^"]*)"', page) == [
        ("t down", "advantage -6.00, log p of the student -0.50, log p of the teacher -6.50"),
        ("t ext down", "an item token, advantage -30.00, log p of the student -0.50"),
        ("t masked", "not trained on, log p of the student -0.50"),
        ("t up", "advantage +0.30, log p of the student -0.50, log p of the teacher -0.20"),
        ("t down", "advantage -1.50, log p of the student -0.50, log p of the teacher -2.00"),
    ]


def test_the_table():
    assert comparison(SUMMARY) == [
        ["General tasks, exact answers", "90.0%", "10.0%", "82.0%", "90% regained"],
        ["  copy", "90.0%", "10.0%", "82.0%", "90% regained"],
        ["Recommendation, Recall@5", "–", "80.0%", "40.0%", "50% kept"],
        ["General answers with an item token", "–", "40.0%", "1.0%", "97.5% removed"],
    ]
    lines = comparison_table(SUMMARY).splitlines()
    assert lines[0].split() == ["teacher", "before", "after", "kept", "or", "regained"]
    assert len({len(line) for line in lines}) == 1
    for kind, *stages in (("kept", None, 0.0, 0.5), ("regained", 0.2, 0.3, 0.5), ("kept", 1.0, None, 1.0)):
        assert verdict(kind, *stages) == ""
