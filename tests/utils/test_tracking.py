"""Where metrics arrive: console, file, TensorBoard, Weights & Biases (offline)."""

import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import wandb
from support.file_faults import full_disk
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from verl.config import PPOConfig
from verl.utils.tracking import LoggerError, Tracking

METRICS = {
    "actor/distill_loss": -0.123456,
    "distill/reverse_kl": torch.tensor(0.5),
    "distill/extend_seq_ratio": np.float32(0.25),
    "timing_s/step": 3.14159,
    "perf/throughput": 1000,
}
LINE = (
    "step 3 | distill/reverse_kl 0.5 | actor/distill_loss -0.1235 | distill/extend_seq_ratio 0.25"
    " | timing_s/step 3.142\n"
)


def track(folder: Path, *places: str) -> Tracking:
    return Tracking("project", "run", list(places), local_dir=folder)


def test_console_writes_one_line_of_main_metrics_beside_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    tracking = Tracking("project", "run")
    with tqdm(total=2, desc="train", file=sys.stderr) as progress:
        progress.update()
        tracking.log(METRICS, step=3)
        tracking.log({"own/metric": 2, "own/other": 0.001}, step=4)
    assert capsys.readouterr().out == LINE + "step 4 | own/metric 2 | own/other 0.001\n"


def test_file_has_a_line_a_step_at_once_and_continues_after_a_restart(tmp_path: Path) -> None:
    for step in (1, 2):
        tracking = track(tmp_path / "run", "file")
        tracking.log({"a/loss": np.float64(0.5), "a/count": torch.tensor(2), "a/norm": float("nan")}, step)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == step, "on disk before the run ends"
        tracking.finish()
        tracking.finish()
    assert lines[0] == '{"step": 1, "data": {"a/loss": 0.5, "a/count": 2, "a/norm": null}}'


def recorded_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_steps_that_are_taken_again_are_recorded_once(tmp_path: Path) -> None:
    path, void = tmp_path / "metrics.jsonl", tmp_path / "metrics_void.jsonl"
    for start, resumed_from, steps, lines_void in ((1, None, [1, 2, 3, 4], 0), (3, 2, [1, 2, 3], 3), (0, None, [0], 6)):
        run = track(tmp_path, "console", "file")
        run.truncate_after(resumed_from)
        for step in range(start, steps[-1] + 1):
            run.log({"loss": start * 10.0}, step)
        run.finish()
        assert recorded_steps(path) == steps
        assert json.loads(path.read_text().splitlines()[-1])["data"] == {"loss": start * 10.0}
        assert (void.read_text().count("\n") if void.exists() else 0) == lines_void
        if start == 1:
            with open(path, "a") as stream:
                stream.write('{"step": 5, "da')  # killed while it wrote
    assert '"step": 5, "da' in void.read_text()


def test_metrics_that_a_kill_left_unrecorded_come_from_the_checkpoint_once(tmp_path: Path) -> None:
    killed = track(tmp_path, "file")
    killed.log({"loss": 1.0}, 1)
    killed.log({"val/reward": 0.5}, 2)  # a validation alone, which is not its step's line
    killed.finish()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 2, "da')
    for _ in range(2):
        resumed = track(tmp_path, "file")
        resumed.truncate_after(2, {"loss": 2.0, "norm": float("nan")})
        resumed.finish()
    lines = [json.loads(line)["data"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"loss": 1.0}, {"val/reward": 0.5}, {"loss": 2.0, "norm": None}]


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracking = track(tmp_path, "file")
    tracking.log({"loss": 1.0}, 1)
    with full_disk(50):
        tracking.log({f"loss/{number}": 2.0 for number in range(900)}, 2)  # more than a text stream's buffer
        tracking.log({"loss": 3.0}, 3)
    assert "step 2 is not yet in" in caplog.text
    tracking.log({"loss": 4.0}, 4)
    tracking.finish()
    assert recorded_steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


TENSORBOARD = [
    (1, None, [(1, 1.0), (2, 8.0), (3, 8.0)]),
    (2, None, [(1, 1.0), (2, 1.0), (3, 8.0)]),
    (2, {"loss": 2.5}, [(1, 1.0), (2, 2.5), (3, 8.0)]),
]


@pytest.mark.parametrize(("resumed_from", "metrics", "expected"), TENSORBOARD)
def test_tensorboard_skips_steps_that_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed_from: int, metrics: dict | None, expected: list
) -> None:
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    first = track(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        first.log({"loss": 1.0}, step)
    first.finish()
    later = time.time() + 10
    monkeypatch.setattr(time, "time", lambda: later)  # event files are ordered by the second of their creation
    second = track(tmp_path, "tensorboard")
    second.truncate_after(resumed_from, metrics)
    for step in range(resumed_from + 1, 4):
        second.log({"loss": 8.0}, step)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected, "before the run ends"
    second.finish()


def test_a_step_that_tensorboard_cannot_write_is_lost_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path))
    tracking = track(tmp_path, "tensorboard")
    with monkeypatch.context() as full:
        full.setattr("torch.utils.tensorboard.SummaryWriter.flush", Mock(side_effect=OSError("No space left")))
        tracking.log({"loss": 1.0}, 1)
    assert "step 1 is not in TensorBoard: No space left" in caplog.text
    tracking.log({"loss": 2.0}, 2)
    tracking.finish()
    files = [EventAccumulator(str(path)).Reload() for path in tmp_path.glob("events*")]
    assert len(files) == 2 and max(file.Scalars("loss")[0].step for file in files if file.Tags()["scalars"]) == 2


ANSWERS = [
    {"uid": "val-0", "input": "1 + 1?", "output": "<b>2\n# two", "score": 1.0, "html": "<p>&lt;b&gt;2</p>"},
    {"uid": "val-1", "input": "2 + 2?", "output": "5", "html": "<p>5</p>"},
]


def test_tensorboard_shows_answers_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    tracking = track(tmp_path, "console", "file", "tensorboard")
    tracking.log_answers(ANSWERS, 4)
    tracking.finish()
    [event] = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Tensors("val/generations/text_summary")
    text = event.tensor_proto.string_val[0].decode()
    assert event.step == 4
    assert text == "    score 1.0\n    1 + 1?<b>2\n    # two\n\n---\n\n    score None\n    2 + 2?5"


def test_a_wandb_run_that_cannot_start_is_one_line_with_a_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: Any) -> None:
        raise wandb.errors.CommError("timed out\nConsider a longer time")

    monkeypatch.setattr(wandb, "init", init)
    tracking = track(tmp_path, "wandb")
    with pytest.raises(LoggerError, match=r"^trainer\.logger has wandb, .*: timed out Consider .*; run wandb login"):
        tracking.truncate_after(None)


def test_wandb_continues_the_run_of_its_folder_and_records_metrics_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "DISABLE_GIT": "true", "DISABLE_CODE": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 8 + "f0e1d2c3" * 4)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.delenv("WANDB_DIR", raising=False)
    config = PPOConfig()
    config.ray_kwargs.ray_init = {"runtime_env": {"env_vars": {"WANDB_API_KEY": "b" * 8 + "f0e1d2c3" * 4}}}
    recordings: list[Path] = []
    # A run, its resumption, a new run in the same folder, and a validation, which continues no run.
    for resumes, step in ((None, 1), (1, 2), (None, 1), ("no run", 2)):
        tracking = Tracking("project", "run", ["wandb"], config=config, local_dir=tmp_path)
        if resumes != "no run":
            tracking.truncate_after(resumes)
        tracking.log_answers(ANSWERS, step)
        tracking.log({"distill/reverse_kl": 0.015625}, step)
        tracking.finish({"best_model": "/runs/a/best/huggingface"})
        recordings += set(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) - set(recordings)
    first, resumed, second, other = (path.stem for path in recordings)
    assert first == resumed and len({first, second, other}) == 3
    assert second == f"run-{(tmp_path / 'wandb_run_id').read_text().strip()}"
    deadline = time.monotonic() + 30  # wandb's service writes the last records a moment after ``finish``
    awaited = (b"0.015625", b"best_model", b"/runs/a/best/huggingface", b"val/generations")
    while not all(part in path.read_bytes() for path in recordings for part in awaited):
        assert time.monotonic() < deadline, "metric, summary or answers are not recorded"
        time.sleep(0.05)
    [table] = recordings[0].parent.glob("files/media/table/val/*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["step", "input", "output", "score"]
    assert [(row[0], row[1], row[3]) for row in content["data"]] == [(1, "1 + 1?", 1.0), (1, "2 + 2?", None)]
    kept = {path.read_text() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert kept >= {answer["html"] for answer in ANSWERS}, "for the upload of the table's artifact"
    assert b"prompt_key" in recordings[0].read_bytes(), "settings whose names resemble secrets stay"
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"f0e1d2c3" not in path.read_bytes(), f"the key is in {path.name}"


def test_unusable_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the metric 'a/list' is"):
        track(tmp_path, "file").log({"a/list": [1.0, 2.0]}, step=1)
