"""The kill run in its short form, and what it takes for a fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import kill_run
from support.tiny_pairs import REPO


def finished_run(folder: Path, divergence: float, head: float = 0.0) -> Path:
    """What a run of one step leaves for the comparison."""
    last = folder / "global_step_1" / "actor" / "huggingface"
    last.mkdir(parents=True)
    save_file({"head": torch.arange(3.0) + head}, last / "model.safetensors")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "data": {"distill/reverse_kl": divergence}}))
    return folder


def test_a_metric_and_a_weight_are_mismatches(tmp_path: Path) -> None:
    whole = finished_run(tmp_path / "whole", 0.5)
    assert kill_run.mismatches(whole, finished_run(tmp_path / "same", 0.5), 1) == []
    assert kill_run.mismatches(whole, finished_run(tmp_path / "other", 0.50001, head=1e-5), 1) == [
        "step 1, distill/reverse_kl",
        "weights of head",
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kills", "options"), [(3, []), (2, ["--overlap"])])
def test_kills_cost_steps_and_nothing_else(tmp_path: Path, kills: int, options: list[str]) -> None:
    """KILL_RUN_ENGINE=vllm does it with vLLM."""
    engine = os.environ.get("KILL_RUN_ENGINE", "hf")
    command = [sys.executable, "-m", "support.kill_run", "--kills", str(kills), "--steps", "6", "--engine", engine]
    done = subprocess.run(
        [*command, *options, "--folder", str(tmp_path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert sum(report["kills_of"].values()) == kills and set(report["kills_of"].values()) == {1}
    assert report["in_save"] >= 1
    assert report["resumes"] >= 1
    assert {report[kind] for kind in kill_run.FAULTS} == {0}
    find_damage(tmp_path / "killed")


def find_damage(root: Path) -> None:
    """The kill run's look at checkpoints sees what sizes do not show."""
    assert kill_run.unreadable(root) == []
    [shard, *_] = sorted((root / "global_step_6").glob("actor/shards/*.safetensors"))
    shard.write_bytes(b"\0" * shard.stat().st_size)
    [fault] = kill_run.unreadable(root)
    assert fault.startswith("global_step_6: ")
