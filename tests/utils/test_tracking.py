"""Where metrics arrive: console, file, TensorBoard, Weights & Biases (offline)."""

import json
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.file_faults import disk_full_text
from tqdm import tqdm
from wandb.proto import wandb_internal_pb2

from verl.config import PPOConfig
from verl.utils.tracking import Tracking

FIGURES = {
    "actor/pg_loss": -0.123456,
    "distill/reverse_kl": torch.tensor(0.5),
    "distill/extend_seq_ratio": np.float32(0.25),
    "response_length/mean": 61.0,
    "timing_s/step": 3.14159,
    "perf/throughput": 1000,
}
LINE = (
    "step 3 | distill/reverse_kl 0.5 | actor/pg_loss -0.1235 | response_length/mean 61 "
    "| distill/extend_seq_ratio 0.25 | timing_s/step 3.142\n"
)


def test_console_writes_one_line_of_main_figures(capsys: pytest.CaptureFixture[str]) -> None:
    tracking = Tracking("project", "run", "console")
    tracking.log(FIGURES, step=3)
    tracking.log({"own/metric": 2, "own/other": 0.001}, step=4)
    tracking.finish()
    assert capsys.readouterr().out == LINE + "step 4 | own/metric 2 | own/other 0.001\n"


def test_console_lives_with_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    tracking = Tracking("project", "run")
    with tqdm(total=2, desc="train", file=sys.stderr) as progress:
        progress.update()
        tracking.log(FIGURES, step=3)
    out, err = capsys.readouterr()
    assert out == LINE, "the line is whole and the bar is not in it"
    assert "train" in err


def test_file_has_a_line_a_step_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    for step in (1, 2):
        tracking = Tracking("project", "run", ["file"], local_dir=tmp_path / "run")
        tracking.log({"a/loss": np.float64(0.5), "a/count": torch.tensor(2), "a/norm": float("nan")}, step)
        # On disk before the run ends: a run that dies keeps what it logged.
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert len(text.splitlines()) == step
        tracking.finish()
        tracking.finish()
    assert text.splitlines()[0] == '{"step": 1, "data": {"a/loss": 0.5, "a/count": 2, "a/norm": null}}'
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]


def test_tensorboard_events_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    tracking = Tracking("project", "run", ["tensorboard"], local_dir=tmp_path)
    tracking.log({"distill/reverse_kl": 0.5}, step=1)
    tracking.log({"distill/reverse_kl": 0.25, "val/reverse_kl": 0.125}, step=2)
    tracking.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("distill/reverse_kl")] == [(1, 0.5), (2, 0.25)]
    assert [(event.step, event.value) for event in events.Scalars("val/reverse_kl")] == [(2, 0.125)]


def recorded_steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_steps_that_are_taken_again_are_not_there_twice(tmp_path: Path) -> None:
    first = Tracking("project", "run", ["file"], local_dir=tmp_path)
    for step in (1, 2, 3, 4):
        first.log({"loss": float(step)}, step)
    first.finish()
    path, void = tmp_path / "metrics.jsonl", tmp_path / "metrics_void.jsonl"
    with open(path, "a") as stream:
        stream.write('{"step": 5, "da')  # killed while it wrote
    second = Tracking("project", "run", ["console", "file"], local_dir=tmp_path)
    second.truncate_after(2)
    second.log({"loss": 30.0}, 3)
    second.finish()
    assert recorded_steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["data"] == {"loss": 30.0}
    assert void.read_text().count("\n") == 3 and '"step": 5, "da' in void.read_text()

    afresh = Tracking("project", "run", ["file"], local_dir=tmp_path)
    afresh.truncate_after(None)
    afresh.log({"loss": 0.0}, 0)
    afresh.finish()
    assert recorded_steps(path) == [0]
    assert void.read_text().count("\n") == 6


def test_a_step_that_a_kill_left_unrecorded_comes_from_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for start in (1, 2, 2):
        tracking = Tracking("project", "run", ["file"], local_dir=tmp_path)
        if start == 1:
            tracking.log({"loss": 1.0}, 1)
            with open(path, "a") as stream:
                stream.write('{"step": 2, "da')  # killed while it wrote
        else:
            tracking.truncate_after(start, {"loss": 2.0, "count": 3, "norm": float("nan")})
        tracking.finish()
    assert path.read_text().splitlines()[1:] == ['{"step": 2, "data": {"loss": 2.0, "count": 3, "norm": null}}']


def test_a_full_disk_delays_lines_and_loses_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracking = Tracking("project", "run", ["file"], local_dir=tmp_path)
    tracking.log({"loss": 1.0}, 1)
    with disk_full_text(50):
        tracking.log({"loss": 2.0}, 2)
        tracking.log({"loss": 3.0}, 3)
    assert "step 2 is not yet in" in caplog.text
    tracking.log({"loss": 4.0}, 4)
    tracking.finish()
    assert recorded_steps(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_validation_alone_does_not_stand_for_its_step(tmp_path: Path) -> None:
    validation = Tracking("project", "run", ["file"], local_dir=tmp_path)
    validation.log({"val/reward": 0.5}, 2)
    validation.finish()
    for _ in range(2):
        run = Tracking("project", "run", ["file"], local_dir=tmp_path)
        run.truncate_after(2, {"loss": 2.0})
        run.finish()
    lines = [json.loads(line)["data"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"val/reward": 0.5}, {"loss": 2.0}]


def test_tensorboard_passes_over_steps_that_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    first = Tracking("project", "run", ["tensorboard"], local_dir=tmp_path)
    for step in (1, 2, 3):
        first.log({"loss": 1.0}, step)
    first.finish()
    time.sleep(1.1)  # event files are ordered by the second of their making
    second = Tracking("project", "run", ["tensorboard"], local_dir=tmp_path)
    second.truncate_after(1)
    second.log({"loss": 2.0}, 2)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0)], "before its end"
    second.finish()
    time.sleep(1.1)
    third = Tracking("project", "run", ["tensorboard"], local_dir=tmp_path)
    third.truncate_after(2, {"loss": 2.5})
    third.log({"loss": 3.0}, 3)
    third.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.5), (3, 3.0)]


def records_of(recording: Path) -> list[wandb_internal_pb2.Record]:
    """Records of an offline run: a log in LevelDB's format after a header of 7 bytes.

    In blocks of 32 KiB: checksum (4 bytes), length (2), kind (1; 1 whole, 2 first, 3 middle, 4 last piece), piece.
    """
    content, place, records, pieces = recording.read_bytes(), 7, [], b""
    while place + 7 <= len(content):
        if (left := -place % 32768) < 7:
            place += left  # no header fits the end of a block
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if place + 7 + length > len(content):
            break  # still being written
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(pieces))
            pieces = b""
    return records


def finished_records(folder: Path, limit_s: float = 30.0) -> list[wandb_internal_pb2.Record]:
    """Records of the only run below a folder; its service writes the last of them a moment after ``finish``."""
    return finished_records_of(*folder.glob("wandb/offline-run-*/run-*.wandb"), limit_s=limit_s)


def finished_records_of(recording: Path, limit_s: float = 30.0) -> list[wandb_internal_pb2.Record]:
    """Records of one recording."""
    deadline = time.monotonic() + limit_s
    while True:
        records = records_of(recording)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        assert time.monotonic() < deadline, f"{recording} has no end after {limit_s} s"
        time.sleep(0.05)


@pytest.fixture
def offline_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODE": "offline", "SILENT": "true", "DISABLE_GIT": "true", "DISABLE_CODE": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 8 + "f0e1d2c3" * 4)
    monkeypatch.delenv("WANDB_DIR", raising=False)


@pytest.mark.usefixtures("offline_wandb")
def test_a_resumed_run_goes_on_in_the_wandb_run_that_it_began(tmp_path: Path) -> None:
    recordings: list[Path] = []
    for start, resumed_from in ((1, None), (2, 1), (1, None)):
        tracking = Tracking("project", "run", ["wandb"], local_dir=tmp_path)
        tracking.truncate_after(resumed_from)
        tracking.log({"loss": 1.0}, start)
        tracking.finish()
        (new,) = set(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) - set(recordings)
        finished_records_of(new)
        recordings.append(new)
    began, went_on, afresh = (path.stem for path in recordings)
    assert began == went_on != afresh
    assert afresh == f"run-{(tmp_path / 'wandb_run_id').read_text().strip()}"
    validation = Tracking("project", "run", ["wandb"], local_dir=tmp_path)
    validation.log({"val/reverse_kl": 1.0}, 2)
    validation.finish()
    (other,) = set(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) - set(recordings)
    assert other.stem not in (began, afresh), "what continues nothing is a run of its own"


@pytest.mark.usefixtures("offline_wandb")
def test_wandb_offline_records_figures_and_no_secret(tmp_path: Path) -> None:
    config = PPOConfig()
    config.ray_kwargs.ray_init = {"runtime_env": {"env_vars": {"WANDB_API_KEY": "b" * 8 + "f0e1d2c3" * 4}}}
    tracking = Tracking("project", "run", ["wandb"], config=config, local_dir=tmp_path)
    tracking.log({"distill/reverse_kl": 0.5}, step=1)
    tracking.log({"distill/reverse_kl": 0.25}, step=2)
    tracking.finish()

    logged, settings = {}, {}
    for record in finished_records(tmp_path):
        for update in record.run.config.update:
            settings[update.key] = json.loads(update.value_json)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        if row:
            logged[row["_step"]] = row["distill/reverse_kl"]
    assert logged == {1: 0.5, 2: 0.25}
    assert settings["data"]["prompt_key"] == "prompt", "settings whose names only sound like secrets stay"
    assert settings["ray_kwargs"]["ray_init"]["runtime_env"]["env_vars"]["WANDB_API_KEY"] == "***"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert b"f0e1d2c3" not in path.read_bytes(), f"the key is in {path.name}"


def test_names_and_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"names \['swanlab'\]; choose from console, file"):
        Tracking("project", "run", ["console", "swanlab"])
    tracking = Tracking("project", "run", "file", local_dir=tmp_path)
    with pytest.raises(ValueError, match="the metric 'a/list' is"):
        tracking.log({"a/list": [1.0, 2.0]}, step=1)
    tracking.finish()


def test_a_logger_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"trainer.logger names wandb, which is not installed"):
        Tracking("project", "run", ["wandb"], local_dir=tmp_path)
