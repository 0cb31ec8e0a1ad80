"""One prompt, one answer: no tools are shown and none are called."""

from typing import Any

from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopOutput, register


@register("single_turn_agent")
class SingleTurnAgentLoop(AgentLoopBase):
    """The model writes one turn."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Template the messages, let the model answer, and stop."""
        trajectory = self.start(row, with_tools=False)
        await self.write_turn(trajectory, sampling_params)
        return self.finish(trajectory, num_turns=2)
