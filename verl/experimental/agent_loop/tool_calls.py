"""Tool calls of one conversation: read from the model's text, run, and answered with tool messages.

Calls come in the Hermes syntax that Qwen uses, ``<tool_call>{JSON}</tool_call>``; calls inside a thought
(``<think>...</think>``) are ignored. A tool gets one instance per conversation, made at its first call and released at
the end, so it may keep state over turns. Nothing that a tool or a call does wrong ends the conversation: the model
reads an error text instead, and the metrics count it. A tool that hangs is treated alike
(``multi_turn.tool_timeout_s``).
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from verl.config import MultiTurnConfig
from verl.experimental.agent_loop.base import AgentLoopMetrics
from verl.tools.base_tool import BaseTool

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    """One call. ``error`` is empty, or says why the call cannot be read (``name`` and ``arguments`` are then void)."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def parse_hermes_tool_calls(text: str) -> list[ToolCall]:
    """The calls of one assistant turn, in the order they were written; those that cannot be read have an ``error``."""
    # The opening tag of a thought may stand in the prompt, where the template puts it: the last closing tag counts.
    outside_thought = text.rpartition("</think>")[2].partition("<think>")[0]
    return [_read_call(match.group(1), closed=bool(match.group(2))) for match in _CALL.finditer(outside_thought)]


def _read_call(body: str, closed: bool) -> ToolCall:
    if not closed:
        return ToolCall(error="<tool_call> is not closed by </tool_call>")
    try:
        call = json.loads(body)
    except json.JSONDecodeError as error:
        return ToolCall(error=f"the tool call is not valid JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(error='a tool call is a JSON object with a "name"')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return ToolCall(error=f'"arguments" of {call["name"]} must be a JSON object')
    return ToolCall(name=call["name"], arguments=arguments)


@dataclass
class ToolSession:
    """Runs the calls of one conversation."""

    tools: Mapping[str, BaseTool]
    limits: MultiTurnConfig
    metrics: AgentLoopMetrics
    """The conversation's; calls are counted there."""
    tools_kwargs: Mapping[str, Mapping[str, Any]]
    """Per tool, ``create_kwargs``, ``execute_kwargs`` and ``release_kwargs`` of this row."""
    _instances: dict[str, str] = field(default_factory=dict)
    _creating: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def answer(self, calls: Sequence[ToolCall]) -> list[dict[str, str]]:
        """Run the calls of one turn side by side; one ``tool`` message for each, in their order."""
        taken = calls[: self.limits.max_parallel_calls]
        self.metrics.tool_calls += len(taken)
        self.metrics.dropped_calls += len(calls) - len(taken)
        started = time.perf_counter()
        # Whatever a tool raises becomes an answer to the model, so it is collected here, not caught by type.
        results = await asyncio.gather(*(self._run(call) for call in taken), return_exceptions=True)
        self.metrics.tool_calls_s += time.perf_counter() - started
        messages = []
        for call, result in zip(taken, results, strict=True):
            if isinstance(result, Exception):
                self.metrics.tool_errors += 1
                logger.info("tool %s failed", call.name, exc_info=result)
                result = self._shortened(f"Error: {type(result).__name__}: {result}")
            elif isinstance(result, BaseException):
                raise result
            messages.append({"role": "tool", "name": call.name, "content": result})
        return messages

    async def release(self) -> None:
        """Release every instance; a tool that fails to is logged."""
        releases = [
            self._within_limit(self.tools[name].release(instance_id, **self._options(name, "release")))
            for name, instance_id in self._instances.items()
        ]
        results = await asyncio.gather(*releases, return_exceptions=True)
        for name, result in zip(self._instances, results, strict=True):
            if isinstance(result, BaseException):
                logger.warning("tool %s failed to release its instance: %r", name, result)
        self._instances.clear()

    async def _run(self, call: ToolCall) -> str:
        if call.error:
            self.metrics.malformed_calls += 1
            return f"Error: {call.error}"
        if call.name not in self.tools:
            self.metrics.unknown_tools += 1
            return f"Error: there is no tool {call.name!r}; the tools are {', '.join(self.tools)}"
        tool = self.tools[call.name]
        async with self._creating:  # calls of one turn share an instance
            if call.name not in self._instances:
                created = tool.create(**self._options(call.name, "create"))
                self._instances[call.name], _ = await self._within_limit(created)
        executed = tool.execute(self._instances[call.name], call.arguments, **self._options(call.name, "execute"))
        response, reward, _ = await self._within_limit(executed)
        self.metrics.tool_reward += reward or 0.0
        return self._shortened(response.text or "")

    async def _within_limit(self, work: Awaitable[Result]) -> Result:
        """The result of ``work``, or a TimeoutError that names the limit."""
        limit = self.limits.tool_timeout_s
        try:
            async with asyncio.timeout(limit) as timer:
                return await work
        except TimeoutError as error:
            if not timer.expired():
                raise  # the tool's own
            raise TimeoutError(f"no answer within {limit:g} s") from error

    def _options(self, name: str, step: str) -> dict[str, Any]:
        return dict(self.tools_kwargs.get(name, {}).get(f"{step}_kwargs", {}))

    def _shortened(self, text: str) -> str:
        """``text`` within the limit on characters; ``tool_response_truncate_side`` names the end that stays."""
        limit, side = self.limits.max_tool_response_length, self.limits.tool_response_truncate_side
        if len(text) <= limit:
            return text
        if side == "left":
            return f"{text[:limit]} [truncated]"
        if side == "right":
            return f"[truncated] {text[len(text) - limit :]}"
        head = (limit + 1) // 2
        return f"{text[:head]} [truncated] {text[len(text) - (limit - head) :]}"
