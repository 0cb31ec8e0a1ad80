"""The vLLM rollout replica.

In:  checked requests and weight buckets (``replica``). Out: tokens with the sampler's log-probs.

Weights arrive through vLLM's weight-transfer interface: ``start_weight_update``, ``update_weights`` per bucket,
``finish_weight_update``, with vLLM's ``ipc`` engine on CUDA and ours (``weight_sync.vllm_receive``) on CPU.

On CUDA, and with tensor parallelism, vLLM is ``AsyncLLM`` with processes of its own; on CPU it runs in this process
(``vllm_engine``). Works with vLLM 0.24 to 0.32. ``vllm_settings`` has the options.
"""

import asyncio
import base64
import dataclasses
import difflib
import importlib.util
import logging
import os
import pickle
import warnings
from collections.abc import Awaitable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from verl.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.replica import RolloutReplica, SamplingOptions, TokenOutput
from verl.workers.rollout.vllm_engine import EngineProcesses, InProcessEngine, last_exception, unblock_sigterm
from verl.workers.rollout.vllm_settings import (
    ROLLOUT_KEY,
    engine_arguments,
    engine_environment,
    engine_threads,
    runs_in_process,
    vllm_sampling_params,
)

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

Result = TypeVar("Result")


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
        self._engine: Any = None
        """``AsyncLLM`` or ``InProcessEngine``."""
        self._processes: EngineProcesses | None = None
        """None: the engine runs in this process."""

    async def _launch(self) -> None:
        environment = engine_environment(self.config, self.device)
        if not runs_in_process(self.config, self.device):
            self._processes = EngineProcesses()
            environment["VLLM_LOGGING_CONFIG_PATH"] = str(self._processes.logging_config)
        forced = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")
        os.environ.update({k: v for k, v in environment.items() if k in forced or k not in os.environ})
        if self.device == "cpu":
            # On import vLLM warns three times that Triton has no CPU backend.
            logging.getLogger("vllm.triton_utils").setLevel(logging.CRITICAL)
        arguments = await asyncio.to_thread(self._engine_arguments)
        try:
            await self._start_engine(arguments)
        except RuntimeError as error:
            cause = last_exception(self._processes.error_log) if self._processes else None
            raise RuntimeError(f"{self._name} did not start: {cause or error}") from error
        # Neither backend has anything to agree on beforehand, but the protocol begins with this call.
        await self._rpc("init_weight_transfer_engine", init_info={})

    def _engine_arguments(self) -> "AsyncEngineArgs":
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        arguments = engine_arguments(self.config, self.model_config, self.model_info, self.replica_rank, self.device)
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

    async def _start_engine(self, arguments: "AsyncEngineArgs") -> None:
        if self._processes is None:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self._engine = await InProcessEngine.start(arguments, engine_threads(self.config))
            return
        from vllm.v1.engine.async_llm import AsyncLLM

        with unblock_sigterm():
            self._engine = AsyncLLM.from_engine_args(arguments)
        self._processes.remember()
        await self._rpc("exit_with_replica", pid=os.getpid())

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        return await self._guard(self._answer(prompt, options, request_id), "failed")

    async def _answer(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        version = self.weight_version
        request = {"type": "token", "prompt_token_ids": prompt}
        final = None
        async for output in self._engine.generate(request, vllm_sampling_params(options), request_id):
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
            top = [{token: likely.logprob for token, likely in entry.items()} for entry in answer.logprobs]
        return TokenOutput(token_ids, log_probs, answer.finish_reason, version, top)

    async def check_alive(self) -> None:
        if self._engine is not None:
            await self._guard(self._engine.check_health(), "failed")

    async def _start_update(self) -> None:
        if self._asleep:
            await self._guard(self._engine.wake_up(["weights"]), "could not wake up")
        await self._rpc("start_weight_update")

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        bucket = dict(update_info)
        if "ipc_handles" in bucket:
            # Both vLLM 0.24 and 0.32 unpickle this form in the worker; their message format alters bare tuples.
            pickled = pickle.dumps(bucket.pop("ipc_handles"))
            bucket["ipc_handles_pickled"] = base64.b64encode(pickled).decode("ascii")
        await self._rpc("update_weights", update_info=bucket)

    async def _finish_update(self) -> None:
        await self._rpc("finish_weight_update")
        if self._asleep:
            await self._guard(self._engine.wake_up(["kv_cache"]), "could not wake up")
        if not await self._guard(self._engine.reset_prefix_cache(), "could not reset its prefix cache"):
            raise RuntimeError(f"{self._name}: the prefix cache is in use after a weight sync")

    async def _sleep(self) -> None:
        await self._guard(self._engine.sleep(level=2), "could not sleep")

    async def _shutdown(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)
        if self._processes is not None:
            self._processes.remove_files()

    async def _rpc(self, method: str, **kwargs: Any) -> list[Any]:
        """Call a method of vLLM's worker, by the name that vLLM's interface gives it."""
        return await self._guard(self._engine.collective_rpc(method, kwargs=kwargs), f"failed in {method}")

    async def _guard(self, call: Awaitable[Result], what: str) -> Result:
        """Await a call of the engine; the error of a dead engine names the cause."""
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await call
        except VLLMValidationError as error:  # a ValueError in vLLM 0.24, not in 0.32
            raise ValueError(f"vLLM refused the request: {error}") from error
        except EngineDeadError as error:
            cause = f"{type(error.__cause__).__name__}: {error.__cause__}"
            if self._processes is not None:
                cause = self._processes.cause_of_death()
            self._unusable = f"its engine is dead: {cause}"
            raise RuntimeError(f"{self._name} {what}: its engine is dead: {cause}") from error
        except EngineGenerateError as error:
            raise RuntimeError(f"{self._name} {what}: {error.__cause__!r}") from error
