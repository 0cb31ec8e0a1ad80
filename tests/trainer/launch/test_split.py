"""How to split a run's GPUs, by hand-computed numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipe.onpolicy_distill import plan as command
from verl.trainer.launch.split import ANSWERS, measure


def finished_run(
    folder: Path, steps: list[dict[str, float]], rows: int, tensor_parallel: int = 1, group: int = 1, **trainer: Any
) -> Path:
    """What a run of so many rows in a mini-batch leaves."""
    run = {"nnodes": 1, "n_gpus_per_node": 8, "rollout_nnodes": None, "rollout_n_gpus_per_node": None}
    rollout = {"n": 2, "tensor_model_parallel_size": tensor_parallel}
    models = {"actor": {"ppo_mini_batch_size": rows // 2, "ulysses_sequence_parallel_size": group}, "rollout": rollout}
    config = {"trainer": {**run, "max_staleness": 0, **trainer}, "actor_rollout_ref": models}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [json.dumps({"step": step, "data": data}) for step, data in enumerate(steps, 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


IN_TURNS = {
    "timing_s/step": 44.0,
    "timing_s/gen": 18.0,
    "timing_s/update_weights": 1.0,
    f"{ANSWERS}/max": 18.0,
    f"{ANSWERS}/mean": 12.0,
}
"""6 s of the generation's 18 are its tail; 44 - 18 - 1 = 25 s are training."""


def test_a_run_in_turns_is_split_by_what_scales_and_what_does_not(tmp_path: Path) -> None:
    start = {name: 10 * value for name, value in IN_TURNS.items()}
    measured, splits = measure(finished_run(tmp_path, [start, IN_TURNS, IN_TURNS], rows=60))
    assert measured[:4] == (18, 6, 25, 1) and measured.in_turns_s == 44
    # 12 x 8 = 96 and 25 x 8 = 200 GPU-seconds; 7 ranks would have no equal shares of 60 rows.
    assert [split.engines for split in splits] == [2, 3, 4, 5, 6, 7]
    assert splits[0] == pytest.approx((2, 6, 6 + 48, 200 / 6, 55)) and splits[1] == (3, 5, 6 + 32, 40, 41)


def test_a_run_side_by_side_tells_the_same(tmp_path: Path) -> None:
    """3 GPUs write in 38 s, for 6 of which no GPU helps, and 5 train in 40 s; 2 write in 54 s, and 6 wait for them."""
    apart = {"rollout_nnodes": 1, "max_staleness": 1}
    wrote = {f"{ANSWERS}/max": 38.0, f"{ANSWERS}/mean": 32.0}
    step = {**wrote, "timing_s/step": 41.0, "timing_s/gen": 0.0, "timing_s/update_weights": 1.0, "rollout/wait_s": 0.0}
    run = finished_run(tmp_path, [step], 60, n_gpus_per_node=5, rollout_n_gpus_per_node=3, **apart)
    measured, splits = measure(run)
    assert measured.gpus == 8 and measured.in_turns_s == pytest.approx(44)
    assert next(split for split in splits if split.engines == 4) == pytest.approx((4, 4, 30, 50, 51))
    wrote = {f"{ANSWERS}/max": 54.0, f"{ANSWERS}/mean": 48.0}
    step = {**wrote, "timing_s/step": 55.0, "timing_s/update_weights": 1 + 62 / 3, "rollout/wait_s": 62 / 3}
    run = finished_run(tmp_path, [step], 60, n_gpus_per_node=6, rollout_n_gpus_per_node=2, **apart)
    assert measure(run)[0].in_turns_s == pytest.approx(44)


def test_a_run_whose_batches_are_written_side_by_side_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path, [IN_TURNS], 60, rollout_nnodes=1, rollout_n_gpus_per_node=3, max_staleness=2)
    with pytest.raises(ValueError, match=r"trainer\.max_staleness=2 are written side by side, .* measure .* 0 or 1"):
        measure(run)


def test_several_nodes_are_split_by_nodes_and_one_by_engines(tmp_path: Path) -> None:
    _, splits = measure(finished_run(tmp_path, [IN_TURNS], rows=64, nnodes=4))
    assert [split[:2] for split in splits] == [(16, 16), (24, 8)], "64 rows do not divide over 24 ranks"
    _, splits = measure(finished_run(tmp_path, [IN_TURNS], rows=64, tensor_parallel=4))
    assert [split[:2] for split in splits] == [(4, 4)]


def test_sequence_groups_stay_whole(tmp_path: Path) -> None:
    """Of 8 GPUs, 5 hold no groups of 4; in groups of 2, 6 ranks have 3 shares, over which 64 rows do not divide."""
    _, splits = measure(finished_run(tmp_path, [IN_TURNS], rows=240, group=4))
    assert [split[:2] for split in splits] == [(4, 4)]
    _, splits = measure(finished_run(tmp_path, [IN_TURNS], rows=64, group=2))
    assert [split[:2] for split in splits] == [(4, 4), (6, 2)]
    with pytest.raises(ValueError, match=r"8 GPU\(s\) cannot be split so that 240 rows divide over groups of 8"):
        measure(finished_run(tmp_path, [IN_TURNS], rows=240, group=8))


def test_a_run_of_another_version_is_named(tmp_path: Path) -> None:
    run = finished_run(tmp_path, [IN_TURNS], rows=60)
    whole, line = yaml.safe_load((run / "config.yaml").read_text()), (run / "metrics.jsonl").read_text()
    whole["trainer"].pop("max_staleness")
    (run / "config.yaml").write_text(yaml.safe_dump(whole))
    with pytest.raises(ValueError, match=r"of another version \(KeyError: 'max_staleness'\); give the folder of a run"):
        measure(run)
    for other in ('{"step": 2}', "[1]", '{"step": 2, "data": null}'):
        (run / "metrics.jsonl").write_text(f"{line}{other}\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl or config.yaml of --run=.* is of another version"):
            measure(run)


def test_what_a_measured_run_does_not_read_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(finished_run(tmp_path, [IN_TURNS], rows=60))
    for unread in (["trainer.nosuchkey=3"], ["--card-gib", "5"]):
        with pytest.raises(SystemExit, match="2"):
            command.main(["--run", run, *unread])
        assert f"goes by that run's own settings; leave out {unread[0]}" in capsys.readouterr().err


def test_the_command_prints_a_table_and_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--run", str(finished_run(tmp_path, [IN_TURNS], rows=60))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "s, medians: generation 18.00, tail 6.00, training 25.00, sync 1.00"
    assert "               3               5           38.00           40.00           41.00" in lines
    assert lines[-2] == "in turns on all 8 GPUs: 44.00 s a step"
    best = "side by side (trainer.max_staleness=1), 3 GPUs for engines and 5 for training: 41.00 s"
    assert lines[-1] == best
    assert command.main(["--run", str(tmp_path / "none")]) == 1
    assert "needs metrics.jsonl" in capsys.readouterr().err
    assert command.main(["--run", str(finished_run(tmp_path, [IN_TURNS], rows=60, n_gpus_per_node=1))]) == 1
    assert "1 GPU(s) cannot be split" in capsys.readouterr().err
