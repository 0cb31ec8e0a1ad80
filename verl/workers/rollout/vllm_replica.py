"""The vLLM rollout replica.

In:  checked requests and weight buckets (``replica``). Out: tokens with the sampler's log-probs.

Weights arrive through vLLM's weight-transfer interface: ``start_weight_update``, ``update_weights`` per bucket,
``finish_weight_update``, with vLLM's ``ipc`` engine on the ranks' GPUs and ours (``vllm_worker``) elsewhere.

On CUDA, and with tensor parallelism, vLLM is ``AsyncLLM`` with processes of its own; on CPU it runs in this process
(``InProcessEngine``). Works with vLLM 0.27.1 to 0.32. ``vllm_settings`` has the options.
"""

import asyncio
import base64
import itertools
import logging
import multiprocessing
import os
import pickle
import re
import signal
import warnings
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from verl.workers.rollout import vllm_settings
from verl.workers.rollout.replica import RolloutReplica, SamplingOptions, TokenOutput

LOGGED_EXCEPTION = re.compile(r".*\bERROR\b.*\] ((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)(?:: .+)?)$")
"""The last line of a traceback as vLLM logs it."""


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
        arguments = self._engine_arguments()
        if arguments.load_format == "dummy":
            self._unusable = "it was started without weights (load_format=dummy); sync them first"
        try:
            await self._start_engine(arguments)
        except RuntimeError as error:
            raise RuntimeError(f"{self._name} did not start: {cause_of_death(()) or error}") from error
        await self._rpc("draw_by_seed")
        # Nothing has to be agreed on beforehand, but the protocol begins with this call; `connect` repeats it.
        await self._rpc("init_weight_transfer_engine", init_info={})

    def _engine_arguments(self) -> Any:
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs

        transfer = WeightTransferConfig(backend="ipc" if self.device == "cuda" and not self.is_apart else "shm")
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

    async def _abort(self, request_ids: Sequence[str]) -> None:
        """vLLM sends what was written as their finished answers."""
        await self._guard(self._engine.abort(list(request_ids)))

    async def check_alive(self) -> None:
        if self._engine is not None:
            await self._guard(self._engine.check_health())

    async def connect(self, rendezvous: Mapping[str, Any], rank: int) -> None:
        await self._rpc("init_weight_transfer_engine", init_info={"rendezvous": dict(rendezvous), "rank": rank})

    async def _start_update(self) -> None:
        if self._asleep:
            # The cache sleeps on: during the sync the GPU holds the ranks' bucket beside the weights.
            await self._guard(self._engine.wake_up(["weights"]))
        await self._rpc("start_weight_update")

    async def _load_bucket(self, update_info: Mapping[str, Any]) -> None:
        bucket = dict(update_info)
        if "ipc_handles" in bucket:
            # vLLM 0.27.1 to 0.32 unpickle this form in the worker; their message format alters bare tuples.
            pickled = pickle.dumps(bucket.pop("ipc_handles"))
            bucket["ipc_handles_pickled"] = base64.b64encode(pickled).decode("ascii")
        await self._rpc("update_weights", update_info=bucket)

    async def _finish_update(self) -> list[str]:
        unloaded = await self._rpc("finish_and_find_unloaded")
        if self._asleep:
            await self._guard(self._engine.wake_up(["kv_cache"]))
        # Cached prompts are found by their tokens, so those of the old weights would be taken for the new.
        if not await self._guard(self._engine.reset_prefix_cache()):
            raise RuntimeError(f"{self._name}: vLLM did not empty its prefix cache after a weight sync")
        return sorted(set().union(*unloaded))  # a list from each process

    async def _sleep(self) -> None:
        # Level 1 would copy the weights to host memory, and the next sync brings all of them anyway.
        await self._guard(self._engine.sleep(level=2))

    async def _shutdown(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    async def _rpc(self, method: str, **kwargs: Any) -> Any:
        """Call a method of vLLM's workers, by the name that vLLM's interface gives it; a result from each."""
        return await self._guard(self._engine.collective_rpc(method, kwargs=kwargs))

    async def _guard(self, call: Awaitable[Any]) -> Any:
        """Await a call of the engine; where its processes have died, the error names the cause."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            return await call
        except (EngineDeadError, EngineGenerateError) as error:
            cause = cause_of_death(self._processes) or repr(error.__cause__)
            raise RuntimeError(f"{self._name}: its engine is dead: {cause}") from error


class InProcessEngine:
    """A vLLM engine in this process, with the few async methods of ``AsyncLLM`` that a replica uses.

    ``AsyncLLM`` always starts an engine-core process and worker processes, which import vLLM anew: half a minute before
    the first token on a small CPU machine, and a gigabyte of memory more. Here one thread owns the engine; every call
    to it, steps included, is queued on that thread. Made by ``start``. Once dead, its methods raise a RuntimeError with
    the cause.

        generate() ──► new requests ─┐                           ┌─► future of the request ──► generate() returns
                                     ├─► engine thread: step() ──┤
        collective_rpc(), ... ───────┘     while requests last   └─► an exception: all futures fail, the engine is dead
    """

    def __init__(self, engine: Any, thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        """vLLM's ``LLMEngine``."""
        self._thread = thread
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._new = deque[tuple[str, Any, Any]]()
        """Requests that the engine takes before its next step: id, prompt, sampling parameters."""
        self._numbers = itertools.count()
        self._stepping: asyncio.Task[None] | None = None
        self._calls = 0
        """Calls of the engine's thread, under way or waiting for it."""
        self._death: RuntimeError | None = None

    @classmethod
    async def start(cls, arguments: Any, threads: int) -> "InProcessEngine":
        """Build the engine on a thread of its own, whose operators use ``threads`` threads."""
        from vllm.v1.engine.llm_engine import LLMEngine

        thread = ThreadPoolExecutor(1, "vllm", torch.set_num_threads, (threads,))
        engine = await asyncio.get_running_loop().run_in_executor(thread, LLMEngine.from_engine_args, arguments)
        return cls(engine, thread)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        """Yield the finished ``RequestOutput``, once; raises ValueError where vLLM refuses the request."""
        await self.check_health()
        unique_id = f"{request_id}-{next(self._numbers)}"
        # Registered before the request is queued: the step loop runs while there are futures.
        answer = self._answers[unique_id] = asyncio.get_running_loop().create_future()
        self._new.append((unique_id, prompt, sampling_params))
        try:
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step_while_requests_last())
                self._stepping.add_done_callback(self._on_steps_ended)
            yield await answer
        except asyncio.CancelledError:
            self._answers.pop(unique_id, None)  # the engine does not take it from now on
            await self._call(self._engine.abort_request, [unique_id])  # it would write on for nobody
            raise
        finally:
            self._answers.pop(unique_id, None)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """End these requests: ``generate`` yields what was written."""
        await self.check_health()
        wanted = set(request_ids)
        aborted = [name for name in self._answers if name.rpartition("-")[0] in wanted]
        for output in await self._call(self._abort, aborted):
            self._answer(output)

    async def check_health(self) -> None:
        """Raise where the engine has died."""
        if self._death is not None:
            raise self._death

    async def collective_rpc(self, method: str, *, kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of the worker."""
        await self.check_health()
        return await self._call(self._engine.collective_rpc, method, None, (), kwargs)

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prompts; False where requests still use them."""
        return await self._call(self._engine.reset_prefix_cache)

    def shutdown(self) -> None:
        """Stop the engine and its thread; requests that run fail."""
        self._death = RuntimeError("it was shut down")
        self._thread.submit(self._engine.engine_core.shutdown).result()
        self._thread.shutdown()

    async def _step_while_requests_last(self) -> None:
        while self._answers:
            for output in await self._call(self._step_until_needed):
                self._answer(output)

    def _answer(self, output: Any) -> None:
        answer = self._answers.pop(output.request_id, None)  # None: cancelled meanwhile
        if answer is not None and not answer.done():
            answer.set_result(output)

    def _abort(self, request_ids: list[str]) -> list[Any]:
        """On the engine's thread; what was written."""
        self._take_new()
        processor, outputs = self._engine.output_processor, list[Any]()
        for request_id in request_ids:
            for own_id in processor.external_req_ids.get(request_id, ()):
                # vLLM puts the output of an aborted request into its queue, which `AsyncLLM` alone gives it.
                processor.request_states[own_id].queue = SimpleNamespace(put=outputs.append)
        self._engine.abort_request(request_ids)
        return outputs

    def _on_steps_ended(self, steps: asyncio.Task[None]) -> None:
        if not steps.cancelled() and (cause := steps.exception()):
            self._death = RuntimeError(f"its engine is dead: {type(cause).__name__}: {cause}")
            for answer in self._answers.values():  # every request that waits has to end
                _refuse(answer, self._death)

    def _step_until_needed(self) -> list[Any]:
        """Step on the engine's thread until answers are finished, or another call waits for the thread."""
        # A way through the event loop for every token would cost a tenth of a small model's step.
        while True:
            if self._death is not None:
                raise self._death
            self._take_new()
            outputs = self._engine.step()
            if outputs or self._calls > 1 or not (self._new or self._engine.has_unfinished_requests()):
                return outputs

    def _take_new(self) -> None:
        """Give the engine, on its thread, the requests that have come."""
        while self._new:
            request_id, prompt, sampling_params = self._new.popleft()
            if (answer := self._answers.get(request_id)) is not None:  # None: cancelled meanwhile
                try:
                    self._engine.add_request(request_id, prompt, sampling_params)
                except Exception as error:  # this request's own: vLLM refuses it
                    answer.get_loop().call_soon_threadsafe(_refuse, answer, error)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._calls += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
        finally:
            self._calls -= 1


def _refuse(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


@contextmanager
def unblock_sigterm() -> Iterator[None]:
    """What is started within the block ends on SIGTERM, as vLLM expects; Ray's processes block that signal."""
    # A process inherits the signal mask of the thread that starts it.
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def cause_of_death(processes: Sequence[BaseProcess]) -> str:
    """The first exception that an engine's processes logged, and how those that ended did; empty: neither is known.

    vLLM tells its client no more than "see the stack trace above". They write to the stderr of this process; it is
    searched where it is a file, as in a Ray actor.
    """
    causes = [found[1] for line in own_log() if (found := LOGGED_EXCEPTION.match(line))][:1]  # others follow from it
    for process in processes:
        if code := process.exitcode:
            end = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
            causes.append(f"process {process.name} (pid {process.pid}) {end}")
    return "; ".join(causes)


def own_log() -> list[str]:
    """Lines that this process and those below it wrote to stderr, where it is a file."""
    log = Path("/proc/self/fd/2")
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
