"""What every agent loop takes and returns, its way from messages to token ids, and the registry of loops by name.

In: one row of the batch (its messages or prompt ids) and an async ``generate(token_ids, sampling_params)``.
Out: an ``AgentLoopOutput``: prompt and response ids with masks and log-probs, unpadded.

A loop knows the engine as that function alone; it knows neither Ray nor which replica answers.
R: the token budget of a response over all turns, ``rollout.response_length``.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, TypeVar

from jinja2 import TemplateError
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from verl.config import RolloutConfig
from verl.experimental.agent_loop.masks import extended_token_mask, trainable_mask
from verl.single_controller.base import RolloutError
from verl.tools.base_tool import BaseTool
from verl.utils.import_utils import load_extern_type
from verl.utils.tokenizer import TOOLS_KEY, render_chat
from verl.workers.rollout.replica import ABORTED, TokenOutput

Message = Mapping[str, Any]
Generate = Callable[[list[int], dict[str, Any]], Awaitable[TokenOutput]]

# Stands for the assistant's words when a continuation is rendered; any plain text that no template contains.
_ASSISTANT_WORDS = "words-of-the-assistant"
_QUESTION = {"role": "user", "content": "question"}
_RESULT = {"role": "tool", "name": "probe", "content": "result"}


@dataclass
class AgentLoopMetrics:
    """Seconds and counts of one conversation."""

    generate_s: float = 0.0
    """Time waiting for the engine, all turns."""
    retried_requests: int = 0
    """Turns that were sent to a second replica, because the first hung."""
    unwritten_tokens: int = 0
    """What was left of the token budget where an answer ended at an extended token (``stop_at_extended_token``)."""
    tool_calls_s: float = 0.0
    """Time waiting for tools, all turns."""
    tool_calls: int = 0
    """Calls that were answered, failed ones included."""
    tool_errors: int = 0
    """Calls of known tools that raised."""
    unknown_tools: int = 0
    """Calls of tools that do not exist."""
    malformed_calls: int = 0
    """Calls that could not be read."""
    dropped_calls: int = 0
    """Calls of a turn beyond ``multi_turn.max_parallel_calls``: not run."""
    rewritten_turns: int = 0
    """Turns with calls that the chat template would show otherwise than they were sampled; the sampled tokens stay."""
    typed_special_tokens: int = 0
    """Tool results that hold special tokens as text, which become real ones."""
    tool_reward: float = 0.0
    """Sum of what the tools returned as reward; measured, not trained on."""


@dataclass
class AgentLoopOutput:
    """One finished conversation. The four response lists (log-probs where kept) have one entry per response token."""

    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    """1 for tokens that are trained on (``masks.trainable_mask``)."""
    distill_special_token_mask: list[int]
    """1 for extended tokens of the model, of tools and of users."""
    response_logprobs: list[float] | None
    """The sampler's log-probs, 0 at tokens that it did not sample; None where the run does not keep them."""
    num_turns: int
    """Turns of prompt, model and tools together; 2 for a plain answer."""
    metrics: AgentLoopMetrics
    weight_version: int | None
    """Version of the weights that wrote the oldest turn of this batch; None: it wrote nothing."""
    has_ended: bool = True
    """False where the answer was cut short, as enough others had ended (``rollout.oversample``)."""


WRITTEN = "written"
"""Key of a row: its `Written`, or None."""


@dataclass
class Written:
    """What earlier batches wrote of an answer; all of it, where other answers to its prompt have not ended yet."""

    token_ids: list[int]
    log_probs: list[float] | None
    steps: list[int]
    """For each token, the step after which its weights were sent; 0: those of the start."""
    has_ended: bool


class CutShort(Exception):
    """The engine was told to end the request before the answer's end."""

    def __init__(self, trajectory: "Trajectory") -> None:
        super().__init__()
        self.trajectory = trajectory


@dataclass
class Trajectory:
    """A response in the making: tokens of the model and of tools, in order."""

    prompt_ids: list[int]
    remaining_tokens: int
    """What is left of the response's token budget."""
    log_probs: list[float] | None
    """None: they are not kept."""
    response_ids: list[int] = field(default_factory=list)
    model_mask: list[int] = field(default_factory=list)
    weight_versions: list[int] = field(default_factory=list)
    carried: int = 0
    """Tokens that an earlier batch wrote."""
    has_ended: bool = False
    """Whether what earlier batches wrote is already the whole answer."""

    def carry_on(self, written: Written) -> None:
        """Begin with what an earlier batch wrote, as far as the budget goes."""
        self.carried = min(len(written.token_ids), self.remaining_tokens)
        self.has_ended = written.has_ended or self.carried == self.remaining_tokens
        self._append(written.token_ids[: self.carried], 1, (written.log_probs or [])[: self.carried])

    def add_model_turn(self, turn: TokenOutput) -> None:
        """Append what the model wrote."""
        written, log_probs = len(turn.token_ids), turn.log_probs or []
        if written > self.remaining_tokens or (self.log_probs is not None and len(log_probs) != written):
            raise RolloutError(
                f"the engine wrote {written} tokens with {len(log_probs)} log-probs where max_tokens was "
                f"{self.remaining_tokens}"
            )
        self._append(turn.token_ids, 1, log_probs)
        self.weight_versions.append(turn.weight_version)

    def add_other_turn(self, token_ids: Sequence[int]) -> None:
        """Append what tools or users wrote: read by the model, never trained on."""
        self._append(token_ids, 0, [0.0] * len(token_ids))

    def _append(self, token_ids: Sequence[int], by_model: int, log_probs: Sequence[float]) -> None:
        self.response_ids += token_ids
        self.model_mask += [by_model] * len(token_ids)
        self.remaining_tokens -= len(token_ids)
        if self.log_probs is not None:
            self.log_probs += log_probs


class ChatTemplate:
    """Messages to token ids, with the tools and options of this run: a prompt, and the tool turn that continues it.

    The model's own tokens are never decoded and encoded again: its text may have several tokenisations, and only the
    one it sampled has the log-probs that training needs. So a tool turn is encoded alone, as the text that the chat
    template puts after an assistant's words. That text begins with the token that ends the assistant's turn, a token of
    its own that no tokenisation merges with its neighbours; the model has written it already, and the rest is appended
    to its tokens. Prompt, model tokens and appended tokens together are what the template yields for the same
    conversation, wherever the model's text has only the tokenisation that it sampled and the template shows it
    unchanged. Where it shows it otherwise (a call inside an open thought, say, gets an empty thought before it), the
    sampled tokens stay.

    Special tokens that a tool's result holds as text become real ones, as those that a prompt holds do.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tool_schemas: Sequence[Mapping[str, Any]] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Hold the parts; with tools, find the token that ends an assistant's turn.

        Args:
            tool_schemas: OpenAI function schemas shown to the model.
            template_kwargs: options of the template, such as ``enable_thinking``.

        Raises:
            ValueError: there are tools, and the template does not fit them.
        """
        self.tokenizer = tokenizer
        self.tool_schemas: list[Any] = [dict(schema) for schema in tool_schemas]
        self.template_kwargs = dict(template_kwargs or {})
        self.end_of_turn_id: int | None = None
        if self.tool_schemas:
            try:
                ids, problem = self._continuation([_RESULT]), "ends an assistant's turn with no special token"
            except (TemplateError, TypeError, ValueError) as error:
                ids, problem = [], f"takes no message of a tool ({error})"
            # Added tokens are cut out of a text before any merge, so no neighbour can change this one.
            if not ids or ids[0] not in tokenizer.added_tokens_decoder:
                raise ValueError(f"the chat template of {tokenizer.name_or_path} {problem}; unset {TOOLS_KEY}")
            self.end_of_turn_id = ids[0]

    def encode_prompt(self, messages: Sequence[Message], with_tools: bool) -> list[int]:
        """Ids of the conversation up to where the assistant begins to write."""
        return self._encode(self._render(messages, self.tool_schemas if with_tools else []))

    def encode_tool_turn(self, messages: Sequence[Message]) -> list[int]:
        """Ids between the assistant's end-of-turn token and the start of its next turn: ``messages`` of tools."""
        return self._continuation(messages)[1:]

    def shows_unchanged(self, words: str) -> bool:
        """Whether the template shows an assistant's turn before a tool's as the model wrote it after the opening."""
        turns = [_QUESTION, {"role": "assistant", "content": words}, _RESULT]
        return self._render(turns, self.tool_schemas).startswith(self._render([_QUESTION], self.tool_schemas) + words)

    def _continuation(self, messages: Sequence[Message]) -> list[int]:
        opening = [_QUESTION, {"role": "assistant", "content": _ASSISTANT_WORDS}]
        return self._encode(self._render([*opening, *messages], self.tool_schemas).partition(_ASSISTANT_WORDS)[2])

    def _render(self, messages: Sequence[Message], tool_schemas: list[Any]) -> str:
        return render_chat(self.tokenizer, messages, tool_schemas, self.template_kwargs)

    def _encode(self, text: str) -> list[int]:
        # The template has written the special tokens already.
        return self.tokenizer.encode(text, add_special_tokens=False)


@dataclass(frozen=True)
class AgentLoopContext:
    """What all conversations of one agent-loop worker share."""

    rollout: RolloutConfig
    template: ChatTemplate
    tools: Mapping[str, BaseTool] = field(default_factory=dict)
    failed_tools: set[str] = field(default_factory=set)
    """Tools whose first failure was logged."""


IN_PLACE_OF = {
    "server_manager": "trajectory = self.start(row, with_tools), for each turn of the model await self.write_turn("
    "trajectory, sampling_params), for others trajectory.add_other_turn(token_ids), and return self.finish(trajectory, "
    "num_turns)",
    "tokenizer": "self.context.template.tokenizer",
    "config": "self.context.rollout, which is actor_rollout_ref.rollout",
    "loop": "asyncio.get_running_loop()",
}
"""What a loop writes here, by the attributes that loops for verl have."""


@dataclass
class AgentLoopBase(ABC):
    """One conversation; a new object for each, so that a loop may keep its state on itself."""

    context: AgentLoopContext
    generate: Generate
    metrics: AgentLoopMetrics = field(default_factory=AgentLoopMetrics)
    teacher_knows_extended: bool = False
    """Whether this row's teacher knows item tokens; the masks then keep what follows them."""
    writes_one_turn: ClassVar[bool] = False
    """Whether an answer is one turn of the model, so that one that was cut short can be carried on."""

    def __getattr__(self, name: str) -> Any:
        """Called for an attribute that does not exist: the error names what to write in its place."""
        instead = f"; in its place write {IN_PLACE_OF[name]}" if name in IN_PLACE_OF else ""
        raise AttributeError(f"the agent loop {type(self).__name__} has no {name!r}{instead}", name=name, obj=self)

    @abstractmethod
    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        """Hold the conversation that ``row`` (the batch row's non-tensor values) opens, to its end."""

    def start(self, row: Mapping[str, Any], with_tools: bool) -> Trajectory:
        """The prompt, ready for the first turn: ``prompt_ids`` of the row where given, else its templated messages.

        Raises:
            ValueError: the prompt has more than ``rollout.prompt_length`` tokens.
        """
        self.teacher_knows_extended = bool(row.get("teacher_knows_extended"))
        prompt_ids = row.get("prompt_ids")
        if prompt_ids is None:
            prompt_ids = self.context.template.encode_prompt(row["raw_prompt"], with_tools)
        rollout = self.context.rollout
        if len(prompt_ids) > rollout.prompt_length:
            raise ValueError(
                f"the prompt of row {row.get('index')} has {len(prompt_ids)} tokens, above data.max_prompt_length="
                f"{rollout.prompt_length}; raise it, or set data.filter_overlong_prompts=True"
            )
        log_probs: list[float] | None = [] if rollout.calculate_log_probs else None
        trajectory = Trajectory(list(prompt_ids), rollout.response_length, log_probs)
        if (written := row.get(WRITTEN)) is not None:
            trajectory.carry_on(written)
        return trajectory

    async def write_turn(self, trajectory: Trajectory, sampling_params: Mapping[str, Any]) -> list[int]:
        """Let the model write one turn within what is left of the budget; returns the turn's tokens.

        Every turn has its own seed. Of a turn that is carried on, only the new tokens are returned; of an answer that
        has ended, none.

        Raises:
            CutShort: enough other answers have ended; a loop lets it through.
        """
        if trajectory.has_ended:
            return []
        params = dict(sampling_params, max_tokens=trajectory.remaining_tokens)
        if trajectory.carried:
            params["place"] = trajectory.carried
        params["seed"] += len(trajectory.weight_versions)
        if self.teacher_knows_extended:  # what follows an item is trained too
            params["stop_from_id"] = None
        started = time.perf_counter()
        turn = await self.generate(trajectory.prompt_ids + trajectory.response_ids, params)
        self.metrics.generate_s += time.perf_counter() - started
        self.metrics.retried_requests += turn.retries
        if turn.stop_reason != ABORTED or turn.token_ids:
            trajectory.add_model_turn(turn)
        if turn.stop_reason == ABORTED:
            raise CutShort(trajectory)
        if self.is_over(turn.token_ids, sampling_params):
            self.metrics.unwritten_tokens += trajectory.remaining_tokens
        return turn.token_ids

    def is_over(self, token_ids: Sequence[int], sampling_params: Mapping[str, Any]) -> bool:
        """Whether nothing after these tokens, of the model or of a tool, would be trained."""
        first = sampling_params.get("stop_from_id")
        return first is not None and not self.teacher_knows_extended and max(token_ids, default=-1) >= first

    def finish(self, trajectory: Trajectory, num_turns: int) -> AgentLoopOutput:
        """Close the conversation: its masks over all turns."""
        rollout = self.context.rollout
        extended = extended_token_mask(trajectory.response_ids, rollout.extend_start)
        return AgentLoopOutput(
            prompt_ids=trajectory.prompt_ids,
            response_ids=trajectory.response_ids,
            response_mask=trainable_mask(
                trajectory.model_mask,
                extended,
                drop_whole=rollout.mask_response_if_have_extend_token and not self.teacher_knows_extended,
                keep_rest=self.teacher_knows_extended or not rollout.mask_after_extend_token,
            ),
            distill_special_token_mask=extended,
            response_logprobs=trajectory.log_probs,
            num_turns=num_turns,
            metrics=self.metrics,
            weight_version=min(trajectory.weight_versions, default=None),
        )


_AGENT_LOOPS: dict[str, Callable[..., AgentLoopBase]] = {}
_Loop = TypeVar("_Loop", bound=type[AgentLoopBase])


def register(agent_name: str) -> Callable[[_Loop], _Loop]:
    """Class decorator: rows whose ``agent_name`` is this name run the class."""

    def add(loop_class: _Loop) -> _Loop:
        _AGENT_LOOPS[agent_name] = loop_class
        return loop_class

    return add


def load_agent_loops(path: str | None) -> None:
    """Register the loops that ``rollout.agent.agent_loop_config_path`` lists; further entries of one are arguments.

    Raises:
        ValueError: the file, an entry or a class cannot be read.
    """
    try:
        entries: Any = OmegaConf.load(path) if path else []
        for options in map(dict, entries):
            name, loop_class = options.pop("name"), load_extern_type(*options.pop("_target_").rsplit(".", 1))
            _AGENT_LOOPS[name] = partial(loop_class, **options)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        key = f"actor_rollout_ref.rollout.agent.agent_loop_config_path={path}"
        raise ValueError(f"{key}: {error}; list entries such as {{name: mine, _target_: my_module.MyLoop}}") from error


def get_agent_loop_class(agent_name: str) -> Callable[..., AgentLoopBase]:
    """The loop registered as ``agent_name``, or what makes one.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if agent_name not in _AGENT_LOOPS:
        known = ", ".join(sorted(_AGENT_LOOPS))
        raise ValueError(
            f"agent loop {agent_name!r} (a row's agent_name, or actor_rollout_ref.rollout.agent.default_agent_loop) is "
            f"unknown; use one of {known}, or have actor_rollout_ref.model.external_lib import what registers it"
        )
    return _AGENT_LOOPS[agent_name]
