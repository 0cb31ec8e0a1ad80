"""The two ways in which a vLLM engine runs: in this process, or in processes of its own.

``InProcessEngine`` has the few async methods of ``AsyncLLM`` that a replica uses. ``AsyncLLM`` always starts an
engine-core process and worker processes, which import vLLM anew: half a minute before the first token on a small CPU
machine, and a gigabyte of memory more. Here one thread owns the engine; every call to it, steps included, is queued on
that thread.

    generate() ──► add request ─┐                           ┌─► future of the request ──► generate() returns
                                ├─► engine thread: step() ──┤
    collective_rpc(), ... ──────┘     while requests last   └─► an exception: all futures fail, the engine is dead

``cause_of_death`` finds out what the processes of an ``AsyncLLM`` died of: vLLM tells its client no more than "see the
stack trace above".
"""

import asyncio
import itertools
import re
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

LOGGED_EXCEPTION = re.compile(r".*\bERROR\b.*\] ((?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)(?:: .+)?)$")
"""The last line of a traceback as vLLM logs it."""


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

    They write to the stderr of this process; it is searched where it is a file, as in a Ray actor.
    """
    log = Path("/proc/self/fd/2")
    logged = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    causes = [found[1] for line in logged if (found := LOGGED_EXCEPTION.match(line))][:1]  # others follow from it
    for process in processes:
        if code := process.exitcode:
            end = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
            causes.append(f"process {process.name} (pid {process.pid}) {end}")
    return "; ".join(causes)


class InProcessEngine:
    """See the module. Made by ``start``. Once dead, its methods raise a RuntimeError with the cause."""

    def __init__(self, engine: Any, thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        """vLLM's ``LLMEngine``."""
        self._thread = thread
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._stepping: asyncio.Task[None] | None = None
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
        try:
            await self._call(self._engine.add_request, unique_id, prompt, sampling_params)
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step_while_requests_last())
                self._stepping.add_done_callback(self._on_steps_ended)
            yield await answer
        except asyncio.CancelledError:
            await self._call(self._engine.abort_request, [unique_id])  # it would write on for nobody
            raise
        finally:
            self._answers.pop(unique_id, None)

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
        """Stop the engine and its thread."""
        self._thread.submit(self._engine.engine_core.shutdown).result()
        self._thread.shutdown()

    async def _step_while_requests_last(self) -> None:
        while self._answers:
            for output in await self._call(self._engine.step):
                answer = self._answers.pop(output.request_id, None)  # None: cancelled meanwhile
                if answer is not None and not answer.done():
                    answer.set_result(output)

    def _on_steps_ended(self, steps: asyncio.Task[None]) -> None:
        if not steps.cancelled() and (cause := steps.exception()):
            self._death = RuntimeError(f"its engine is dead: {type(cause).__name__}: {cause}")
            for answer in self._answers.values():  # every request that waits has to end
                if not answer.done():
                    answer.set_exception(self._death)

    async def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)
