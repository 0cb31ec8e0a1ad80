"""vLLM's engine in this process, with the few async methods of ``AsyncLLM`` that a replica uses.

``AsyncLLM`` always starts an engine-core process and worker processes, which import vLLM anew: half a minute before the
first token on a small CPU machine, and a gigabyte of memory more. Here one thread owns the engine; every call to it,
steps included, is queued on that thread.

    generate() ──► add request ─┐                           ┌─► future of the request ──► generate() returns
                                ├─► engine thread: step() ──┤
    collective_rpc(), ... ──────┘     while requests last   └─► an exception: all futures fail, the engine is dead
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine

Result = TypeVar("Result")


class InProcessEngine:
    """See the module. Made by ``start``."""

    def __init__(self, engine: LLMEngine, thread: ThreadPoolExecutor) -> None:
        self._engine = engine
        self._thread = thread
        self._futures: dict[str, asyncio.Future[RequestOutput]] = {}
        self._numbers = itertools.count()
        self._stepping: asyncio.Task[None] | None = None
        self._cause_of_death: BaseException | None = None

    @classmethod
    async def start(cls, arguments: AsyncEngineArgs, threads: int) -> "InProcessEngine":
        """Build the engine on a thread of its own, whose operators use ``threads`` threads."""
        thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="vllm")

        def build() -> LLMEngine:
            torch.set_num_threads(threads)
            return LLMEngine.from_engine_args(arguments)

        engine = await asyncio.get_running_loop().run_in_executor(thread, build)
        return cls(engine, thread)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str
    ) -> AsyncIterator[RequestOutput]:
        """Yield the finished answer, once.

        Raises:
            ValueError: vLLM refuses the request.
            RuntimeError: the engine died, now or earlier; names the cause.
        """
        self._check_alive()
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
        """Raise RuntimeError, with the cause, where the engine died."""
        self._check_alive()

    async def collective_rpc(self, method: str, *, kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of the worker."""
        self._check_alive()
        return await self._call(self._engine.collective_rpc, method, None, (), kwargs)

    async def reset_prefix_cache(self) -> bool:
        """Forget cached prompts; False where requests still use them."""
        return await self._call(self._engine.reset_prefix_cache)

    def shutdown(self) -> None:
        """Stop the engine and its thread."""
        self._cause_of_death = RuntimeError("the engine was shut down")
        self._thread.submit(self._engine.engine_core.shutdown).result()
        self._thread.shutdown()

    async def _step_while_requests_last(self) -> None:
        while self._futures:
            for output in await self._call(self._engine.step):
                future = self._futures.pop(output.request_id, None)
                if future is not None and not future.done():
                    future.set_result(output)

    def _on_steps_ended(self, task: asyncio.Task[None]) -> None:
        """If the engine failed, every request that waits for it must hear of it."""
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        self._cause_of_death = error
        for future in self._futures.values():
            if not future.done():
                future.set_exception(_death(error))

    async def _call(self, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _check_alive(self) -> None:
        if self._cause_of_death is not None:
            raise _death(self._cause_of_death)


def _death(error: BaseException) -> RuntimeError:
    death = RuntimeError(f"the vLLM engine died: {type(error).__name__}: {error}")
    death.__cause__ = error
    return death
