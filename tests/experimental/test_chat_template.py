"""Prompt, model tokens and appended tool turns together are what the chat template yields for the conversation."""

import pytest
from support.agent_loop_fakes import AddTool, ScriptedEngine, TextTool, load, make_context, schema

from verl.config import MultiTurnConfig
from verl.experimental.agent_loop.chat_template import ChatTemplate
from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop

END = "<|im_end|>"
CALL = '<tool_call>\n{"name": "add", "arguments": {"first": 2, "second": 3}}\n</tool_call>'
LOOK = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
SAMPLING = {"logprobs": True, "seed": 0}


@pytest.fixture(scope="module", params=["tiny", "mini8k", "mini8k-item256"])
def tokenizer(request: pytest.FixtureRequest):
    """The small tokenizer of the tests, and real Qwen3-style ones with their own template."""
    if request.param == "tiny":
        return load(request.getfixturevalue("tiny_tokenizers")[1])
    return load(request.getfixturevalue("shared_data") / "tokenizer" / request.param)


@pytest.mark.parametrize(
    "turns",
    [
        [CALL],
        ["Let me add. " + CALL],
        ["<think>\nTwo numbers to add.\n</think>\n\n" + CALL],
        [CALL, "Again.\n" + CALL],
        ["<think>\nFirst.\n</think>\n\n" + CALL, "<think>\nSecond.\n</think>\n\n" + CALL],
        [CALL + "\n" + LOOK],
    ],
)
@pytest.mark.parametrize("system", [True, False])
async def test_the_engine_reads_what_the_template_yields(tokenizer, turns, system) -> None:
    tools = (AddTool({}, schema("add")), TextTool({"text": "red lantern\n\n <s_a_1>\n"}, schema("look")))
    messages = [{"role": "system", "content": "You are careful."}] if system else []
    messages.append({"role": "user", "content": "2 + 3?"})
    engine = ScriptedEngine(tokenizer, [turn + END for turn in [*turns, "5"]])
    context = make_context(
        tokenizer, tools, MultiTurnConfig(max_parallel_calls=2), response_length=900, prompt_length=900
    )
    await ToolAgentLoop(context, engine).run(SAMPLING, raw_prompt=messages)

    schemas = [tool.get_openai_tool_schema() for tool in tools]
    for number, (read, _) in enumerate(engine.requests):
        conversation = list(messages)
        for turn in turns[:number]:
            conversation.append({"role": "assistant", "content": turn})
            conversation.append({"role": "tool", "content": "5"})
            if LOOK in turn:
                conversation.append({"role": "tool", "content": "red lantern\n\n <s_a_1>\n"})
        expected = tokenizer.apply_chat_template(
            conversation, tools=schemas, add_generation_prompt=True, return_dict=False
        )
        assert read == expected, f"request {number}: {tokenizer.decode(read)!r}"


async def test_the_models_own_tokens_are_kept_where_its_text_has_another_encoding(tiny_tokenizers) -> None:
    tokenizer = load(tiny_tokenizers[1])
    usual = tokenizer.encode(" apples")
    unusual = [token for letter in " apples" for token in tokenizer.encode(letter)]
    assert usual != unusual
    assert tokenizer.decode(usual) == tokenizer.decode(unusual)
    engine = ScriptedEngine(tokenizer, [unusual + tokenizer.encode(CALL + END), "5" + END])
    context = make_context(tokenizer, (AddTool({}, schema("add")),))
    output = await ToolAgentLoop(context, engine).run(SAMPLING, raw_prompt=[{"role": "user", "content": "2 + 3?"}])
    assert output.num_turns == 4
    assert output.response_ids[: len(unusual)] == unusual
    assert engine.requests[1][0][len(output.prompt_ids) :][: len(unusual)] == unusual


def test_template_options_reach_prompt_and_tool_turn(tiny_tokenizers) -> None:
    tokenizer = load(tiny_tokenizers[1])
    template = ChatTemplate(tokenizer, [schema("add")], {"enable_thinking": False})
    no_thought = tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert (
        template.encode_prompt([{"role": "user", "content": "hi"}], with_tools=False)[-len(no_thought) :] == no_thought
    )
    assert template.encode_tool_turn([{"role": "tool", "content": "5"}])[-len(no_thought) :] == no_thought


def test_tools_are_listed_only_where_they_are_used(tiny_tokenizers) -> None:
    tokenizer = load(tiny_tokenizers[1])
    template = ChatTemplate(tokenizer, [schema("add")])
    messages = [{"role": "user", "content": "hi"}]
    plain = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert template.encode_prompt(messages, with_tools=False) == plain
    assert '"name": "add"' in tokenizer.decode(template.encode_prompt(messages, with_tools=True))


def test_a_template_without_an_end_of_turn_token_takes_no_tools(tiny_tokenizers) -> None:
    tokenizer = load(tiny_tokenizers[1])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    ChatTemplate(tokenizer)
    with pytest.raises(ValueError, match="no special token"):
        ChatTemplate(tokenizer, [schema("add")])
