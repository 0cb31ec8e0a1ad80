"""A scripted engine and small tools for the agent-loop tests."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from verl.config import MultiTurnConfig, RolloutConfig
from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopContext, AgentLoopOutput, ChatTemplate
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
from verl.protocol import DataProto
from verl.tools.base_tool import BaseTool, ToolResponse
from verl.tools.schemas import schema_dict
from verl.workers.rollout.replica import TokenOutput

MESSAGES = [{"role": "user", "content": "How many apples?"}]
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "ignore_eos": False, "logprobs": True, "seed": 10}
END = "<|im_end|>"


def schema(name: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"first": {"type": "integer"}, "second": {"type": "integer"}}}
    return {"type": "function", "function": {"name": name, "description": "a tool", "parameters": parameters}}


class AddTool(BaseTool):
    """Adds two numbers; brings its schema along."""

    def get_openai_tool_schema(self) -> dict[str, Any]:
        return schema("add")

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any):
        return ToolResponse(text=str(parameters["first"] + parameters["second"])), 0.5, {}


class TextTool(BaseTool):
    """Answers with the text of its config."""

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any):
        return ToolResponse(text=self.config["text"]), None, {}


class CounterTool(BaseTool):
    """Counts the calls of a conversation, from ``start``; remembers what was created, released and cancelled.

    Its config may name the step in which it ``hangs``.
    """

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any] | None = None) -> None:
        super().__init__(config, tool_schema or schema("count"))
        self.counts: dict[str, int] = {}
        self.released: list[str] = []
        self.cancelled = 0

    async def _hang(self, step: str) -> None:
        if self.config.get("hangs") == step:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise

    async def create(self, instance_id: str | None = None, start: int = 0, **kwargs: Any):
        await self._hang("create")
        instance_id, response = await super().create(instance_id)
        self.counts[instance_id] = start
        return instance_id, response

    async def execute(self, instance_id: str, parameters: dict[str, Any], by: int = 1, **kwargs: Any):
        await self._hang("execute")
        self.counts[instance_id] += by
        return ToolResponse(text=f"count {self.counts[instance_id]}"), 1.0, {}

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        await self._hang("release")
        self.released.append(instance_id)


class ScriptedEngine:
    """Writes the given turns, one a call: text is encoded, ids are taken as they are; cut to ``max_tokens``.

    The log-prob of the k-th token it ever writes is -k.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, turns: list[str | list[int]]) -> None:
        self.turns = [tokenizer.encode(t, add_special_tokens=False) if isinstance(t, str) else t for t in turns]
        self.requests: list[tuple[list[int], dict[str, Any]]] = []
        self.written = 0

    async def __call__(self, token_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        turn = self.turns[len(self.requests)][: sampling_params["max_tokens"]]
        self.requests.append((list(token_ids), dict(sampling_params)))
        log_probs = [-float(self.written + place) for place in range(len(turn))]
        self.written += len(turn)
        return TokenOutput(
            token_ids=turn,
            log_probs=log_probs if sampling_params["logprobs"] else None,
            stop_reason="stop",
            weight_version=3,
        )


def make_context(
    tokenizer: PreTrainedTokenizerBase,
    tools: Sequence[BaseTool] = (),
    multi_turn: MultiTurnConfig | None = None,
    **rollout: Any,
) -> AgentLoopContext:
    settings = {"prompt_length": 400, "response_length": 300, "calculate_log_probs": True} | rollout
    config = RolloutConfig(multi_turn=multi_turn or MultiTurnConfig(), **settings)
    template = ChatTemplate(tokenizer, [schema_dict(tool.get_openai_tool_schema()) for tool in tools])
    return AgentLoopContext(config, template, {tool.name: tool for tool in tools})


async def converse(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[str | list[int]],
    tools: Sequence[BaseTool] = (),
    multi_turn: MultiTurnConfig | None = None,
    loop: type[AgentLoopBase] = ToolAgentLoop,
    row: dict[str, Any] | None = None,
    **rollout: Any,
) -> tuple[AgentLoopOutput, ScriptedEngine]:
    """A conversation in which the model writes ``turns``, and the engine that wrote them."""
    engine = ScriptedEngine(tokenizer, turns)
    context = make_context(tokenizer, tools, multi_turn, **rollout)
    sampling = SAMPLING | {"logprobs": context.rollout.calculate_log_probs}
    values = {"raw_prompt": MESSAGES, "index": 7} | (row or {})
    return await loop(context, engine).run(sampling, **values), engine


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def prompt_rows(**columns: Any) -> DataProto:
    """A batch of prompts, from any sequences."""
    arrays = {key: np.empty(len(column), dtype=object) for key, column in columns.items()}
    for key, column in columns.items():
        arrays[key][:] = list(column)
    return DataProto.from_dict(non_tensors=arrays, meta_info={"global_steps": 1, "validate": False})
