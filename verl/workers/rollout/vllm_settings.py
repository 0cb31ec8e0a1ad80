"""From the typed rollout config to vLLM's environment, engine options and sampling parameters.

In:  RolloutConfig, HFModelConfig, ModelInfo, the device. Out: environment variables of the replica's process, keyword
arguments of vLLM's ``AsyncEngineArgs``, the ``SamplingParams`` of a request; the command line of a teacher's server.
Nothing is started.

On CPU the engine runs eagerly, in the replica's own process (``InProcessEngine``), with threads that sleep while they
wait: they take turns on the cores with the training ranks. What the user set in the environment stays.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from verl.config import ActorRolloutRefConfig, HFModelConfig, RefConfig, RolloutConfig, TeacherConfig
from verl.utils.device import dtype_name, resolve_dtype
from verl.workers.rollout.replica import ModelInfo, SamplingOptions

logger = logging.getLogger(__name__)

ROLLOUT_KEY = "actor_rollout_ref.rollout"
SEED, PLACE, FIRST_STOP, END = "verl_seed", "verl_place", "verl_stop_from_id", "verl_end_id"
"""Entries of a request's ``extra_args``: its seed, `SamplingOptions.place`, `stop_from_id`, a token that ends it."""
RETIRED_OPTIONS = frozenset({"swap_space", "disable_mm_preprocessor_cache"})
"""Engine options that launch lines for verl name, and that no vLLM from 0.24 on has."""


def runs_in_process(config: RolloutConfig, device: str) -> bool:
    """Whether the engine runs in the replica's process: on CPU, where processes of its own cost half a minute each."""
    return device == "cpu" and config.tensor_model_parallel_size == 1


def engine_environment(config: RolloutConfig, device: str) -> dict[str, str]:
    """Environment variables that vLLM and torch read, each for the user to override by setting it."""
    environment = {
        # At WARNING, vLLM comments on settings made here on purpose, and on tied heads at each weight sync.
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        # The V2 runner takes logits processors of another interface, from 0.32 on alone.
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if runs_in_process(config, device) else "1",
    }
    if device == "cuda":
        # IPC handles of weights travel pickled, from the training ranks to this replica's own workers.
        return environment | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    return environment | {
        # One small function of the sampler would otherwise cost a C++ compilation of 20 s at the first token.
        "TORCH_COMPILE_DISABLE": "1",
        "OMP_NUM_THREADS": str(engine_threads(config)),
        # vLLM would pin its threads to cores that the training ranks use too.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }


def engine_threads(config: RolloutConfig) -> int:
    """Threads of one engine process on CPU: the machine's cores, divided by its engines and their parallel processes.

    Without ``trainer.max_staleness`` ranks wait while engines generate, and engines while ranks train. Ray gives actors
    without CPUs of their own ``OMP_NUM_THREADS=1``; any larger value there is the user's and stays.
    """
    threads = int(os.environ.get("OMP_NUM_THREADS", "1").split(",")[0])
    cores = len(os.sched_getaffinity(0))
    return threads if threads > 1 else max(1, cores // (config.cpu_engines * config.tensor_model_parallel_size))


def engine_arguments(
    config: RolloutConfig, model_config: HFModelConfig, info: ModelInfo, replica_rank: int, device: str
) -> dict[str, Any]:
    """Keyword arguments of ``AsyncEngineArgs``; ``engine_kwargs.vllm`` comes last and wins."""
    arguments: dict[str, Any] = {
        "model": model_config.path,
        "trust_remote_code": model_config.trust_remote_code,
        "hf_overrides": model_config.config_entries,
        # The engine sees no text, and every request names its end tokens.
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
        "worker_extension_cls": "verl.workers.rollout.vllm_worker.WorkerExtension",
        # The distribution that tokens are drawn from: after temperature, top-p and top-k.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    processors = ["SeededDraws"]
    if info.vocab_size < info.vocab_rows:
        processors.append("VocabularyLimit")
    if config.stop_at_extended_token and config.extend_start is not None:
        processors.append("EndAfterExtended")
    processors = [f"verl.workers.rollout.vllm_worker:{name}" for name in processors]
    arguments["additional_config"] = {"verl_vocab_size": info.vocab_size}
    if device == "cuda":
        arguments["gpu_memory_utilization"] = config.gpu_memory_utilization
        arguments["enforce_eager"] = config.enforce_eager
        arguments["enable_sleep_mode"] = config.free_cache_engine
    else:
        arguments["kv_cache_memory_bytes"] = int(config.cpu_kvcache_space_gb * 2**30)
        arguments["enforce_eager"] = True
    own = {name: value for name, value in config.engine_kwargs.get("vllm", {}).items() if value is not None}
    for name in RETIRED_OPTIONS & own.keys():
        logger.warning("%s.engine_kwargs.vllm.%s has no effect: vLLM dropped this option", ROLLOUT_KEY, name)
        del own[name]
    own["logits_processors"] = [*processors, *own.get("logits_processors", ())]
    return arguments | own


def vllm_sampling_params(options: SamplingOptions) -> Any:
    """A request's sampling parameters as vLLM's ``SamplingParams``."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    # For `EndAfterExtended`: in a list of thousands of stop tokens vLLM would look at each for every token.
    first, ends = options.stop_from_id, options.stop_token_ids
    extra = {FIRST_STOP: first, END: min(ends)} if first is not None and ends else {}
    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_tokens=options.max_tokens,
        # 0: the log-prob of the sampled token alone.
        logprobs=options.top_logprobs if options.logprobs or options.top_logprobs else None,
        # The explicit list replaces vLLM's own choice of end tokens.
        ignore_eos=True,
        stop_token_ids=sorted(options.stop_token_ids),
        allowed_token_ids=None if options.allowed_token_ids is None else list(options.allowed_token_ids),
        detokenize=False,
        # Not as vLLM's seed: see `SeededDraws`.
        extra_args=extra | {SEED: (options.seed or 0) % 2**64, PLACE: options.place},
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def server_options(
    config: ActorRolloutRefConfig, teacher: RefConfig | TeacherConfig, limits: Mapping[str, int], device: str
) -> dict[str, Any]:
    """Options of a server of a teacher; ``engine_kwargs`` comes last and wins.

    Args:
        limits: what the run's rows need, as options.
    """
    model = teacher.model if isinstance(teacher, RefConfig) else teacher
    options: dict[str, Any] = {
        "model": model.path or config.model.path,
        "tokenizer": getattr(model, "tokenizer_path", None),
        "trust_remote_code": config.model.trust_remote_code,
        "hf_overrides": config.model.config_entries or None,
        "dtype": dtype_name(resolve_dtype(config.ref.fsdp_config.mixed_precision.param_dtype, device)),
        **limits,
        "generation_config": "vllm",
        "disable_log_stats": True,
        "disable_uvicorn_access_log": True,
        "uvicorn_log_level": "warning",
    }
    if device == "cpu":
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": int(config.rollout.cpu_kvcache_space_gb * 2**30)}
    return options | dict(teacher.engine_kwargs)


def command_line(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line: True and False are switches, null is left out."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            listed = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, Mapping) else value]
            words += [f"--{flag}", *map(str, listed)]
    return words
