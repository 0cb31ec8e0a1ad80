"""A conversation in which the model may call tools: the default loop.

::

    prompt (tools listed) -> model turn -> no call: done
                                 ^  |
                                 |  v calls
                              tool turn   <- tools run side by side; what fails answers with an error text

It ends with the first turn that calls nothing, at ``max_assistant_turns``, at ``max_user_turns``, or where the budget
of response tokens (model and tool tokens of all turns together) leaves no token to the model. A turn cut off before its
end-of-turn token calls nothing. Extended tokens do not end it: the masks deal with them.
"""

from typing import Any

from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopOutput, register
from verl.experimental.agent_loop.tool_calls import ToolCall, ToolSession, parse_hermes_tool_calls


@register("tool_agent")
class ToolAgentLoop(AgentLoopBase):
    """Turns of the model and of tools, until the model is done. Without tools, a single turn."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Hold the conversation; tools keep their state over its turns and are released at its end."""
        trajectory = self.start(row, with_tools=True)
        tools = ToolSession(self.context.tools, self.rollout.multi_turn, self.metrics, row.get("tools_kwargs") or {})
        assistant_turns = user_turns = 0
        try:
            while True:
                turn_ids = await self.write_turn(trajectory, sampling_params)
                assistant_turns += 1
                calls = self.read_calls(turn_ids) if self.may_go_on(assistant_turns, user_turns) else []
                if not calls:
                    break
                tool_turn_ids = self.template.encode_tool_turn(await tools.answer(calls))
                if len(tool_turn_ids) >= trajectory.remaining_tokens:
                    break
                trajectory.add_other_turn(tool_turn_ids)
                user_turns += 1
        finally:
            await tools.release()
        return self.finish(trajectory, num_turns=1 + assistant_turns + user_turns)

    def may_go_on(self, assistant_turns: int, user_turns: int) -> bool:
        """Whether the limits on turns allow another tool turn and the model turn after it."""
        limits = self.rollout.multi_turn
        return (limits.max_assistant_turns is None or assistant_turns < limits.max_assistant_turns) and (
            limits.max_user_turns is None or user_turns < limits.max_user_turns
        )

    def read_calls(self, turn_ids: list[int]) -> list[ToolCall]:
        """The calls of a finished model turn; an unfinished turn, and a run without tools, have none."""
        if not self.context.tools or not turn_ids or turn_ids[-1] != self.template.end_of_turn_id:
            return []
        return parse_hermes_tool_calls(str(self.template.tokenizer.decode(turn_ids[:-1], skip_special_tokens=False)))
