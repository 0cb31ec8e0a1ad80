"""Conversations with a scripted engine: its requests, the tokens that come out, and their masks, turn by turn."""

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from support.agent_loop_fakes import (
    END,
    MESSAGES,
    SAMPLING,
    AddTool,
    CounterTool,
    ScriptedEngine,
    TextTool,
    call,
    converse,
    make_context,
    schema,
)
from support.chat_files import EXTEND_START

from verl.config import MultiTurnConfig
from verl.experimental.agent_loop.base import WRITTEN, AgentLoopBase, AgentLoopOutput, CutShort, RolloutError, Written
from verl.experimental.agent_loop.tool_agent_loop import SingleTurnAgentLoop, ToolAgentLoop
from verl.tools.base_tool import BaseTool
from verl.tools.schemas import OpenAIFunctionToolSchema
from verl.utils.rollout_trace import rollout_trace_op
from verl.workers.rollout.replica import TokenOutput

ADD = call("add", '{"first": 2, "second": 3}')
ADD_TOOL = (AddTool({}, None),)
COUNT = call("count")


def lengths(engine: ScriptedEngine) -> list[int]:
    """Tokens of each model turn."""
    return [len(turn) for turn in engine.turns]


# ---------------------------------------------------------------------------------------------------- single turn


@pytest.mark.parametrize("loop", [SingleTurnAgentLoop, ToolAgentLoop])
async def test_a_plain_answer(tokenizer, loop) -> None:
    output, engine = await converse(tokenizer, ["Tom has 7 apples." + END], loop=loop)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert engine.requests == [(prompt, SAMPLING | {"max_tokens": 300})]
    answer = tokenizer.encode("Tom has 7 apples." + END)
    assert (output.prompt_ids, output.response_ids) == (prompt, answer)
    assert output.response_mask == [1] * len(answer)
    assert output.distill_special_token_mask == [0] * len(answer)
    assert output.response_logprobs == [-float(place) for place in range(len(answer))]
    assert (output.num_turns, output.weight_version) == (2, 3)


@pytest.mark.parametrize(
    ("drawing", "settings", "row", "trainable"),
    [
        ("mMmM", {}, {}, "1100"),
        ("", {}, {}, ""),
        ("mMmm", {"mask_response_if_have_extend_token": True}, {}, "0000"),
        ("mMmMm", {"mask_after_extend_token": False}, {}, "11111"),
        ("mMmMm", {}, {"teacher_knows_extended": True}, "11111"),
        ("mMmMm", {"mask_response_if_have_extend_token": True}, {"teacher_knows_extended": True}, "11111"),
    ],
)
@pytest.mark.parametrize("loop", [SingleTurnAgentLoop, ToolAgentLoop])
async def test_masks_of_one_turn(tokenizer, loop, drawing, settings, row, trainable) -> None:
    turn = [EXTEND_START + place if letter == "M" else 40 + place for place, letter in enumerate(drawing)]
    output, _ = await converse(tokenizer, [turn], loop=loop, row=row, extend_vocab_start_token=EXTEND_START, **settings)
    assert output.response_ids == turn, "an extended token ends nothing"
    assert output.response_mask == [int(digit) for digit in trainable]
    assert output.distill_special_token_mask == [int(letter == "M") for letter in drawing]


async def test_a_prompt_of_ids_is_taken_as_it_is_and_log_probs_may_be_left_out(tokenizer) -> None:
    row = {"raw_prompt": None, "prompt_ids": [5, 6, 7]}
    output, _ = await converse(tokenizer, [END], row=row, calculate_log_probs=False)
    assert output.prompt_ids == [5, 6, 7]
    assert output.response_logprobs is None


@pytest.mark.parametrize(("ids", "log_probs"), [([1, 2], None), ([1, 2], [-1.0]), ([1, 2, 3], [-1.0, -1.0, -1.0])])
async def test_an_engine_that_answers_wrongly_is_named(tokenizer, ids, log_probs) -> None:
    async def broken(token_ids: list[int], sampling_params: dict[str, Any]) -> TokenOutput:
        return TokenOutput(token_ids=ids, log_probs=log_probs, stop_reason="stop", weight_version=0)

    with pytest.raises(RolloutError, match="the engine"):
        await ToolAgentLoop(make_context(tokenizer, response_length=2), broken).run(SAMPLING, raw_prompt=MESSAGES)


# ---------------------------------------------------------------------------------------------------- tools, turns


def spans(output: AgentLoopOutput, engine: ScriptedEngine) -> list[tuple[str, int]]:
    """Alternating (writer, tokens): model turns as scripted, what lies between them from tools."""
    starts = [len(ids) - len(output.prompt_ids) for ids, _ in engine.requests]
    found: list[tuple[str, int]] = []
    for number, (start, length) in enumerate(zip(starts, lengths(engine), strict=True)):
        if number:
            found.append(("tool", start - sum(size for _, size in found)))
        found.append(("model", length))
    return found


async def test_tool_turns_are_read_and_not_trained_on(tokenizer) -> None:
    """model (call) | tool | model (call) | tool | model: no extended token, every model token is trained on."""
    turns = [ADD + END, "So 5. " + ADD + END, "The answer is 5." + END]
    output, engine = await converse(tokenizer, turns, ADD_TOOL, extend_vocab_start_token=EXTEND_START)
    parts = spans(output, engine)
    assert [writer for writer, _ in parts] == ["model", "tool", "model", "tool", "model"]
    assert output.response_mask == [int(writer == "model") for writer, size in parts for _ in range(size)]
    assert output.distill_special_token_mask == [0] * len(output.response_ids)
    assert output.num_turns == 6
    # the sampler's log-probs stand at its tokens alone, in the order it wrote them
    written = [value for value, mask in zip(output.response_logprobs, output.response_mask, strict=True) if mask]
    assert written == [-float(place) for place in range(sum(lengths(engine)))]
    assert all(v == 0 for v, m in zip(output.response_logprobs, output.response_mask, strict=True) if not m)
    assert (output.metrics.tool_calls, output.metrics.tool_errors, output.metrics.tool_reward) == (2, 0, 1.0)


@pytest.mark.parametrize("drop_whole", [False, True])
@pytest.mark.parametrize(
    ("first", "tool_text", "last"),
    [
        ("<s_a_1>", "plain", ""),
        ("", "<s_b_2>", ""),
        ("", "plain", "<s_c_3>"),
        ("<s_a_1>", "<s_b_2> and <s_b_2>", "<|sid_begin|><s_a_1>"),
        ("", "the item <s_a_0><s_b_0>", "<s_c_3>"),
    ],
)
async def test_masks_over_turns(tokenizer, first, tool_text, last, drop_whole) -> None:
    """Extended tokens in the call's turn, in the tool's text, in the last turn: trained up to the first of all."""
    output, engine = await converse(
        tokenizer,
        [first + call("look") + END, f"Buy {last}now" + END],
        (TextTool({"text": tool_text}, schema("look")),),
        extend_vocab_start_token=EXTEND_START,
        mask_response_if_have_extend_token=drop_whole,
    )
    by_model = [writer == "model" for writer, size in spans(output, engine) for _ in range(size)]
    items = [place for place, token_id in enumerate(output.response_ids) if token_id >= EXTEND_START]
    assert len(items) == sum(text.count("<s_") + text.count("<|sid") for text in (first, tool_text, last))
    assert output.distill_special_token_mask == [int(place in items) for place in range(len(by_model))]
    cut = items[0] if items else len(by_model)
    trained = [int(model and place <= cut) for place, model in enumerate(by_model)]
    assert output.response_mask == ([0] * len(by_model) if items and drop_whole else trained)
    assert len(output.response_mask) == len(output.response_ids) == len(output.response_logprobs)


@pytest.mark.parametrize("knows", [False, True])
async def test_a_tools_item_ends_what_is_not_trained_behind_it(tokenizer, knows) -> None:
    engine = ScriptedEngine(tokenizer, [call("look") + END, "fine" + END])
    context = make_context(tokenizer, (TextTool({"text": "<s_b_2>"}, schema("look")),))
    row = {"raw_prompt": MESSAGES, "teacher_knows_extended": knows}
    output = await ToolAgentLoop(context, engine).run(SAMPLING | {"stop_from_id": EXTEND_START}, **row)
    assert [given["stop_from_id"] for _, given in engine.requests] == ([None, None] if knows else [EXTEND_START])
    assert output.num_turns == (4 if knows else 3)


async def test_every_turn_draws_its_own_random_stream_within_what_is_left(tokenizer) -> None:
    output, engine = await converse(tokenizer, [ADD + END, "5" + END], ADD_TOOL)
    (_, first), (read, second) = engine.requests
    assert (first["seed"], second["seed"]) == (10, 11)
    assert (first["max_tokens"], second["max_tokens"]) == (300, 300 - (len(read) - len(output.prompt_ids)))


@pytest.mark.parametrize(
    ("limits", "turns"),
    [({"max_assistant_turns": 2}, 4), ({"max_user_turns": 0}, 2), ({"max_user_turns": 2, "max_assistant_turns": 9}, 6)],
)
async def test_limits_on_turns(tokenizer, limits, turns) -> None:
    output, _ = await converse(tokenizer, [ADD + END] * 5, ADD_TOOL, MultiTurnConfig(**limits))
    assert output.num_turns == turns
    assert output.metrics.tool_calls == turns // 2 - 1, "the last turn's call is not run"
    assert output.response_mask[-1] == 1, "a conversation ends with the model"


async def test_the_length_budget_counts_model_and_tool_tokens(tokenizer) -> None:
    """A tool's turn that leaves no token to the model is left out."""
    turns = [ADD + END, "5" + END]
    (_, model_tokens), (_, tool_tokens), _ = spans(*await converse(tokenizer, turns, ADD_TOOL))
    for remaining, last_turn in ((0, []), (1, tokenizer.encode("5"))):
        budget = model_tokens + tool_tokens + remaining
        output, _ = await converse(tokenizer, turns, ADD_TOOL, response_length=budget)
        expected = [1] * model_tokens + ([0] * tool_tokens + [1] if last_turn else [])
        assert output.response_mask == expected
        assert output.response_ids[len(expected) - len(last_turn) :] == last_turn


async def test_an_unfinished_turn_and_a_turn_without_tools_call_nothing(tokenizer) -> None:
    complete = len(tokenizer.encode(ADD))
    cut_off, _ = await converse(tokenizer, [ADD + END], ADD_TOOL, response_length=complete)
    assert len(cut_off.response_ids) == complete
    other_end, _ = await converse(tokenizer, [ADD + "<|endoftext|>"], ADD_TOOL)
    without_tools, _ = await converse(tokenizer, [ADD + END])
    for output in (cut_off, other_end, without_tools):
        assert (output.num_turns, output.metrics.tool_calls) == (2, 0)


async def test_a_loop_for_verl_is_told_what_to_write(tokenizer) -> None:
    class Loop(AgentLoopBase):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.known = self.context.rollout.response_length

        async def run(self, sampling_params, **row):
            return await self.server_manager.generate(prompt_ids=row["raw_prompt"], sampling_params=sampling_params)

    with pytest.raises(AttributeError, match=r"loop Loop has no 'server_manager'; .* await self\.write_turn\("):
        await converse(tokenizer, [], loop=Loop)


# ---------------------------------------------------------------------------------------------------- tool failures


async def tool_turn(tokenizer, tool, turn: str, **limits: Any):
    """The text that the tools' turn adds, and the conversation's metrics."""
    output, engine = await converse(tokenizer, [turn + END, "done" + END], (tool,), MultiTurnConfig(**limits))
    read = engine.requests[1][0][len(output.prompt_ids) + len(engine.turns[0]) :]
    return tokenizer.decode(read), output.metrics


@pytest.mark.parametrize(("step", "errors"), [("create", 2), ("execute", 2), ("release", 0)])
async def test_a_tool_that_hangs_is_cancelled_and_the_model_reads_an_error(tokenizer, step, errors, caplog) -> None:
    tool = CounterTool({"hangs": step})
    async with asyncio.timeout(20):
        text, metrics = await tool_turn(tokenizer, tool, COUNT * 2, tool_timeout_s=0.05, max_parallel_calls=2)
    error = "Error: TimeoutError: no answer within multi_turn.tool_timeout_s=0.05 s"
    assert text.count(error) == metrics.tool_errors == errors
    assert (metrics.tool_calls, tool.cancelled) == (2, errors or 1)
    assert ("tool count failed to release its instance: TimeoutError" in caplog.text) == (step == "release")


async def test_a_plain_function_that_fails_to_release_is_logged(tokenizer, caplog) -> None:
    tool: Any = CounterTool({})
    tool.release = lambda instance_id: 1 / 0
    await tool_turn(tokenizer, tool, COUNT)
    assert "tool count failed to release its instance: ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("turn", "answer", "counter"),
    [
        (call("add", '{"first": 1}'), "Error: KeyError: 'second'", "tool_errors"),
        (call("subtract"), "Error: there is no tool 'subtract'; the tools are add", "unknown_tools"),
        ("<tool_call>\n{]\n</tool_call>", "Error: a tool call is ", "malformed_calls"),
    ],
)
async def test_the_model_reads_what_failed_and_it_is_counted(tokenizer, turn, answer, counter) -> None:
    text, metrics = await tool_turn(tokenizer, ADD_TOOL[0], turn)
    assert answer in text
    counted = {name: getattr(metrics, name) for name in ("tool_errors", "unknown_tools", "malformed_calls")}
    assert counted == dict.fromkeys(counted, 0) | {counter: 1}
    assert metrics.tool_calls == 1


async def test_the_first_failure_of_each_tool_is_a_warning(tokenizer, caplog) -> None:
    tools = (TextTool({}, schema("look")), *ADD_TOOL)  # one lacks its text, the other will lack its arguments
    turns = [call(name) + END for name in ("look", "look", "add", "add")]
    output, _ = await converse(tokenizer, [*turns, "done" + END], tools)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(" (")[0] for text in warned] == ["tool look failed", "tool add failed"]
    assert output.metrics.tool_errors == 4 and "KeyError: 'text'" in caplog.text


class OlderTool(BaseTool):
    """As older tools for verl are: ``create`` gives the id alone, and the answer is a text."""

    @rollout_trace_op
    async def execute(self, instance_id, parameters, **kwargs):
        return f"{instance_id} {await self.calc_reward(instance_id)}", np.float64(0.5), {}


async def note(tool, options):
    tool.seen = options
    return "mine"


@pytest.mark.parametrize(
    ("create", "seen"),
    [
        (lambda self, instance_id=None, **kwargs: note(self, kwargs), {"start": 3, "create_kwargs": {"start": 3}}),
        (lambda self, instance_id=None, create_kwargs=None: note(self, create_kwargs), {"start": 3}),
        (lambda self, instance_id=None, start=None: note(self, start), 3),
    ],
)
async def test_options_of_a_row_reach_a_tool_in_the_form_it_takes(tokenizer, create, seen) -> None:
    kind: Any = type("Tool", (OlderTool,), {"create": create})
    tool = kind({}, OpenAIFunctionToolSchema.model_validate(schema("look")))
    kwargs = {"look": {"create_kwargs": {"start": 3}, "release_kwargs": None}, "add": None}
    turns = [call("look") + END, call("add") + END, "done" + END]
    output, _ = await converse(tokenizer, turns, (tool, *ADD_TOOL), row={"tools_kwargs": kwargs})
    assert tool.seen == seen and "mine 0.0" in tokenizer.decode(output.response_ids)
    assert output.metrics.tool_reward == 0.5, "the call of add lacks its arguments"
    assert type(output.metrics.tool_reward) is float, "a checkpoint reads no scalar of NumPy"


@pytest.mark.parametrize(
    ("side", "limit", "shown"),
    [
        ("left", 4, "abcd [truncated]"),
        ("right", 4, "[truncated] wxyz"),
        ("middle", 4, "ab [truncated] yz"),
        ("middle", 5, "abc [truncated] yz"),
        ("middle", 12, "abcdefuvwxyz"),
    ],
)
async def test_a_long_response_is_cut(tokenizer, side, limit, shown) -> None:
    limits = {"max_tool_response_length": limit, "tool_response_truncate_side": side}
    tool = TextTool({"text": "abcdefuvwxyz"}, schema("look"))
    text, _ = await tool_turn(tokenizer, tool, call("look"), **limits)
    assert f"<tool_response>\n{shown}\n</tool_response>" in text


async def test_calls_beyond_the_limit_are_counted_and_not_run(tokenizer) -> None:
    tool = CounterTool({})
    text, metrics = await tool_turn(tokenizer, tool, COUNT * 3, max_parallel_calls=2)
    assert ("count 2" in text, "count 3" in text) == (True, False), "calls of one turn share an instance"
    assert (metrics.tool_calls, metrics.dropped_calls) == (2, 1)


@pytest.mark.parametrize("loop", [SingleTurnAgentLoop, ToolAgentLoop])
async def test_an_answer_that_is_carried_on_has_the_masks_of_one_written_in_one_go(tokenizer, loop) -> None:
    ids, settings = [5, 6, 7, EXTEND_START, 8], {"loop": loop, "extend_vocab_start_token": EXTEND_START}
    whole, _ = await converse(tokenizer, [ids], **settings)
    assert whole.response_mask == [1, 1, 1, 1, 0]
    written = Written(ids[:2], [-7.0, -8.0], [0, 0], has_ended=False)
    output, engine = await converse(tokenizer, [ids[2:]], row={WRITTEN: written}, **settings)
    assert engine.requests == [(whole.prompt_ids + ids[:2], SAMPLING | {"max_tokens": 298, "place": 2})]
    for name in ("prompt_ids", "response_ids", "response_mask", "distill_special_token_mask", "num_turns"):
        assert getattr(output, name) == getattr(whole, name), name
    assert output.response_logprobs == [-7.0, -8.0, 0.0, -1.0, -2.0]
    ended = Written(ids, whole.response_logprobs, [0] * 5, has_ended=True)
    output, engine = await converse(tokenizer, [], row={WRITTEN: ended}, **settings)
    assert not engine.requests and output.weight_version is None
    assert (output.response_ids, output.response_mask) == (ids, whole.response_mask)


async def test_a_conversation_that_is_cut_short_releases_its_tools_and_keeps_what_was_written(tokenizer) -> None:
    tool, engine = CounterTool({}), ScriptedEngine(tokenizer, [COUNT + END, [5, 6]])

    async def generate(token_ids: list[int], params: dict[str, Any]) -> TokenOutput:
        turn = await engine(token_ids, params)
        return replace(turn, stop_reason="abort") if len(engine.requests) == 2 else turn

    with pytest.raises(CutShort) as cut:
        await ToolAgentLoop(make_context(tokenizer, [tool]), generate).run(dict(SAMPLING), raw_prompt=MESSAGES)
    assert cut.value.trajectory.response_ids[-2:] == [5, 6] and len(tool.released) == 1


async def test_a_tool_keeps_its_state_over_turns_and_is_released(tokenizer) -> None:
    tool = CounterTool({})
    kwargs = {"count": {"create_kwargs": {"start": 10}, "execute_kwargs": {"by": 5}}}
    turns = [COUNT + END, COUNT + END, "done" + END]
    output, _ = await converse(tokenizer, turns, (tool,), row={"tools_kwargs": kwargs})
    text = tokenizer.decode(output.response_ids)
    assert "count 15" in text and "count 20" in text
    assert tool.released == list(tool.counts) and len(tool.released) == 1


async def test_tools_are_released_when_the_engine_fails(tokenizer) -> None:
    tool = CounterTool({})
    with pytest.raises(IndexError):  # the script has no second turn
        await converse(tokenizer, [COUNT + END], (tool,))
    assert tool.released == list(tool.counts) != []
