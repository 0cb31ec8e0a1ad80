"""A run that was killed and resumed is the run that never was: the same metrics at every step, the same weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.in_process_run import STEPS, run_in_process, settings
from support.launch import MEASURED, metrics_by_step, write_onerec_parquet

pytestmark = pytest.mark.usefixtures("one_rank")


def logged(folder: Path, first: int = 1) -> list[dict[str, Any]]:
    """What was logged of each step, in order, without what the clock says; every step once."""
    return [*metrics_by_step(folder, STEPS, MEASURED, first).values()]


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """Nine prompts: two batches an epoch, and one prompt too many."""
    return write_onerec_parquet(tmp_path / "train.parquet", 9)


def test_a_killed_and_resumed_run_is_the_run_that_never_was(tiny_pair: Any, train: Path, tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_in_process(settings(tiny_pair, train, whole))
    run_in_process(settings(tiny_pair, train, stopped), dies_in_batch=3)  # while the second checkpoint is written
    assert (stopped / "global_step_2.unfinished").exists()
    assert (stopped / "latest_checkpointed_iteration.txt").read_text() == "1\n"
    run_in_process(settings(tiny_pair, train, stopped), dies_in_batch=4)  # at the end of the second epoch
    assert (stopped / "latest_checkpointed_iteration.txt").read_text() == "3\n"
    run_in_process(settings(tiny_pair, train, stopped, **{"trainer.async_save": False}))

    expected = logged(whole)
    assert logged(stopped) == expected
    assert {step["training/epoch"] for step in expected} == {0, 1, 2}
    last = f"global_step_{STEPS}/actor/huggingface/model.safetensors"
    weights = load_file(whole / last)
    assert all(torch.equal(value, weights[name]) for name, value in load_file(stopped / last).items())
    repeated = [json.loads(line)["step"] for line in (stopped / "metrics_void.jsonl").read_text().splitlines()]
    assert repeated == [2, 4], "what was logged of steps whose checkpoints the kills cost"


def test_a_run_that_rehearses_on_random_codes_and_holds_their_rows(tiny_pair: Any, train: Path, tmp_path: Path) -> None:
    """Half of each batch are made prompts, scored by the frozen student; the rows of item tokens stay as they were."""
    key = "data.synthetic_item_prompts"
    changes = {
        "actor_rollout_ref.actor.freeze_extended_rows": True,
        "algorithm.distill.objective": "exact",
        "++algorithm.distill.teachers.self": "{sources: ['*'], prompts: with_items}",
        f"{key}.count": 5,
        f"++{key}.templates": "{next: {user: '{history}'}}",
        f"{key}.max_history": 6,
        "++data.source_weights": "{synthetic_rec_*: 1, *: 1}",
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_in_process(settings(tiny_pair, train, whole, **changes))
    run_in_process(settings(tiny_pair, train, stopped, **changes), dies_in_batch=3)
    run_in_process(settings(tiny_pair, train, stopped, **changes))

    expected = logged(whole)
    assert logged(stopped) == expected
    assert all(step["actor/extended_row_drift"] == 0 for step in expected)
    drifts = [step["actor/shared_row_drift"] for step in expected]
    assert drifts[0] > 0 and drifts == sorted(drifts)
    assert any(name.startswith("distill/synthetic_rec_next/") for name in expected[0])
    start, name = tiny_pair.extend_vocab_start_token, "model.embed_tokens.weight"
    before = load_file(tiny_pair.student / "model.safetensors")[name]
    after = load_file(stopped / f"global_step_{STEPS}/actor/huggingface/model.safetensors")[name]
    assert torch.equal(after[start:], before[start:]) and not torch.equal(after[:start], before[:start])


def test_a_run_whose_teacher_follows_the_student(tiny_pair: Any, train: Path, tmp_path: Path) -> None:
    changes = {
        "algorithm.distill.objective": "exact",
        "++algorithm.distill.teachers.slow": "{ema: 0.5, sources: [sums]}",
    }
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_in_process(settings(tiny_pair, train, whole, **changes))
    for batch in (3, 4, None):
        run_in_process(settings(tiny_pair, train, stopped, **changes), dies_in_batch=batch)
    expected = logged(whole)
    assert logged(stopped) == expected
    assert expected[0]["distill/sums/reverse_kl"] != expected[-1]["distill/sums/reverse_kl"]
    assert all("distill_teacher/slow/teacher_canary" not in step for step in expected)


@pytest.mark.parametrize(("key", "value"), [("n_gpus_per_node", 2), ("max_staleness", 1)])
def test_a_run_in_one_process_has_one_rank_that_takes_turns_with_its_engine(
    tiny_pair: Any, train: Path, tmp_path: Path, key: str, value: int
) -> None:
    with pytest.raises(ValueError, match=rf"trainer\.{key}={value}"):
        run_in_process(settings(tiny_pair, train, tmp_path / "run", **{f"trainer.{key}": value}))


def test_a_run_that_steers_its_mixture(tiny_pair: Any, train: Path, tmp_path: Path) -> None:
    """It goes on from shares that validations have moved, and is killed again in the next validation."""
    changes = {"data.val_files": train, "++data.source_weights": "{letters: 0.25, sums: 0.75}"}
    changes |= {"trainer.keep": "val/letters/reverse_kl <= 0.5 of step 0", "trainer.val_before_train": True}
    changes["trainer.test_freq"] = 2
    whole, stopped = (settings(tiny_pair, train, tmp_path / name, **changes) for name in ("a", "b"))
    run_in_process(whole)
    for batch in (6, 3, None):  # validations are batches too
        run_in_process(stopped, dies_in_batch=batch)
    expected = logged(tmp_path / "a", first=0)
    assert logged(tmp_path / "b", first=0) == expected
    assert [step["distill/letters/num_sequences"] for step in expected[1:]] == [1, 1, 3, 3, 3]
