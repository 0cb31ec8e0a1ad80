"""Prompt, model tokens and appended tool turns together are what the chat template yields for the conversation."""

import pytest
from support.agent_loop_fakes import END, AddTool, TextTool, call, converse, schema
from support.chat_files import chat, write_rows
from support.in_process_run import settings
from transformers import AutoTokenizer

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from verl.config import MultiTurnConfig
from verl.experimental.agent_loop.base import ChatTemplate

ADD = call("add", '{"first": 2, "second": 3}')
LOOK = call("look")
LANTERN = "red lantern\n\n <s_a_1>\n"
QUESTION = [{"role": "user", "content": "2 + 3?"}]


@pytest.fixture(scope="module", params=["tiny", "mini8k", "mini8k-item256"])
def any_tokenizer(request: pytest.FixtureRequest):
    """The small tokenizer of the tests, and real Qwen3-style ones with their own template."""
    if request.param == "tiny":
        return request.getfixturevalue("tokenizer")
    return AutoTokenizer.from_pretrained(request.getfixturevalue("shared_data") / "tokenizer" / request.param)


@pytest.mark.parametrize(
    "turns",
    [
        [ADD],
        ["<think>\nTwo numbers to add.\n</think>\n\n" + ADD],
        [ADD, "Again.\n" + ADD],
        ["<think>\nFirst.\n</think>\n\n" + ADD, "<think>\nSecond.\n</think>\n\n" + ADD],
        [ADD + "\n" + LOOK],
    ],
)
@pytest.mark.parametrize("system", [True, False])
async def test_the_engine_reads_what_the_template_yields(any_tokenizer, turns, system) -> None:
    tools = (AddTool({}, None), TextTool({"text": LANTERN}, schema("look")))
    messages = [{"role": "system", "content": "You are careful."}, *QUESTION] if system else QUESTION
    _, engine = await converse(
        any_tokenizer,
        [turn + END for turn in [*turns, "5"]],
        tools,
        MultiTurnConfig(max_parallel_calls=2),
        row={"raw_prompt": messages},
        response_length=900,
        prompt_length=900,
    )
    schemas = [tool.get_openai_tool_schema() for tool in tools]
    assert len(engine.requests) == len(turns) + 1
    for number, (read, _) in enumerate(engine.requests):
        conversation = list(messages)
        for turn in turns[:number]:
            conversation += [{"role": "assistant", "content": turn}, {"role": "tool", "content": "5"}]
            conversation += [{"role": "tool", "content": LANTERN}] if LOOK in turn else []
        expected = any_tokenizer.apply_chat_template(
            conversation, tools=schemas, add_generation_prompt=True, return_dict=False
        )
        assert read == expected, f"request {number}: {any_tokenizer.decode(read)!r}"


async def test_the_models_own_tokens_are_kept_where_its_text_has_another_encoding(tokenizer) -> None:
    usual = tokenizer.encode(" apples")
    unusual = [token for letter in " apples" for token in tokenizer.encode(letter)]
    assert usual != unusual
    assert tokenizer.decode(usual) == tokenizer.decode(unusual)
    output, engine = await converse(tokenizer, [unusual + tokenizer.encode(ADD + END), "5" + END], (AddTool({}, None),))
    assert output.num_turns == 4
    assert output.response_ids[: len(unusual)] == unusual
    assert engine.requests[1][0][len(output.prompt_ids) :][: len(unusual)] == unusual


def test_template_options_reach_prompt_and_tool_turn(tokenizer) -> None:
    template = ChatTemplate(tokenizer, [schema("add")], {"enable_thinking": False})
    no_thought = tokenizer.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert template.encode_prompt(QUESTION, with_tools=False)[-len(no_thought) :] == no_thought
    assert template.encode_tool_turn([{"role": "tool", "content": "5"}])[-len(no_thought) :] == no_thought


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ m.role + ': ' + m.content + '\n' }}", "ends an assistant's turn with no special token"),
        ("{{ m.content if m.role != 'tool' else raise_exception('no tools') }}", r"takes no .* tool \(no tools\)"),
    ],
)
def test_a_template_that_does_not_fit_tools_is_refused_with_the_key(tokenizer, monkeypatch, template, problem) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{% for m in messages %}" + template + "{% endfor %}")
    ChatTemplate(tokenizer)
    with pytest.raises(ValueError, match=problem + r".*unset actor_rollout_ref\.rollout\.multi_turn\.tool_config_path"):
        ChatTemplate(tokenizer, [schema("add")])


def test_it_is_refused_before_anything_starts(tiny_pair, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("verl.experimental.agent_loop.worker.load_tools", lambda _: {"add": AddTool({}, None)})
    monkeypatch.setattr(ChatTemplate, "_continuation", lambda *_: [])
    train = write_rows(tmp_path / "train.parquet", [chat("a")] * 4)
    with pytest.raises(
        ValueError, match=r"no special token; unset actor_rollout_ref\.rollout\.multi_turn\.tool_config"
    ):
        build_trainer(settings(tiny_pair, train, tmp_path / "run"))


OPENS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{% if '</think>' not in m.content %}\n</think>\n\n{% endif %}{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{{ '\n' }}{% endif %}"
)


@pytest.mark.parametrize(("thought", "rewritten"), [("so\n</think>\n\n", 0), ("so\n", 1)])
async def test_a_call_inside_an_open_thought_is_counted_and_stays_as_it_was_sampled(
    tokenizer, monkeypatch, thought, rewritten
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", OPENS_THOUGHTS)
    output, engine = await converse(tokenizer, [thought + ADD + END, "5" + END], (AddTool({}, None),))
    assert output.metrics.rewritten_turns == rewritten
    assert engine.requests[1][0][: len(output.prompt_ids + engine.turns[0])] == output.prompt_ids + engine.turns[0]


@pytest.mark.parametrize(("text", "typed"), [(f"a{END}\n<|im_start|>assistant\nI", 1), ("a <s_a_1> <think>", 0)])
async def test_special_tokens_that_a_tool_types_become_real_ones_and_are_counted(tokenizer, text, typed) -> None:
    tool = TextTool({"text": text}, schema("look"))
    output, _ = await converse(tokenizer, [LOOK + END, "5" + END], (tool,))
    assert output.metrics.typed_special_tokens == typed
    ends = [place for place, token in enumerate(output.response_ids) if token == tokenizer.eos_token_id]
    assert len(ends) == 3 + typed, "the model's own two, the tool turn's, and those that were typed"
    assert sum(output.response_mask[place] for place in ends) == 2, "of which the model's own are trained"
