"""The vLLM rollout replica.

In:  checked requests and weight buckets (``replica``). Out: tokens with the sampler's log-probs.

Weights arrive through vLLM's weight-transfer interface: ``start_weight_update``, ``update_weights`` per bucket,
``finish_weight_update``, with vLLM's ``ipc`` engine on CUDA and ours (``vllm_worker``) on CPU.

On CUDA, and with tensor parallelism, vLLM is ``AsyncLLM`` with processes of its own; on CPU it runs in this process
(``vllm_engine``). Works with vLLM 0.24 to 0.32. ``vllm_settings`` has the options.
"""

import asyncio
import base64
import logging
import multiprocessing
import os
import pickle
import warnings
from collections.abc import Awaitable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from verl.workers.rollout import vllm_settings
from verl.workers.rollout.replica import RolloutReplica, SamplingOptions, TokenOutput
from verl.workers.rollout.vllm_engine import InProcessEngine, cause_of_death, unblock_sigterm


class VLLMReplica(RolloutReplica):
    """One vLLM engine over ``tensor_model_parallel_size`` GPUs, or over the CPU."""

    _engine: Any = None
    """``AsyncLLM`` or ``InProcessEngine``."""
    _processes: Sequence[BaseProcess] = ()
    """Those that the engine has started."""

    async def _launch(self) -> None:
        environment = vllm_settings.engine_environment(self.config, self.device)
        # Ray sets OMP_NUM_THREADS=1 of its own accord, and where the engine runs is decided by the settings alone.
        forced = ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")
        # Before vLLM is imported, which sets up its logger then.
        os.environ.update({k: v for k, v in environment.items() if k in forced or k not in os.environ})
        if self.device == "cpu":
            # On import vLLM warns three times that Triton has no CPU backend.
            logging.getLogger("vllm.triton_utils").setLevel(logging.CRITICAL)
        try:
            await self._start_engine(self._engine_arguments())
        except RuntimeError as error:
            raise RuntimeError(f"{self._name} did not start: {cause_of_death(()) or error}") from error
        # Neither backend has anything to agree on beforehand, but the protocol begins with this call.
        await self._rpc("init_weight_transfer_engine", init_info={})

    def _engine_arguments(self) -> Any:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        transfer = WeightTransferConfig(backend="ipc" if self.device == "cuda" else "shm")
        given = (self.config, self.model_config, self.model_info, self.replica_rank, self.device)
        try:
            return AsyncEngineArgs(**vllm_settings.engine_arguments(*given), weight_transfer_config=transfer)
        except TypeError as error:
            key = f"{vllm_settings.ROLLOUT_KEY}.engine_kwargs.vllm"
            raise ValueError(f"{key}: an option that the installed vLLM does not have: {error}") from error

    async def _start_engine(self, arguments: Any) -> None:
        if vllm_settings.runs_in_process(self.config, self.device):
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self._engine = await InProcessEngine.start(arguments, vllm_settings.engine_threads(self.config))
            return
        from vllm.v1.engine.async_llm import AsyncLLM

        with unblock_sigterm():
            self._engine = AsyncLLM.from_engine_args(arguments)
        self._processes = multiprocessing.active_children()
        await self._rpc("exit_with_replica", pid=os.getpid())

    async def _generate(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        return await self._guard(self._answer(prompt, options, request_id))

    async def _answer(self, prompt: list[int], options: SamplingOptions, request_id: str) -> TokenOutput:
        version = self.weight_version
        request = {"type": "token", "prompt_token_ids": prompt}
        # The finished answer alone comes.
        async for output in self._engine.generate(request, vllm_settings.vllm_sampling_params(options), request_id):
            answer = output.outputs[0]
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
            await self._guard(self._engine.check_health())

    async def _start_update(self) -> None:
        if self._asleep:
            # The cache sleeps on: during the sync the GPU holds the ranks' bucket beside the weights.
            await self._guard(self._engine.wake_up(["weights"]))
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
            await self._guard(self._engine.wake_up(["kv_cache"]))
        # Cached prompts are found by their tokens, so those of the old weights would be taken for the new.
        if not await self._guard(self._engine.reset_prefix_cache()):
            raise RuntimeError(f"{self._name}: the prefix cache is in use after a weight sync")

    async def _sleep(self) -> None:
        # Level 1 would copy the weights to host memory, and the next sync brings all of them anyway.
        await self._guard(self._engine.sleep(level=2))

    async def _shutdown(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    async def _rpc(self, method: str, **kwargs: Any) -> None:
        """Call a method of vLLM's worker, by the name that vLLM's interface gives it."""
        await self._guard(self._engine.collective_rpc(method, kwargs=kwargs))

    async def _guard(self, call: Awaitable[Any]) -> Any:
        """Await a call of the engine; where its processes have died, the error names the cause."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await call
        except (EngineDeadError, EngineGenerateError) as error:
            cause = cause_of_death(self._processes) or repr(error.__cause__)
            raise RuntimeError(f"{self._name}: its engine is dead: {cause}") from error
