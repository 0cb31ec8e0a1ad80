"""The kill run in its short form, and what it takes for a fault."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import kill_run
from support.launch import Run
from support.tiny_pairs import REPO


def test_every_victim_has_its_turn_and_saves_are_among_the_moments() -> None:
    plan = kill_run.plan_kills(20, 30, random.Random(0))
    victims = [kill.victim for kill in plan]
    assert sorted(map(victims.count, kill_run.VICTIMS)) == [6, 7, 7]
    assert {kill.moment for kill in plan} == {"start", "step", "save"}
    assert [kill.after_step for kill in plan] == [(k + 1) * 30 // 21 for k in range(20)]
    assert sorted(kill.victim for kill in kill_run.plan_kills(3, 6, random.Random(5))) == sorted(kill_run.VICTIMS)


def fake_run(folder: Path, steps: int) -> Run:
    """What a run of so many steps leaves for the comparison."""
    last = folder / f"global_step_{steps}" / "actor" / "huggingface"
    last.mkdir(parents=True)
    save_file({"head": torch.arange(3.0)}, last / "model.safetensors")
    data = {"actor/lr": 0.1, "distill/reverse_kl": 0.5, "timing_s/step": folder.stat().st_ino}
    lines = [json.dumps({"step": step, "data": data}) + "\n" for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return Run(folder, "", 0)


def test_a_figure_a_missing_step_and_a_weight_are_mismatches(tmp_path: Path) -> None:
    whole, resumed = fake_run(tmp_path / "whole", 3), fake_run(tmp_path / "resumed", 3)
    assert kill_run.mismatches(whole, resumed, 3) == []
    path = resumed.folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1].replace("0.5", "0.50001"), lines[2]]))
    assert kill_run.mismatches(whole, resumed, 3) == ["step 2, distill/reverse_kl: 0.5 and 0.50001"]
    noise = lines[1].replace("distill/reverse_kl", "training/rollout_log_probs_diff_max")
    (whole.folder / "metrics.jsonl").write_text("".join([lines[0], noise, lines[2]]))
    path.write_text("".join([lines[0], noise.replace("0.5", "0.50001"), lines[2]]))
    assert kill_run.mismatches(whole, resumed, 3) == [], "rounding is held to 1e-4"
    path.write_text("".join([lines[0], noise.replace("0.5", "0.5002"), lines[2]]))
    assert len(kill_run.mismatches(whole, resumed, 3)) == 1
    (whole.folder / "metrics.jsonl").write_text("".join(lines))
    path.write_text("".join([lines[0], lines[2].replace('"actor/lr": 0.1', '"actor/lr": NaN')]))
    wrong = kill_run.mismatches(whole, resumed, 3)
    assert wrong[0] == "metrics.jsonl has not every step once"
    assert "step 2, actor/lr: 0.1 and None" in wrong and "step 3, actor/lr: 0.1 and nan" in wrong
    path.write_text("".join(lines))
    weights = resumed.folder / "global_step_3/actor/huggingface/model.safetensors"
    save_file({"head": load_file(weights)["head"] + 1e-5}, weights)
    assert kill_run.mismatches(whole, resumed, 3) == ["weights of head"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_three_kills_cost_steps_and_nothing_else(tmp_path: Path) -> None:
    """KILL_RUN_ENGINE=vllm does it with vLLM."""
    engine = os.environ.get("KILL_RUN_ENGINE", "hf")
    command = [sys.executable, "-m", "support.kill_run", "--kills", "3", "--steps", "6", "--engine", engine]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": f"{REPO}:{REPO / 'tests'}"},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills_of"] == {"driver": 1, "rank": 1, "engine": 1}
    assert report["in_save"] >= 1
    assert report["resumes"] >= 1
    assert {report[kind] for kind in kill_run.FAULTS} == {0}
    assert report["slowest_end_s"] < 30
    find_damage(tmp_path / "killed")


def find_damage(root: Path) -> None:
    """The kill run's look at checkpoints sees what sizes do not show."""
    assert kill_run.unreadable(root) == []
    [shard, *_] = sorted((root / "global_step_6").rglob("*.distcp"))
    whole = shard.read_bytes()
    shard.write_bytes(b"\0" * len(whole))
    [fault] = kill_run.unreadable(root)
    assert fault.startswith("global_step_6: ")
    shard.write_bytes(whole[:-1])
    assert any("bytes" in fault for fault in kill_run.unreadable(root))
    shutil.rmtree(root)
