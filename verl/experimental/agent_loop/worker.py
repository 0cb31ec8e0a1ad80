"""One process that holds many conversations at once.

In: rows of prompts, with a seed each. Out: their rollout tensors (``rows.py``), in order, and what the batch's figures
are made of. The manager runs it as a Ray actor; it does not know Ray itself, nor where the engines are.
"""

import asyncio
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol
from uuid import uuid4

import numpy as np
from transformers import PreTrainedTokenizerBase

# Imported to be known by name.
import verl.experimental.agent_loop.single_turn_agent_loop
import verl.experimental.agent_loop.tool_agent_loop  # noqa: F401
from verl.config import PPOConfig, RolloutConfig
from verl.experimental.agent_loop.base import AgentLoopContext, AgentLoopMetrics, AgentLoopOutput, get_agent_loop_class
from verl.experimental.agent_loop.chat_template import ChatTemplate
from verl.experimental.agent_loop.rows import pad_outputs
from verl.experimental.agent_loop.sampling import SEED_KEY, sampling_params
from verl.protocol import DataProto
from verl.tools.base_tool import BaseTool
from verl.tools.registry import initialize_tools_from_config
from verl.workers.rollout.replica import TokenOutput


class Servers(Protocol):
    """The engines, as one."""

    def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str
    ) -> Awaitable[TokenOutput]:
        """One turn of the conversation ``request_id``."""
        ...

    def forget(self, request_id: str) -> None:
        """The conversation is over."""
        ...


@dataclass
class WorkerResult:
    """What one worker made of its rows."""

    rows: DataProto
    metrics: list[AgentLoopMetrics]
    weight_versions: set[int]


class AgentLoopWorker:
    """Runs the agent loop that each row names, or the default one."""

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, servers: Servers) -> None:
        """Build the tools and the chat template that all conversations share.

        Raises:
            ValueError: a tool cannot be loaded, or the template does not fit tools.
        """
        rollout = config.actor_rollout_ref.rollout
        tools = load_tools(rollout)
        schemas = [tool.get_openai_tool_schema() for tool in tools.values()]
        self.context = AgentLoopContext(
            rollout, ChatTemplate(tokenizer, schemas, config.data.apply_chat_template_kwargs), tools
        )
        self.servers = servers
        self._finished_rows = 0

    async def generate_sequences(self, prompts: DataProto) -> WorkerResult:
        """Hold one conversation per row, all at once; the first failure ends them all."""
        self._finished_rows = 0
        sampling = sampling_params(self.context.rollout, bool(prompts.meta_info["validate"]))
        columns = prompts.non_tensor_batch
        tasks = [
            asyncio.create_task(self._converse(sampling, {key: values[row] for key, values in columns.items()}))
            for row in range(len(prompts))
        ]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return self._collect(outputs)

    async def finished_rows(self) -> int:
        """Rows of the current call that are done."""
        return self._finished_rows

    async def _converse(self, sampling: Mapping[str, Any], row: dict[str, Any]) -> AgentLoopOutput:
        request_id = uuid4().hex
        name = row.pop("agent_name", None) or self.context.rollout.agent.default_agent_loop
        loop = get_agent_loop_class(name)(self.context, partial(self.servers.generate, request_id=request_id))
        try:
            output = await loop.run(dict(sampling, seed=row.pop(SEED_KEY)), **row)
        finally:
            self.servers.forget(request_id)
        self._finished_rows += 1
        return output

    def _collect(self, outputs: Sequence[AgentLoopOutput]) -> WorkerResult:
        rollout, tokenizer = self.context.rollout, self.context.template.tokenizer
        pad_token_id: Any = tokenizer.pad_token_id
        tensors = pad_outputs(outputs, rollout.prompt_length, rollout.response_length, pad_token_id)
        turns = np.array([output.num_turns for output in outputs], dtype=object)
        return WorkerResult(
            DataProto.from_dict(tensors, {"__num_turns__": turns}),
            [output.metrics for output in outputs],
            {output.weight_version for output in outputs},
        )


def load_tools(rollout: RolloutConfig) -> dict[str, BaseTool]:
    """The tools of ``multi_turn.tool_config_path`` by name; none where it is null."""
    path = rollout.multi_turn.tool_config_path
    return {tool.name: tool for tool in initialize_tools_from_config(path)} if path else {}
