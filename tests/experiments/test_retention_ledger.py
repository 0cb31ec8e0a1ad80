"""The ledger's gradients add up to the run's, the run is the same to the bit, and a table sums it up."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.retention.ledger import ledger_text
from experiments.retention.results import Extras, Run, read_lines
from experiments.retention.runner import train
from experiments.retention.worlds import Prepared

pytestmark = pytest.mark.usefixtures("one_rank")


def assert_adds_up(folder: Path) -> None:
    """The two parts of every line have a sum of the norm that the update measured."""
    norms = {line["step"]: line["data"].get("actor/grad_norm") for line in read_lines(folder / "metrics.jsonl")}
    for line in read_lines(folder / "ledger.jsonl"):
        general, items = line["general"], line["items"]
        mixed = 2 * general * items * (line["cosine"] or 0.0)
        assert math.sqrt(general**2 + items**2 + mixed) == pytest.approx(norms[line["step"]], rel=1e-4)


def test_a_run_is_the_same_to_the_bit_with_and_without_a_ledger(prepared: Prepared, tmp_path: Path) -> None:
    run, weights = Run("quickstart", 0, "exact-self", 0, steps=3), []
    for every in (0, 1):
        folder = tmp_path / str(every)
        train(run, prepared, folder, tmp_path / "cache", Extras(every))
        weights.append(load_file(folder / "global_step_3" / "actor" / "huggingface" / "model.safetensors"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not (tmp_path / "0" / "ledger.jsonl").exists()
    lines = read_lines(tmp_path / "1" / "ledger.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert_adds_up(tmp_path / "1")
    for line in lines[1:]:
        assert line["general"] > 0 and line["items"] > 0 and -1 < line["cosine"] < 1
        assert Run(**line["run"]) == run and 0.1 < line["item_tokens"] < 0.9


@pytest.mark.parametrize(
    ("variant", "shares"), [("alternate", [0, 0, 0, 1]), ("sampled-self", [None] * 2), ("tokens-half", [None] * 2)]
)
def test_parts_add_up_whatever_the_loss_and_the_batches(
    variant: str, shares: list[float | None], prepared: Prepared, tmp_path: Path
) -> None:
    run = Run("quickstart", 0, variant, 0, steps=len(shares))
    train(run, prepared, tmp_path, tmp_path / "cache", Extras(1))
    lines = read_lines(tmp_path / "ledger.jsonl")
    for line, share in zip(lines, shares, strict=True):
        assert share is None or (line["item_tokens"], line["general"] == 0) == (share, share == 1)
        if line["step"] > 1:  # where the student is still the frozen one, rows of items have no gradient
            assert (line["cosine"] is None) == (share is not None), "a batch of one group has one gradient"
    assert_adds_up(tmp_path)


def test_the_table_has_the_start_and_two_halves(tmp_path: Path) -> None:
    assert ledger_text(tmp_path) == ""
    for seed, shift in ((0, 0.0), (1, 0.2)):
        run = {"world": "quickstart", "student_seed": 0, "variant": "exact-self", "seed": seed, "steps": 20}
        rows = [(5, 4.0, 0.5 + shift), (10, 2.0, None), (15, 1.0, -0.5 + shift), (20, 3.0, -0.5)]
        folder = tmp_path / f"run{seed}"
        folder.mkdir()
        texts = [
            json.dumps({"run": run, "step": s, "general": g, "items": 2 * g, "cosine": c, "item_tokens": 0.25})
            for s, g, c in rows
        ]
        (folder / "ledger.jsonl").write_text("\n".join(texts) + "\n")
    assert ledger_text(tmp_path).splitlines()[-3:] == [
        "| exact + self, histories | 5 | 2 | 4 | 8 | 0.6 | 0.25 |",
        "| exact + self, histories | 10 | 2 | 2 | 4 | – | 0.25 |",
        "| exact + self, histories | 15–20 | 2 | 2 | 4 | -0.45 | 0.25 |",
    ]
