"""The vLLM rollout replica.

In:  checked requests and weight buckets (``replica``). Out: tokens with the sampler's log-probs.

Weights arrive through vLLM's weight-transfer interface: ``start_weight_update``, ``update_weights`` per bucket,
``finish_weight_update``, with the ``ipc`` engine on CUDA and our ``shm`` engine on CPU. On CUDA, and with tensor
parallelism, the engine is ``AsyncLLM`` with processes of its own; on CPU it is ``vllm_in_process``. Works with vLLM
0.24 to 0.32. What is configured how is in ``vllm_settings``.
"""

import asyncio
import base64
import dataclasses
import difflib
import importlib.util
import logging
import os
import pickle
import shutil
import signal
import tempfile
import warnings
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import RolloutReplica, SamplingOptions, TokenOutput
from verl.workers.rollout.vllm_failure import EngineProcesses, last_exception
from verl.workers.rollout.vllm_settings import (
    ROLLOUT_KEY,
    engine_arguments,
    engine_environment,
    engine_threads,
    runs_in_process,
)

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import SamplingParams

Result = TypeVar("Result")


@contextmanager
def unblock_sigterm() -> Iterator[None]:
    """What is started within the block heeds SIGTERM, by which vLLM ends its processes; Ray's are started without."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Engine(Protocol):
    """What the replica uses of ``AsyncLLM``; ``InProcessEngine`` has it too, but for sleep, which is for GPUs."""

    def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]: ...

    async def check_health(self) -> None: ...

    async def collective_rpc(self, method: str, *, kwargs: dict[str, Any] | None) -> Any: ...

    async def reset_prefix_cache(self) -> bool: ...

    async def sleep(self, level: int) -> None: ...

    async def wake_up(self, tags: list[str]) -> Any: ...

    def shutdown(self) -> None: ...


class VLLMReplica(RolloutReplica):
    """One vLLM engine over ``tensor_model_parallel_size`` GPUs, or over the CPU."""

    def __init__(
        self, config: RolloutConfig, model_config: HFModelConfig, replica_rank: int = 0, device: str = "cpu"
    ) -> None:
        super().__init__(config, model_config, replica_rank, device)
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                f"{ROLLOUT_KEY}.name=vllm, and vLLM is not installed; install it (deploy_env.sh does), or set "
                f"{ROLLOUT_KEY}.name=hf"
            )
        self._engine: Engine | None = None
        self._processes: EngineProcesses | None = None
        self._scratch: Path | None = None

    async def _launch(self) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="verl-vllm-"))
        error_log = self._scratch / "errors.log"
        environment = engine_environment(self.config, self.device, error_log)
        forced = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")
        os.environ.update({k: v for k, v in environment.items() if k in forced or k not in os.environ})
        if self.device == "cpu":
            # While it is imported, vLLM says three times over that Triton has no CPU backend.
            logging.getLogger("vllm.triton_utils").setLevel(logging.CRITICAL)
        arguments = await asyncio.to_thread(self._engine_arguments)
        self._processes = EngineProcesses(error_log)
        try:
            self._engine = await self._start_engine(arguments)
        except RuntimeError as error:
            raise RuntimeError(f"{self._name} did not start: {last_exception(error_log) or error}") from error
        self._processes.remember()
        if not runs_in_process(self.config, self.device):
            await self._rpc("exit_with_replica", {"pid": os.getpid()})
        # Nothing is agreed on beforehand by either backend, but the protocol begins with this call.
        await self._rpc("init_weight_transfer_engine", {"init_info": {}})

    def _engine_arguments(self) -> "AsyncEngineArgs":
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        arguments = engine_arguments(self.config, self.model_config, self.facts, self.replica_rank, self.device)
        known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
        for name in arguments:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=3)
                raise ValueError(
                    f"{ROLLOUT_KEY}.engine_kwargs.vllm.{name} is no option of the installed vLLM"
                    + (f"; did you mean {' or '.join(near)}?" if near else "")
                )
        backend = "ipc" if self.device == "cuda" else "shm"
        return AsyncEngineArgs(**arguments, weight_transfer_config=WeightTransferConfig(backend=backend))

    async def _start_engine(self, arguments: "AsyncEngineArgs") -> Engine:
        if runs_in_process(self.config, self.device):
            from verl.workers.rollout.vllm_in_process import InProcessEngine

            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                return cast(Engine, await InProcessEngine.start(arguments, engine_threads(self.config)))
        from vllm.v1.engine.async_llm import AsyncLLM

        with unblock_sigterm():
            return cast(Engine, AsyncLLM.from_engine_args(arguments))

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        return await self._guard(self._answer(prompt, options, request_id), "failed")

    async def _answer(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        version = self.weight_version
        request = {"type": "token", "prompt_token_ids": prompt}
        final = None
        async for output in self._running.generate(request, _sampling_params(options), request_id):
            final = output
        if final is None or not final.outputs:
            raise RuntimeError(f"vLLM returned nothing for request {request_id}")
        answer = final.outputs[0]
        token_ids = [int(token_id) for token_id in answer.token_ids]
        log_probs = None
        if options.logprobs:
            log_probs = [entry[token_id].logprob for token_id, entry in zip(token_ids, answer.logprobs, strict=True)]
        top = None
        if options.top_logprobs:
            top = [{token: told.logprob for token, told in entry.items()} for entry in answer.logprobs]
        return TokenOutput(token_ids, log_probs, answer.finish_reason, version, top)

    async def _check_engine(self) -> None:
        if self._engine is not None:
            await self._guard(self._engine.check_health(), "failed")

    async def _start_update(self) -> None:
        await self._rpc("start_weight_update")

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        bucket = dict(update_info)
        if "ipc_handles" in bucket:
            # Both vLLM 0.24 and 0.32 unpickle this form in the worker; their message format alters bare tuples.
            pickled = pickle.dumps(bucket.pop("ipc_handles"))
            bucket["ipc_handles_pickled"] = base64.b64encode(pickled).decode("ascii")
        await self._rpc("update_weights", {"update_info": bucket})

    async def _finish_update(self) -> None:
        await self._rpc("finish_weight_update")
        if self._asleep:
            await self._guard(self._running.wake_up(["kv_cache"]), "could not wake up")
        if not await self._guard(self._running.reset_prefix_cache(), "could not reset its prefix cache"):
            raise RuntimeError(f"{self._name}: the prefix cache is in use after a weight sync")

    async def _sleep(self) -> None:
        await self._guard(self._running.sleep(level=2), "could not sleep")

    async def _wake_weights(self) -> None:
        await self._guard(self._running.wake_up(["weights"]), "could not wake up")

    async def _shutdown(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def _running(self) -> Engine:
        if self._engine is None:
            raise RuntimeError(f"{self._name} is not running")
        return self._engine

    async def _rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        return await self._guard(self._running.collective_rpc(method, kwargs=kwargs), f"failed in {method}")

    async def _guard(self, call: Awaitable[Result], what: str) -> Result:
        """Await a call of the engine; where the engine died of it, say of what."""
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await call
        except VLLMValidationError as error:  # a ValueError in vLLM 0.24, not in 0.32
            raise ValueError(f"vLLM refused the request: {error}") from error
        except EngineDeadError as error:
            cause = self._processes.cause_of_death() if self._processes is not None else str(error)
            self._unusable = f"its engine is dead: {cause}"
            raise RuntimeError(f"{self._name} {what}: its engine is dead: {cause}") from error
        except EngineGenerateError as error:
            raise RuntimeError(f"{self._name} {what}: {error.__cause__!r}") from error


def _sampling_params(options: SamplingOptions) -> "SamplingParams":
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_tokens=options.max_tokens,
        seed=options.seed,
        # 0: the log-prob of the sampled token alone.
        logprobs=options.top_logprobs if options.logprobs or options.top_logprobs else None,
        # Its own notion of end tokens is replaced by the explicit list.
        ignore_eos=True,
        stop_token_ids=sorted(options.stop_token_ids),
        allowed_token_ids=None if options.allowed_token_ids is None else list(options.allowed_token_ids),
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
