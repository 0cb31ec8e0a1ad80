"""vLLM's options from the rollout config, and the cause in a dead engine's log. vLLM is not imported."""

from itertools import pairwise
from typing import Any

import pytest

from verl.config import ActorRolloutRefConfig, HFModelConfig, RefConfig, RolloutConfig, TeacherConfig
from verl.workers.rollout.replica import ModelInfo
from verl.workers.rollout.vllm_replica import LOGGED_EXCEPTION
from verl.workers.rollout.vllm_settings import command_line, engine_arguments, engine_threads, server_options

MODEL = HFModelConfig(path="model", override_config={"attn_implementation": "eager", "rope_theta": 5.0})


def arguments(device: str, vocab_size: int = 90, **options: Any) -> dict[str, Any]:
    info = ModelInfo(vocab_size, 100, (7,), 0, {})
    return engine_arguments(RolloutConfig(prompt_length=20, response_length=10, **options), MODEL, info, 2, device)


def test_cpu_engine() -> None:
    """What ``test_engines`` cannot see of it."""
    given = arguments("cpu", seed=40, cpu_kvcache_space_gb=0.5)
    expected = {"seed": 42, "kv_cache_memory_bytes": 2**29, "hf_overrides": {"rope_theta": 5.0}}
    assert given | expected == given and "enable_sleep_mode" not in given
    [draws] = arguments("cpu", vocab_size=100)["logits_processors"]
    assert draws.endswith(":SeededDraws"), "every row has a token"


def test_cuda_engine() -> None:
    given = arguments("cuda", tensor_model_parallel_size=2, gpu_memory_utilization=0.7, free_cache_engine=False)
    expected = {
        "dtype": "bfloat16",
        "enforce_eager": False,
        "gpu_memory_utilization": 0.7,
        "enable_sleep_mode": False,
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    assert given | expected == given


def test_options_of_vllm_win_null_is_its_default_and_a_dropped_one_gets_a_notice(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = {"block_size": 32, "seed": 1, "swap_space": 8, "quantization": None, "logits_processors": ["mine:Mine"]}
    given = arguments("cpu", engine_kwargs={"vllm": own, "sglang": {"x": 1}})
    processors = [name.rpartition(":")[2] for name in given["logits_processors"]]
    assert processors == ["SeededDraws", "VocabularyLimit", "Mine"]
    assert (given["block_size"], given["seed"]) == (32, 1)
    assert not {"x", "swap_space", "quantization"} & given.keys()
    assert "engine_kwargs.vllm.swap_space has no effect" in caplog.text


@pytest.mark.parametrize(
    ("omp", "cores", "engines", "ranks", "threads"),
    [("1", 2, 1, 1, 2), ("1", 16, 1, 4, 4), ("1", 16, 2, 2, 4), ("1", 2, 2, 4, 1), ("3", 16, 1, 1, 3)],
)
def test_threads(monkeypatch: pytest.MonkeyPatch, omp: str, cores: int, engines: int, ranks: int, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", omp)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    assert engine_threads(RolloutConfig(cpu_engines=engines, tensor_model_parallel_size=ranks)) == threads


LOG = """\
(Worker_TP0 pid=12) ERROR 11-22 10:00:00 [multiproc_executor.py:750] Traceback (most recent call last):
(Worker_TP0 pid=12) ERROR 11-22 10:00:00 [multiproc_executor.py:750]   raise torch.OutOfMemoryError("CUDA")
(Worker_TP0 pid=12) ERROR 11-22 10:00:00 [multiproc_executor.py:750] torch.OutOfMemoryError: CUDA out of memory
ValueError: of somebody else
(EngineCore pid=10) ERROR 11-22 10:00:01 [core.py:867] RuntimeError: Worker failed
"""


def test_exceptions_are_found_in_what_vllm_logs() -> None:
    found = [match[1] for line in LOG.splitlines() if (match := LOGGED_EXCEPTION.match(line))]
    assert found == ["torch.OutOfMemoryError: CUDA out of memory", "RuntimeError: Worker failed"]


def test_a_teachers_server() -> None:
    """Its own options come last; a teacher without a path is the student."""
    config = ActorRolloutRefConfig(model=MODEL)
    own = {"quantization": "fp8", "max_model_len": None, "enforce_eager": False, "hf_overrides": {"rope_theta": 5}}
    limits = {"max_logprobs": 8, "max_model_len": 31}
    ref = RefConfig(model={"path": "teacher", "tokenizer_path": "ids"}, engine="vllm", engine_kwargs=own)
    words = command_line(server_options(config, ref, limits, "cpu"))
    pairs = dict(pairwise(words))
    assert (pairs["--model"], pairs["--tokenizer"], pairs["--dtype"]) == ("teacher", "ids", "float32")
    assert (pairs["--max-logprobs"], pairs["--quantization"]) == ("8", "fp8") and "--max-model-len" not in words
    assert pairs["--hf-overrides"] == '{"rope_theta": 5}'
    assert "--no-enforce-eager" in words and "--enforce-eager" not in words
    words = command_line(server_options(config, TeacherConfig(engine="vllm"), limits, "cuda"))
    assert dict(pairwise(words))["--hf-overrides"] == '{"rope_theta": 5.0}', "as the models of the run have it"
    assert words[:2] == ["--model", "model"] and "--tokenizer" not in words and "--kv-cache-memory-bytes" not in words
