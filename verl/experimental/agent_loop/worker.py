"""One process that holds many conversations at once, and its way to the engines.

In: rows of prompts, with a seed each. Out: their rollout tensors (``verl/protocol.py``), in order, and what was
measured of the conversations. Plain classes: the manager decides where they run.

A seed comes from the run's seed, the step, the row's ``uid`` and its number among the answers to that prompt, so
neither the number of agent-loop workers nor the order of the prompts changes a sample.
Prompts are padded on the left and responses on the right to fixed lengths; padding is 0 in every mask and float tensor.

A request goes to the replica with the fewest in flight. A replica that leaves it unanswered and finishes no other for
``timeout_s`` counts as hanging: the request is cancelled there and sent to another replica, once. A long queue or one
long answer among others does not count.

::

    send ──► answer (enough prompts are answered: the others' requests are aborted, and answer with what is written)
     └─ nothing for timeout_s ──► cancel, send to another replica ──► answer, counted as retried
                                   │ (there is none)                └─ nothing ──► RolloutError that names both
                                   └──► RolloutError with the request's id

B conversations, P prompt, R response, T = P + R.
"""

import asyncio
import hashlib
import itertools
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from ray.exceptions import RayError
from transformers import PreTrainedTokenizerBase

import verl.experimental.agent_loop.tool_agent_loop  # noqa: F401 (registers the loops)
from verl.config import HorizonConfig, PPOConfig, RolloutConfig
from verl.experimental.agent_loop.base import (
    WRITTEN,
    AgentLoopContext,
    AgentLoopOutput,
    ChatTemplate,
    CutShort,
    RolloutError,
    get_agent_loop_class,
    load_agent_loops,
)
from verl.experimental.agent_loop.replica_client import ReplicaClient
from verl.protocol import DataProto
from verl.single_controller.ray.calls import Remote, is_by_user
from verl.tools.base_tool import BaseTool, initialize_tools_from_config
from verl.tools.schemas import schema_dict
from verl.workers.rollout.replica import ABORTED, TokenOutput

logger = logging.getLogger(__name__)

SEED_KEY = "sample_seed"
"""Column that carries the seeds from the manager to the agent-loop workers."""
TAKEN, ENDED = "taken", "has_ended"
"""Columns where more prompts are asked than wanted: whether the row's prompt is taken, whether its answer has ended."""


class AgentLoopWorker:
    """Runs the agent loop that each row names, or the default one."""

    def __init__(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase, servers: "AsyncLLMServerManager") -> None:
        """Build the tools and the chat template that all conversations share.

        Raises:
            ValueError: a tool or a loop cannot be loaded, or the template does not fit tools.
        """
        rollout = config.actor_rollout_ref.rollout
        tools = load_tools(rollout)
        load_agent_loops(rollout.agent.agent_loop_config_path)
        self.context = AgentLoopContext(rollout, chat_template(config, tokenizer, tools), tools)
        self.servers = servers
        self._stop_from_id = rollout.extend_start if config.stops_at_extended else None

    async def check_alive(self) -> None:
        """Answers once the worker is built."""

    async def generate_sequences(self, prompts: DataProto) -> DataProto:
        """Hold one conversation per row, all at once; the first failure ends them all.

        With ``meta_info["wanted"]``, once all ``n`` answers to so many prompts have ended, the others are cut short.

        Returns:
            The rollout's keys, with ``wanted`` also `TAKEN` and `ENDED`; ``meta_info["metrics"]`` lists what was
            measured, and the weight version, row by row.
        """
        rollout, columns = self.context.rollout, prompts.non_tensor_batch
        validate = bool(prompts.meta_info["validate"])
        # Answers of validation are written to their end: they are measured, not trained.
        sampling = sampling_params(rollout, validate) | {"stop_from_id": None if validate else self._stop_from_id}
        context = self.context
        if horizon := prompts.meta_info.get("horizon"):
            # Loops take their budget from there; rows are padded to the run's own length all the same.
            limited = replace(rollout, response_length=horizon, horizon=HorizonConfig())
            context = replace(context, rollout=limited)
        began_s, wanted = time.monotonic(), prompts.meta_info.get("wanted", 0)
        names, prompt_of = [uuid4().hex for _ in range(len(prompts))], [row // rollout.n for row in range(len(prompts))]
        under_way, left, taken = set(names), Counter(prompt_of), set[int]()

        async def answer(row: int) -> AgentLoopOutput:
            output = await self._converse(context, sampling, {key: of[row] for key, of in columns.items()}, names[row])
            if not (wanted or output.has_ended):
                raise RolloutError("an engine ended an answer early, and nobody had asked it to")
            under_way.remove(names[row])
            if len(taken) < wanted:
                left[prompt_of[row]] -= output.has_ended
                if not left[prompt_of[row]]:
                    taken.add(prompt_of[row])
                if len(taken) == wanted:
                    self.servers.cut_short(under_way)
            return output

        tasks = [asyncio.create_task(answer(row)) for row in range(len(prompts))]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            # gather leaves the others running when one fails.
            for task in tasks:
                task.cancel()
        pad_token_id: Any = self.context.template.tokenizer.pad_token_id
        tensors = pad_outputs(outputs, rollout.prompt_length, rollout.response_length, pad_token_id)
        of_call = {"call_s": time.monotonic() - began_s}
        measured = [vars(output.metrics) | of_call | {"weight_version": output.weight_version} for output in outputs]
        metrics = {name: [of_row[name] for of_row in measured] for name in measured[0]}
        arrays: dict[str, Any] = {"__num_turns__": [output.num_turns for output in outputs]}
        if wanted:
            arrays |= {TAKEN: [of in taken for of in prompt_of], ENDED: [output.has_ended for output in outputs]}
        return DataProto.from_dict(tensors, arrays, {"metrics": metrics})

    async def _converse(
        self, context: AgentLoopContext, sampling: Mapping[str, Any], row: dict[str, Any], conversation: str
    ) -> AgentLoopOutput:
        name = row.pop("agent_name", None) or context.rollout.agent.default_agent_loop
        if WRITTEN in row:
            check_carries({name}, context.rollout)
        loop = get_agent_loop_class(name)(context, partial(self.servers.generate, request_id=conversation))
        try:
            return await loop.run(dict(sampling, seed=row.pop(SEED_KEY)), **row)
        except CutShort as cut:
            return replace(loop.finish(cut.trajectory, num_turns=2), has_ended=False)
        finally:
            self.servers.forget(conversation)


def chat_template(config: PPOConfig, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, BaseTool]) -> ChatTemplate:
    """That of all conversations; ValueError where it does not fit the tools."""
    schemas = [schema_dict(tool.get_openai_tool_schema()) for tool in tools.values()]
    return ChatTemplate(tokenizer, schemas, config.data.apply_chat_template_kwargs)


def check_carries(names: Set[str], rollout: RolloutConfig) -> None:
    """ValueError where answers of these agent loops are to be carried on, and one may write several turns."""
    for name in names if rollout.carries else ():
        loop: Any = get_agent_loop_class(name)
        if not getattr(loop, "func", loop).writes_one_turn:
            raise ValueError(
                f"actor_rollout_ref.rollout.oversample carries on answers of a single turn, and the agent loop {name!r}"
                " does not say that it writes such; set actor_rollout_ref.rollout.unfinished=drop, or writes_one_turn ="
                " True in its class"
            )


def load_tools(rollout: RolloutConfig) -> dict[str, BaseTool]:
    """The tools of ``multi_turn.tool_config_path`` by name; none where it is null."""
    path = rollout.multi_turn.tool_config_path
    return {tool.name: tool for tool in initialize_tools_from_config(path)} if path else {}


# ------------------------------------------------------------------ rows to conversations and back


def sampling_params(rollout: RolloutConfig, validate: bool) -> dict[str, Any]:
    """Sampling parameters for training, or for validation (``rollout.val_kwargs``); ``seed`` comes with each row."""
    settings = rollout.val_kwargs if validate else rollout
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    if validate and not rollout.val_kwargs.do_sample:
        sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": -1}
    return {**sampling, "ignore_eos": rollout.ignore_eos, "logprobs": rollout.calculate_log_probs}


def sample_seeds(seed: int, prompts: DataProto) -> list[int]:
    """One seed per row, below 2^31."""
    step, validate = prompts.meta_info["global_steps"], bool(prompts.meta_info["validate"])
    answers: Counter[Any] = Counter()
    seeds = []
    for uid in prompts.array("uid"):
        text = f"{seed}|{step}|{validate}|{uid}|{answers[uid]}"
        answers[uid] += 1
        seeds.append(int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1)
    return seeds


def pad_outputs(
    outputs: Sequence[AgentLoopOutput], prompt_length: int, response_length: int, pad_token_id: int
) -> dict[str, torch.Tensor]:
    """The tensors of ``outputs``, row by row.

    Returns:
        ``prompts`` (B, P), ``responses``, ``response_mask``, ``distill_special_token_mask`` (B, R), ``input_ids``,
        ``attention_mask``, ``position_ids`` (B, T), all int64; ``rollout_log_probs`` (B, R) float32 where every output
        has log-probs.
    """
    prompts = _pad([output.prompt_ids for output in outputs], prompt_length, pad_token_id, left=True)
    responses = _pad([output.response_ids for output in outputs], response_length, pad_token_id)
    prompt_lengths = torch.tensor([len(output.prompt_ids) for output in outputs])[:, None]
    response_lengths = torch.tensor([len(output.response_ids) for output in outputs])[:, None]
    in_prompt = torch.arange(prompt_length) >= prompt_length - prompt_lengths
    attention_mask = torch.cat([in_prompt, torch.arange(response_length) < response_lengths], dim=1).long()
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "response_mask": _pad([output.response_mask for output in outputs], response_length, 0),
        "distill_special_token_mask": _pad([o.distill_special_token_mask for o in outputs], response_length, 0),
        "input_ids": torch.cat([prompts, responses], dim=1),
        "attention_mask": attention_mask,
        # Counted from the first real token; padding before it, which no mask lets in, stays at 0.
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    log_probs = [output.response_logprobs for output in outputs if output.response_logprobs is not None]
    if len(log_probs) == len(outputs):
        tensors["rollout_log_probs"] = _pad(log_probs, response_length, 0.0)
    return tensors


def _pad(
    rows: Sequence[Sequence[int]] | Sequence[Sequence[float]], length: int, pad: int | float, *, left: bool = False
) -> torch.Tensor:
    fills = [[pad] * (length - len(row)) for row in rows]
    return torch.tensor([[*fill, *row] if left else [*row, *fill] for fill, row in zip(fills, rows, strict=True)])


def batch_metrics(measured: Mapping[str, Sequence[float]], with_tools: bool) -> dict[str, float]:
    """Metrics of a batch; those of tools only where there are tools.

    Args:
        measured: per field of ``AgentLoopMetrics`` one value per conversation.
    """
    spreads = {"timing_s/agent_loop/generate_sequences": "generate_s"}
    counts = ["retried_requests", "unwritten_tokens"]
    if with_tools:
        spreads |= {"timing_s/agent_loop/tool_calls": "tool_calls_s", "agent_loop/tool_reward": "tool_reward"}
        counts += ["tool_calls", "tool_errors", "unknown_tools", "malformed_calls", "dropped_calls"]
        counts += ["rewritten_turns", "typed_special_tokens"]
    metrics = {f"agent_loop/{name}": float(sum(measured[name])) for name in counts}
    for name, field in spreads.items():
        values = measured[field]
        metrics |= {f"{name}/min": min(values), f"{name}/mean": sum(values) / len(values), f"{name}/max": max(values)}
    return metrics


# ------------------------------------------------------------------ the engines


class AsyncLLMServerManager:
    """The replicas as one async engine, for the conversations of one worker.

    A conversation starts on the replica with the fewest requests in flight and stays there, where the cache holds its
    earlier turns, unless that replica hangs.
    """

    def __init__(self, replicas: Sequence[Remote], first: int = 0, timeout_s: float | None = None) -> None:
        """
        Args:
            first: the replica to begin with among equally busy ones; each worker begins with another.
            timeout_s: see the module; None: no limit.
        """
        self._replicas = [ReplicaClient(replica) for replica in (*replicas[first:], *replicas[:first])]
        self._chosen: dict[str, ReplicaClient] = {}
        self._requests: dict[str, ReplicaClient] = {}
        """Replica of each request that is under way."""
        self._cut_short: set[str] = set()
        # Makes a request's id unique: the engine may still be closing the conversation's last turn.
        self._numbers = itertools.count(1)
        self._timeout_s = math.inf if timeout_s is None else timeout_s

    async def generate(self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str) -> TokenOutput:
        """One turn of the conversation ``request_id``; after `cut_short`, only what was written until then.

        Raises:
            RolloutError: the replica failed, or two of them hang; names them, the request and the cause.
        """
        left, silences = list(self._replicas), []
        for retries in range(min(2, len(left))):
            if request_id in self._cut_short:
                return TokenOutput([], [], ABORTED, 0)
            chosen = self._chosen.get(request_id)
            if chosen is None or chosen not in left or chosen.is_avoided:
                chosen = min(left, key=lambda client: (client.is_avoided, client.in_flight))
            self._chosen[request_id] = chosen
            left.remove(chosen)
            try:
                return replace(await self._send(chosen, prompt_ids, sampling_params, request_id), retries=retries)
            except TimeoutError as silence:
                logger.warning("%s", silence)
                silences.append(str(silence))
        raise RolloutError("; ".join(silences))

    def cut_short(self, conversations: Set[str]) -> None:
        """End what is being written for these, and write nothing more for them until they are over."""
        self._cut_short |= conversations
        of_client = defaultdict[ReplicaClient, list[str]](list)
        for own_id, client in self._requests.items():
            if own_id.rpartition("-")[0] in self._cut_short:
                of_client[client].append(own_id)
        calls = [client.abort(own_ids) for client, own_ids in of_client.items()]
        # Not waited for: a replica that fails or hangs is named by the requests that it leaves.
        self._aborts = asyncio.gather(*calls, return_exceptions=True)

    def forget(self, request_id: str) -> None:
        """The conversation is over."""
        self._chosen.pop(request_id, None)
        self._cut_short.discard(request_id)

    async def _send(
        self, client: ReplicaClient, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str
    ) -> TokenOutput:
        """One request to one replica; a TimeoutError that names both where it hangs."""
        replica, own_id = client.remote, f"{request_id}-{next(self._numbers)}"
        client.in_flight += 1
        answer, sent_at = client.ask(prompt_ids, sampling_params, own_id), time.monotonic()
        self._requests[own_id] = client
        try:
            while not answer.done():
                left = max(sent_at, client.answered_at) + self._timeout_s - time.monotonic()
                if left <= 0:
                    client.cancel(own_id)
                    client.avoid_until = time.monotonic() + self._timeout_s
                    raise TimeoutError(
                        f"request {own_id} was not answered by {replica.name}, which finished nothing for "
                        f"actor_rollout_ref.rollout.timeout_s={self._timeout_s:g} s"
                    )
                # Not wait_for, which cancels what it waits for when its time is over.
                await asyncio.wait({answer}, timeout=left)
            output = answer.result()
        except RayError as error:
            account = replica.account_of(error, await replica.log_async())
            message = f"{replica.name} failed to generate: {account}"
            raise RolloutError(message, by_user=is_by_user(error)) from error
        finally:
            # Reached too where this conversation is cancelled because another one failed.
            answer.cancel()
            client.in_flight -= 1
            del self._requests[own_id]
        client.answered_at, client.avoid_until = time.monotonic(), 0.0
        return output
