"""One process that holds many conversations at once.

In: rows of prompts, with a seed each. Out: their rollout tensors (``rows.py``), in order, and what was measured of the
conversations. A plain class: the manager decides where it runs, and ``AsyncLLMServerManager`` knows where
the engines are.
"""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any
from uuid import uuid4

from transformers import PreTrainedTokenizerBase

import verl.experimental.agent_loop.tool_agent_loop  # noqa: F401 (registers the loops)
from verl.config import PPOConfig, RolloutConfig
from verl.experimental.agent_loop.base import AgentLoopContext, AgentLoopOutput, get_agent_loop_class
from verl.experimental.agent_loop.chat_template import ChatTemplate
from verl.experimental.agent_loop.rows import SEED_KEY, pad_outputs, sampling_params
from verl.experimental.agent_loop.servers import AsyncLLMServerManager
from verl.protocol import DataProto
from verl.tools.base_tool import BaseTool, initialize_tools_from_config


class AgentLoopWorker:
    """Runs the agent loop that each row names, or the default one."""

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, servers: AsyncLLMServerManager) -> None:
        """Build the tools and the chat template that all conversations share.

        Raises:
            ValueError: a tool cannot be loaded, or the template does not fit tools.
        """
        rollout = config.actor_rollout_ref.rollout
        tools = load_tools(rollout)
        schemas = [tool.get_openai_tool_schema() for tool in tools.values()]
        template = ChatTemplate(tokenizer, schemas, config.data.apply_chat_template_kwargs)
        self.context = AgentLoopContext(rollout, template, tools)
        self.servers = servers

    async def check_alive(self) -> None:
        """Answers once the worker is built."""

    async def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Hold one conversation per row, all at once; the first failure ends them all.

        Returns:
            The rollout's keys; ``meta_info["metrics"]`` lists what was measured, and the weight version, row by row.
        """
        rollout, columns = self.context.rollout, prompts.non_tensor_batch
        sampling = sampling_params(rollout, bool(prompts.meta_info["validate"]))
        self.servers.forget_conversations()
        tasks = [
            asyncio.create_task(self._converse(sampling, {key: values[row] for key, values in columns.items()}))
            for row in range(len(prompts))
        ]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        pad_token_id: Any = self.context.template.tokenizer.pad_token_id
        tensors = pad_outputs(outputs, rollout.prompt_length, rollout.response_length, pad_token_id)
        measured = [vars(output.metrics) | {"weight_version": output.weight_version} for output in outputs]
        metrics = {name: [of_row[name] for of_row in measured] for name in measured[0]}
        return DataProto.from_dict(tensors, {"__num_turns__": [o.num_turns for o in outputs]}, {"metrics": metrics})

    async def _converse(self, sampling: Mapping[str, Any], row: dict[str, Any]) -> AgentLoopOutput:
        name = row.pop("agent_name", None) or self.context.rollout.agent.default_agent_loop
        loop = get_agent_loop_class(name)(self.context, partial(self.servers.generate, request_id=uuid4().hex))
        return await loop.run(dict(sampling, seed=row.pop(SEED_KEY)), **row)


def load_tools(rollout: RolloutConfig) -> dict[str, BaseTool]:
    """The tools of ``multi_turn.tool_config_path`` by name; none where it is null."""
    path = rollout.multi_turn.tool_config_path
    return {tool.name: tool for tool in initialize_tools_from_config(path)} if path else {}
