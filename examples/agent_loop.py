"""An agent loop of one's own: a model that gives no answer is asked once more.

    python -m examples.tiny actor_rollout_ref.model.external_lib=examples/agent_loop.py \
        actor_rollout_ref.rollout.agent.default_agent_loop=ask_again

Every process of the run imports the file, which registers the loop. A column `agent_name` of the data can choose a loop
by row. To set `fewest`, name the class in a YAML for actor_rollout_ref.rollout.agent.agent_loop_config_path in place of
external_lib: [{name: ask_again, _target_: examples.agent_loop.AskAgain, fewest: 20}].
"""

from dataclasses import dataclass
from typing import Any

from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopOutput, register
from verl.utils.tokenizer import answer_text

AGAIN = {"role": "user", "content": "Please answer."}


@register("ask_again")
@dataclass
class AskAgain(AgentLoopBase):
    """One conversation; a new object for each."""

    fewest: int = 1
    """Characters that count as an answer."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Prompt, answer, and where that is too short the question again and a second answer.

        Tokens of ``write_turn`` are the model's, so they are trained; those of ``add_other_turn`` are read alone.
        ``finish`` makes the masks, which end after the first item token where the row's teacher knows none.
        """
        template = self.context.template
        trajectory = self.start(row, with_tools=False)
        turn = await self.write_turn(trajectory, sampling_params)
        is_answer = len(answer_text(template.tokenizer, turn).strip()) >= self.fewest
        # What the chat template puts between the end of the model's turn and the start of its next one.
        again = template.encode_tool_turn([AGAIN])
        if is_answer or self.is_over(turn, sampling_params) or len(again) >= trajectory.remaining_tokens:
            return self.finish(trajectory, num_turns=2)
        trajectory.add_other_turn(again)
        await self.write_turn(trajectory, sampling_params)
        return self.finish(trajectory, num_turns=4)
