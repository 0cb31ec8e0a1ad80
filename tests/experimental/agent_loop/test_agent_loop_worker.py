"""One agent-loop worker on a fake engine, without Ray: which loop a row gets, its seed, its failure."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.agent_loop_fakes import prompt_rows

from verl.config import PPOConfig
from verl.experimental.agent_loop.base import WRITTEN, AgentLoopBase, AgentLoopOutput, register
from verl.experimental.agent_loop.worker import SEED_KEY, AgentLoopWorker
from verl.protocol import DataProto
from verl.workers.rollout.replica import TokenOutput


@register("two_turns_for_test")
class TwoTurns(AgentLoopBase):
    """A user's own loop: the model writes twice."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        trajectory = self.start(row, with_tools=False)
        await self.write_turn(trajectory, sampling_params)
        await self.write_turn(trajectory, sampling_params)
        return self.finish(trajectory, num_turns=3)


class EchoServers:
    """Answers with the last prompt token and the seed; the prompt ``[0]`` raises, ``[9]`` takes long."""

    def __init__(self) -> None:
        self.conversations: dict[str, int] = {}
        self.forgotten: list[str] = []
        self.cancelled = 0
        self.stops: list[int | None] = []

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> TokenOutput:
        self.stops.append(sampling_params["stop_from_id"])
        self.conversations[request_id] = self.conversations.get(request_id, 0) + 1
        if prompt_ids == [0]:
            raise RuntimeError("no more")
        if prompt_ids == [9]:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        return TokenOutput([prompt_ids[-1], sampling_params["seed"]], [-1.0, -1.0], "stop", 0)

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)


@pytest.fixture
def worker(tokenizer) -> AgentLoopWorker:
    config = PPOConfig()
    config.actor_rollout_ref.rollout.prompt_length = 4
    config.actor_rollout_ref.rollout.response_length = 6
    config.actor_rollout_ref.rollout.calculate_log_probs = True
    return AgentLoopWorker(config, tokenizer, EchoServers())


def rows(*prompts: list[int], **columns: list[Any]) -> DataProto:
    return prompt_rows(prompt_ids=prompts, **{SEED_KEY: range(50, 50 + len(prompts))}, **columns)


async def test_every_row_gets_its_loop_and_seed_in_order(worker: AgentLoopWorker) -> None:
    names = [None, "two_turns_for_test", "single_turn_agent"]
    result = await worker.generate_sequences(rows([1], [2], [3, 4], agent_name=names))
    pad = worker.context.template.tokenizer.pad_token_id
    expected = [[1, 50, pad, pad, pad, pad], [2, 51, 51, 52, pad, pad], [4, 52, pad, pad, pad, pad]]
    assert result.batch["responses"].tolist() == expected
    assert result.batch["response_mask"].sum(1).tolist() == [2, 4, 2]
    assert result.array("__num_turns__").tolist() == [2, 3, 2]
    assert sorted(worker.servers.conversations.values()) == [1, 1, 2], "a conversation keeps its id over turns"
    assert sorted(worker.servers.forgotten) == sorted(worker.servers.conversations), "each at its own end"
    metrics = result.meta_info["metrics"]
    assert metrics["weight_version"] == metrics["tool_calls"] == [0] * 3


async def test_a_horizon_is_the_budget_of_all_turns_together(worker: AgentLoopWorker) -> None:
    prompts = rows([1], agent_name=["two_turns_for_test"])
    prompts.meta_info["horizon"] = 3
    with pytest.raises(RuntimeError, match=r"wrote 2 tokens .* where max_tokens was 1"):
        await worker.generate_sequences(prompts)


async def test_answers_of_validation_are_written_to_their_end(tokenizer) -> None:
    config = PPOConfig()
    config.algorithm.adv_estimator = "on_policy_distill"
    config.actor_rollout_ref.rollout.extend_vocab_start_token = 90
    worker = AgentLoopWorker(config, tokenizer, EchoServers())
    for validate in (False, True):
        prompts = rows([1])
        prompts.meta_info["validate"] = validate
        await worker.generate_sequences(prompts)
    assert worker.servers.stops == [90, None]


async def test_the_first_failure_ends_the_other_conversations(worker: AgentLoopWorker) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        await asyncio.wait_for(worker.generate_sequences(rows([9], [0], [9])), timeout=20)
    await asyncio.sleep(0)
    assert worker.servers.cancelled == 2


async def test_a_loop_of_several_turns_is_refused_where_answers_are_carried_on(worker: AgentLoopWorker) -> None:
    """So not in validation."""
    worker.context.rollout.oversample = 2.0
    columns = {"agent_name": ["two_turns_for_test"]}
    validation = await worker.generate_sequences(rows([1], **columns))
    assert validation.array("__num_turns__").tolist() == [3]
    with pytest.raises(ValueError, match=r"the agent loop 'two_turns_for_test' does not say .*unfinished=drop"):
        await worker.generate_sequences(rows([1], **columns, **{WRITTEN: [None]}))


def test_tools_come_from_the_yaml(tokenizer, tmp_path: Path) -> None:
    config, path = PPOConfig(), tmp_path / "tools.yaml"
    path.write_text("tools: [{class_name: support.agent_loop_fakes.AddTool}]")
    config.actor_rollout_ref.rollout.multi_turn.tool_config_path = str(path)
    context = AgentLoopWorker(config, tokenizer, EchoServers()).context
    assert list(context.tools) == ["add"]
    assert context.template.end_of_turn_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_template_options_of_the_data_reach_the_conversations(tokenizer) -> None:
    config = PPOConfig()
    config.data.apply_chat_template_kwargs = {"enable_thinking": False}
    template = AgentLoopWorker(config, tokenizer, EchoServers()).context.template
    ending = tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert template.encode_prompt([{"role": "user", "content": "Why?"}], False)[-len(ending) :] == ending
