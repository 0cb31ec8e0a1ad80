"""The two ways in which a vLLM engine runs: in this process, or in processes of its own.

``InProcessEngine`` has the few async methods of ``AsyncLLM`` that a replica uses. ``AsyncLLM`` always starts an
engine-core process and worker processes, which import vLLM anew: half a minute before the first token on a small CPU
machine, and a gigabyte of memory more. Here one thread owns the engine; every call to it, steps included, is queued on
that thread.

    generate() ──► add request ─┐                           ┌─► future of the request ──► generate() returns
                                ├─► engine thread: step() ──┤
    collective_rpc(), ... ──────┘     while requests last   └─► an exception: all futures fail, the engine is dead

``EngineProcesses`` finds out what the processes of an ``AsyncLLM`` died of: vLLM tells its client no more than "see the
stack trace above", so they append their errors to a file here.
"""

import asyncio
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

Result = TypeVar("Result")

_EXCEPTION_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)(?:: .+)?$")


@contextmanager
def unblock_sigterm() -> Iterator[None]:
    """What is started within the block ends on SIGTERM, as vLLM expects; Ray's processes block that signal."""
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class EngineProcesses:
    """The processes that an engine starts, and the file to which they append their errors."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="verl-vllm-"))
        self.error_log = self._folder / "errors.log"
        self.logging_config = self._folder / "logging.json"
        """For ``VLLM_LOGGING_CONFIG_PATH``: vLLM's usual output, and its errors to the file as well."""
        self.logging_config.write_text(json.dumps(_logging_config(self.error_log)), encoding="utf-8")
        self._before = set(multiprocessing.active_children())
        self._processes: list[BaseProcess] = []

    def remember(self) -> None:
        """Record the processes that were started since this object was made."""
        self._processes = [child for child in multiprocessing.active_children() if child not in self._before]

    def cause_of_death(self) -> str:
        """What the engine's processes logged last, and how those that ended did."""
        ended = [
            f"process {child.name} (pid {child.pid}) {describe_exit(child.exitcode)}"
            for child in self._processes
            if child.exitcode not in (None, 0)
        ]
        logged = last_exception(self.error_log)
        return "; ".join([*([logged] if logged else []), *ended]) or "its processes left no error"

    def remove_files(self) -> None:
        """Remove the error file; safe to call twice."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _logging_config(error_log: Path) -> dict[str, Any]:
    console = {"class": "logging.StreamHandler", "formatter": "plain"}
    errors = {"class": "logging.FileHandler", "formatter": "plain", "level": "ERROR"}
    level = os.environ.get("VLLM_LOGGING_LEVEL", "ERROR")
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"plain": {"format": "%(levelname)s %(asctime)s %(processName)s %(name)s: %(message)s"}},
        "handlers": {"console": console, "errors": errors | {"filename": str(error_log), "delay": True}},
        "loggers": {"vllm": {"handlers": ["console", "errors"], "level": level, "propagate": False}},
    }


def describe_exit(exit_code: int | None) -> str:
    """An exit code in words; negative codes are signals."""
    if exit_code is None or exit_code >= 0:
        return f"exited with code {exit_code}"
    name = signal.Signals(-exit_code).name
    hint = ", perhaps for want of memory" if -exit_code == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


def last_exception(error_log: Path) -> str | None:
    """The first line of the log that ends a traceback (later ones follow from it), else its last line, if any."""
    if not error_log.is_file():
        return None
    lines = [line.strip() for line in error_log.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    return next(filter(_EXCEPTION_LINE.match, lines), lines[-1] if lines else None)


class InProcessEngine:
    """See the module. Made by ``start``. Once dead, its methods raise vLLM's ``EngineDeadError`` from the cause."""

    def __init__(self, engine: "LLMEngine", thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._thread = thread
        self._futures: dict[str, asyncio.Future[RequestOutput]] = {}
        self._numbers = itertools.count()
        self._stepping: asyncio.Task[None] | None = None
        self._cause_of_death: BaseException | None = None

    @classmethod
    async def start(cls, arguments: "AsyncEngineArgs", threads: int) -> "InProcessEngine":
        """Build the engine on a thread of its own, whose operators use ``threads`` threads."""
        from vllm.v1.engine.llm_engine import LLMEngine

        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")

        def build() -> LLMEngine:
            torch.set_num_threads(threads)
            return LLMEngine.from_engine_args(arguments)

        return cls(await asyncio.get_running_loop().run_in_executor(thread, build), thread)

    async def generate(
        self, prompt: Any, sampling_params: "SamplingParams", request_id: str
    ) -> "AsyncIterator[RequestOutput]":
        """Yield the finished answer, once; raises ValueError where vLLM refuses the request."""
        await self.check_health()
        unique_id = f"{request_id}-{next(self._numbers)}"
        future: asyncio.Future[RequestOutput] = asyncio.get_running_loop().create_future()
        # Registered before the request is queued: the step loop runs while there are futures.
        self._futures[unique_id] = future
        try:
            await self._call(self._engine.add_request, unique_id, prompt, sampling_params)
            if self._stepping is None or self._stepping.done():
                self._stepping = asyncio.create_task(self._step_while_requests_last())
                self._stepping.add_done_callback(self._on_steps_ended)
            yield await future
        except asyncio.CancelledError:
            await self._call(self._engine.abort_request, [unique_id])
            raise
        finally:
            self._futures.pop(unique_id, None)

    async def check_health(self) -> None:
        """Raise where the engine has died."""
        if self._cause_of_death is not None:
            raise _death(self._cause_of_death)

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
        while self._futures:
            for output in await self._call(self._engine.step):
                future = self._futures.pop(output.request_id, None)
                if future is not None and not future.done():
                    future.set_result(output)

    def _on_steps_ended(self, task: asyncio.Task[None]) -> None:
        self._cause_of_death = None if task.cancelled() else task.exception()
        if self._cause_of_death is not None:
            for future in self._futures.values():  # every request that waits has to end
                if not future.done():
                    future.set_exception(_death(self._cause_of_death))

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)


def _death(cause: BaseException) -> Exception:
    from vllm.v1.engine.exceptions import EngineDeadError

    death = EngineDeadError()
    death.__cause__ = cause
    return death
