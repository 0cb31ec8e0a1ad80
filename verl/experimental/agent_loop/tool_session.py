"""The tools of one conversation: calls in, tool messages out.

A tool gets one instance per conversation, made at its first call and released at the end, so it may keep state over
turns. Nothing that a tool or a call does wrong ends the conversation: the model reads an error text instead, and the
metrics count it. A tool that hangs is one of these things (``multi_turn.tool_timeout_s``).
"""

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from verl.config import MultiTurnConfig
from verl.experimental.agent_loop.base import AgentLoopMetrics
from verl.experimental.agent_loop.tool_parser import ToolCall
from verl.tools.base_tool import BaseTool, ToolResponse
from verl.utils.timing import marked_timer

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ToolSession:
    """Runs the calls of one conversation."""

    def __init__(
        self,
        tools: Mapping[str, BaseTool],
        limits: MultiTurnConfig,
        tools_kwargs: Mapping[str, Mapping[str, Any]] | None,
        metrics: AgentLoopMetrics,
    ) -> None:
        """
        Args:
            tools_kwargs: per tool, ``create_kwargs``, ``execute_kwargs`` and ``release_kwargs`` of this row.
            metrics: the conversation's, counted up here.
        """
        self._tools = tools
        self._limits = limits
        self._kwargs = tools_kwargs or {}
        self._metrics = metrics
        self._instances: dict[str, str] = {}
        self._creating = asyncio.Lock()

    async def answer(self, calls: Sequence[ToolCall]) -> list[dict[str, str]]:
        """Run the calls of one turn side by side; one ``tool`` message for each, in their order."""
        taken = calls[: self._limits.max_parallel_calls]
        self._metrics.tool_calls += len(taken)
        self._metrics.dropped_calls += len(calls) - len(taken)
        timing: dict[str, float] = {}
        with marked_timer("tools", timing):
            # Whatever a tool raises is an answer to the model, so it is collected here rather than caught by type.
            results = await asyncio.gather(*(self._run(call) for call in taken), return_exceptions=True)
        self._metrics.tool_calls_s += timing["tools"]
        return [self._message(call, result) for call, result in zip(taken, results, strict=True)]

    async def release(self) -> None:
        """Release every instance; a tool that fails to is logged."""
        releases = [
            self._within_limit(self._tools[name].release(instance_id, **self._options(name, "release")))
            for name, instance_id in self._instances.items()
        ]
        results = await asyncio.gather(*releases, return_exceptions=True)
        for name, result in zip(self._instances, results, strict=True):
            if isinstance(result, BaseException):
                logger.warning("tool %s failed to release its instance: %r", name, result)
        self._instances.clear()

    async def _run(self, call: ToolCall) -> str:
        if call.error:
            self._metrics.malformed_calls += 1
            return f"Error: {call.error}"
        tool = self._tools.get(call.name)
        if tool is None:
            self._metrics.unknown_tools += 1
            return f"Error: there is no tool {call.name!r}; the tools are {', '.join(self._tools)}"
        instance_id = await self._instance(tool)
        executed = tool.execute(instance_id, call.arguments, **self._options(call.name, "execute"))
        response, reward, _ = await self._within_limit(executed)
        self._metrics.tool_reward += reward or 0.0
        return self._shortened(response)

    async def _instance(self, tool: BaseTool) -> str:
        async with self._creating:
            if tool.name not in self._instances:
                created = tool.create(**self._options(tool.name, "create"))
                self._instances[tool.name], _ = await self._within_limit(created)
            return self._instances[tool.name]

    async def _within_limit(self, work: Awaitable[Result]) -> Result:
        """What a tool does, or a TimeoutError that names the limit."""
        limit = self._limits.tool_timeout_s
        try:
            async with asyncio.timeout(limit) as timer:
                return await work
        except TimeoutError as error:
            if not timer.expired():
                raise  # the tool's own
            raise TimeoutError(f"no answer within {limit:g} s") from error

    def _options(self, name: str, step: str) -> dict[str, Any]:
        return dict(self._kwargs.get(name, {}).get(f"{step}_kwargs", {}))

    def _message(self, call: ToolCall, result: str | BaseException) -> dict[str, str]:
        if isinstance(result, BaseException):
            if not isinstance(result, Exception):
                raise result
            self._metrics.tool_errors += 1
            logger.info("tool %s failed", call.name, exc_info=result)
            result = self._shortened(ToolResponse(text=f"Error: {type(result).__name__}: {result}"))
        return {"role": "tool", "name": call.name, "content": result}

    def _shortened(self, response: ToolResponse) -> str:
        """The response within the limit on characters; ``tool_response_truncate_side`` names the end that stays."""
        text, limit = response.text or "", self._limits.max_tool_response_length
        side = self._limits.tool_response_truncate_side
        if len(text) <= limit:
            return text
        if side == "left":
            return f"{text[:limit]} [truncated]"
        if side == "right":
            return f"[truncated] {text[len(text) - limit :]}"
        head = (limit + 1) // 2
        return f"{text[:head]} [truncated] {text[len(text) - (limit - head) :]}"
