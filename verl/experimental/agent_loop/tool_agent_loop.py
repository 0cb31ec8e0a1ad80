"""The conversations that are built in: with tools (the default), and a single turn without.

::

    prompt (tools listed) -> model turn -> no call: done
                                 ^  |
                                 |  v calls
                              tool turn   <- tools run side by side; what fails answers with an error text

It ends with the first turn that calls nothing, at ``max_assistant_turns``, at ``max_user_turns``, or where the budget
of response tokens (model and tool tokens of all turns together) leaves no token to the model. A turn cut off before its
end-of-turn token calls nothing, and so does one that ends at an extended token (``PPOConfig.stops_at_extended``).

How calls are written: `tool_parser`. A tool gets one instance per conversation, made at its first call and released at
the end, so it may keep state over turns. Nothing that a tool or a call does wrong ends the conversation: the model
reads an error text instead, and the metrics count it. A tool that hangs is treated alike
(``multi_turn.tool_timeout_s``).
"""

import asyncio
import inspect
import logging
import math
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import starmap
from typing import Any, TypeVar

from verl.config import MultiTurnConfig
from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput, register
from verl.experimental.agent_loop.tool_parser import ToolCall, parse_hermes_tool_calls
from verl.tools.base_tool import BaseTool
from verl.utils.tokenizer import types_special_tokens

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class ToolSession:
    """Runs the calls of one conversation."""

    tools: Mapping[str, BaseTool]
    limits: MultiTurnConfig
    metrics: AgentLoopMetrics
    """The conversation's; calls are counted there."""
    tools_kwargs: Mapping[str, Mapping[str, Any]]
    """Per tool, ``create_kwargs``, ``execute_kwargs`` and ``release_kwargs`` of this row."""
    failed: set[str]
    """Tools whose first failure was logged; shared by the conversations of a worker."""
    _instances: dict[str, str] = field(default_factory=dict)
    _creating: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def answer(self, calls: Sequence[ToolCall | str]) -> list[dict[str, str]]:
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
            name = call.name if isinstance(call, ToolCall) else ""
            if isinstance(result, BaseException):
                self.metrics.tool_errors += 1
                # Once a tool: the model's mistakes end here too, and there may be many.
                level = logging.INFO if name in self.failed else logging.WARNING
                self.failed.add(name)
                logger.log(level, "tool %s failed (agent_loop/tool_errors counts such calls)", name, exc_info=result)
                result = self._shortened(f"Error: {type(result).__name__}: {result}")
            messages.append({"role": "tool", "name": name, "content": result})
        return messages

    async def release(self) -> None:
        """Release every instance; a tool that fails to is logged."""

        async def of(name: str, instance_id: str) -> None:  # so that what a plain function raises is collected too
            await self._in_time(self.tools[name].release(instance_id, **self._options(name, "release")))

        results = await asyncio.gather(*starmap(of, self._instances.items()), return_exceptions=True)
        for name, result in zip(self._instances, results, strict=True):
            if isinstance(result, BaseException):
                logger.warning("tool %s failed to release its instance: %r", name, result)
        self._instances.clear()

    async def _run(self, call: ToolCall | str) -> str:
        if isinstance(call, str):
            self.metrics.malformed_calls += 1
            return f"Error: {call}"
        if call.name not in self.tools:
            self.metrics.unknown_tools += 1
            return f"Error: there is no tool {call.name!r}; the tools are {', '.join(self.tools)}"
        tool = self.tools[call.name]
        async with self._creating:  # calls of one turn share an instance
            if call.name not in self._instances:
                created: Any = await self._in_time(tool.create(**self._create_options(call.name)))
                # Some tools for verl return no answer beside the id, and a text in place of an object.
                self._instances[call.name] = created if isinstance(created, str) else created[0]
        executed = tool.execute(self._instances[call.name], call.arguments, **self._options(call.name, "execute"))
        response, reward, _ = await self._in_time(executed)
        self.metrics.tool_reward += float(reward or 0.0)  # a checkpoint reads no scalar of NumPy
        return self._shortened((response if isinstance(response, str) else response.text) or "")

    async def _in_time(self, task: Coroutine[Any, Any, T]) -> T:
        """What a tool's coroutine returns; a TimeoutError with a text where it takes too long."""
        limit = self.limits.tool_timeout_s
        try:
            async with asyncio.timeout(limit) as scope:
                return await task
        except TimeoutError as error:
            if not scope.expired():  # the tool's own, with its own text
                raise
            raise TimeoutError(f"no answer within multi_turn.tool_timeout_s={limit:g} s") from error

    def _create_options(self, name: str) -> dict[str, Any]:
        """The row's options by name, as one mapping ``create_kwargs``, or both, whatever ``create`` takes."""
        options, named = self._options(name, "create"), inspect.signature(self.tools[name].create).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
        if "create_kwargs" in named or (takes_any and options):
            return {"create_kwargs": options} | (options if takes_any else {})
        return options

    def _options(self, name: str, step: str) -> dict[str, Any]:
        return dict((self.tools_kwargs.get(name) or {}).get(f"{step}_kwargs") or {})

    def _shortened(self, text: str) -> str:
        """``text`` within the limit on characters; ``tool_response_truncate_side`` names the end that stays."""
        limit, side = self.limits.max_tool_response_length, self.limits.tool_response_truncate_side
        if len(text) <= limit:
            return text
        head = {"left": limit, "right": 0, "middle": (limit + 1) // 2}[side]
        # Counted from the front: text[-0:] would be the whole text.
        parts = (text[:head], "[truncated]", text[len(text) - (limit - head) :])
        return " ".join(part for part in parts if part)


@register("single_turn_agent")
class SingleTurnAgentLoop(AgentLoopBase):
    """One prompt, one answer: no tools are shown and none are called."""

    writes_one_turn = True

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Template the messages, let the model answer, and stop."""
        trajectory = self.start(row, with_tools=False)
        await self.write_turn(trajectory, sampling_params)
        return self.finish(trajectory, num_turns=2)


@register("tool_agent")
class ToolAgentLoop(AgentLoopBase):
    """Turns of the model and of tools, until the model is done. Without tools, a single turn."""

    writes_one_turn = True  # not with tools, but `PPOConfig` refuses to carry answers on with them

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Hold the conversation; tools keep their state over its turns and are released at its end."""
        trajectory = self.start(row, with_tools=True)
        template, limits, kwargs = self.context.template, self.context.rollout.multi_turn, row.get("tools_kwargs") or {}
        tools = ToolSession(self.context.tools, limits, self.metrics, kwargs, self.context.failed_tools)
        most_by_model = math.inf if limits.max_assistant_turns is None else limits.max_assistant_turns
        most_by_tools = math.inf if limits.max_user_turns is None else limits.max_user_turns
        assistant_turns = user_turns = 0
        try:
            while True:
                turn_ids = await self.write_turn(trajectory, sampling_params)
                assistant_turns += 1
                # Before the calls are read: no tool runs where no turn is left to read its answer.
                if assistant_turns >= most_by_model or user_turns >= most_by_tools:
                    break
                calls = self.read_calls(turn_ids)
                if not calls:
                    break
                results = await tools.answer(calls)
                typed = (types_special_tokens(template.tokenizer, result["content"]) for result in results)
                self.metrics.typed_special_tokens += sum(typed)
                tool_turn_ids = template.encode_tool_turn(results)
                # Dropped whole: a tool turn that is cut is nothing that the template would write.
                if len(tool_turn_ids) >= trajectory.remaining_tokens:
                    break
                trajectory.add_other_turn(tool_turn_ids)
                user_turns += 1
                if self.is_over(tool_turn_ids, sampling_params):
                    break
        finally:
            await tools.release()
        return self.finish(trajectory, num_turns=1 + assistant_turns + user_turns)

    def read_calls(self, turn_ids: list[int]) -> list[ToolCall | str]:
        """The calls of a finished model turn; an unfinished turn, and a run without tools, have none."""
        if not self.context.tools or not turn_ids or turn_ids[-1] != self.context.template.end_of_turn_id:
            return []
        # Some tokenizers have <tool_call> as a special token.
        text: Any = self.context.template.tokenizer.decode(turn_ids[:-1], skip_special_tokens=False)
        calls = parse_hermes_tool_calls(text)
        self.metrics.rewritten_turns += bool(calls) and not self.context.template.shows_unchanged(text)
        return calls
