"""From the typed rollout config to vLLM's environment and engine options.

In:  RolloutConfig, HFModelConfig, the model's facts, the device. Out: environment variables of the replica's process,
and the keyword arguments of vLLM's ``AsyncEngineArgs``. Nothing is started, and vLLM is not imported.

On CPU the engine runs eagerly, in the replica's own process (``vllm_in_process``), with threads that sleep while they
wait: they share the cores with the training ranks. What the user set in the environment stays.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from verl.config import HFModelConfig, RolloutConfig
from verl.utils.device import dtype_name, resolve_dtype
from verl.workers.rollout.model_facts import ModelFacts

logger = logging.getLogger(__name__)

ROLLOUT_KEY = "actor_rollout_ref.rollout"
TRAINING_ONLY_OVERRIDES = ("attn_implementation",)
"""Entries of ``model.override_config`` that mean nothing to vLLM."""
RETIRED_OPTIONS = frozenset({"swap_space", "disable_mm_preprocessor_cache"})
"""Engine options that launch lines for verl name, and that no vLLM from 0.24 on has."""


def runs_in_process(config: RolloutConfig, device: str) -> bool:
    """Whether the engine runs in the replica's process: on CPU, where processes of its own cost half a minute each."""
    return device == "cpu" and config.tensor_model_parallel_size == 1


def engine_environment(config: RolloutConfig, device: str, error_log: Path) -> dict[str, str]:
    """Environment variables that vLLM and torch read, each for the user to override by setting it.

    Args:
        error_log: file to which the engine's own processes append their errors; see ``vllm_failure``.
    """
    environment = {
        # At WARNING, vLLM remarks on every setting made here on purpose, and at each weight sync on tied heads.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The V2 runner takes logits processors of another interface, from 0.32 on alone.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if runs_in_process(config, device) else "1",
    }
    if not runs_in_process(config, device):
        logging_config = error_log.with_name("logging.json")
        logging_config.write_text(json.dumps(_logging_config(error_log)), encoding="utf-8")
        environment["VLLM_LOGGING_CONFIG_PATH"] = str(logging_config)
    if device == "cuda":
        # IPC handles of weights travel pickled, from the training ranks to this replica's own workers.
        return environment | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    return environment | {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # One small function of the sampler would otherwise cost a C++ compilation of 20 s at the first token.
        "TORCH_COMPILE_DISABLE": "1",
        # Threads that spin while they wait make a busy machine ten times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(engine_threads(config)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def engine_threads(config: RolloutConfig) -> int:
    """Threads of one engine process on CPU: half of the cores, shared by the tensor-parallel ranks.

    Ray gives actors without CPUs of their own ``OMP_NUM_THREADS=1``; any larger value there is the user's and stays.
    """
    asked = int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0])
    cores = len(os.sched_getaffinity(0))
    return asked if asked > 1 else max(1, cores // 2 // config.tensor_model_parallel_size)


def _logging_config(error_log: Path) -> dict[str, Any]:
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(asctime)s %(processName)s %(name)s: %(message)s"}},
        "handlers": {
            "console": {"class": "logging.StreamHandler", "formatter": "plain"},
            "errors": {
                "class": "logging.FileHandler",
                "formatter": "plain",
                "level": "ERROR",
                "filename": str(error_log),
                "delay": True,
            },
        },
        "loggers": {
            "vllm": {
                "handlers": ["console", "errors"],
                "level": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
                "propagate": False,
            }
        },
    }


def engine_arguments(
    config: RolloutConfig, model_config: HFModelConfig, facts: ModelFacts, replica_rank: int, device: str
) -> dict[str, Any]:
    """Keyword arguments of ``AsyncEngineArgs``; ``engine_kwargs.vllm`` comes last and wins."""
    overrides = {k: v for k, v in model_config.override_config.items() if k not in TRAINING_ONLY_OVERRIDES}
    arguments: dict[str, Any] = {
        "model": model_config.path,
        "trust_remote_code": model_config.trust_remote_code,
        "hf_overrides": overrides,
        # Text never passes through the engine, and end tokens are named with every request.
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "dtype": dtype_name(resolve_dtype(config.dtype, device)),
        "seed": config.seed + replica_rank,
        "max_model_len": config.max_model_len or config.prompt_length + config.response_length,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": config.enable_prefix_caching,
        "enable_chunked_prefill": config.enable_chunked_prefill,
        "tensor_parallel_size": config.tensor_model_parallel_size,
        # Not left to vLLM, which inside a Ray actor would start Ray workers.
        "distributed_executor_backend": "mp" if config.tensor_model_parallel_size > 1 else "uni",
        # The distribution that tokens are drawn from: after temperature, top-p and top-k.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if facts.vocab_size < facts.vocab_rows:
        arguments["logits_processors"] = ["verl.workers.rollout.vllm_sampling:VocabularyLimit"]
        arguments["additional_config"] = {"verl_vocab_size": facts.vocab_size}
    if device == "cuda":
        arguments |= {
            "gpu_memory_utilization": config.gpu_memory_utilization,
            "enforce_eager": config.enforce_eager,
            "enable_sleep_mode": config.free_cache_engine,
            "worker_extension_cls": "verl.workers.rollout.vllm_worker.WorkerExtension",
        }
    else:
        arguments |= {
            "kv_cache_memory_bytes": int(config.cpu_kvcache_space_gb * 2**30),
            "enforce_eager": True,
            "worker_extension_cls": "verl.weight_sync.vllm_transfer.SharedMemoryWorkerExtension",
        }
    return arguments | _own_options(config)


def _own_options(config: RolloutConfig) -> dict[str, Any]:
    """``engine_kwargs.vllm`` without what is null (vLLM's default) and without options that vLLM has no more."""
    options = {name: value for name, value in config.engine_kwargs.get("vllm", {}).items() if value is not None}
    for name in RETIRED_OPTIONS & options.keys():
        del options[name]
        logger.warning("%s.engine_kwargs.vllm.%s has no effect: vLLM dropped this option", ROLLOUT_KEY, name)
    return options
