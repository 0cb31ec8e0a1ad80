"""Think switches, truncation and exact prompt lengths."""

import copy
from collections import Counter

import pytest

from verl.config import DataConfig
from verl.experimental.agent_loop.base import ChatTemplate
from verl.utils.dataset.prompt_tokens import PromptEncoder, append_switch, possible_switches, think_switch
from verl.utils.tokenizer import hf_tokenizer

QUESTION = [{"role": "user", "content": "Why?"}]


def test_auto_draws_a_third_each_and_depends_on_seed_row_and_epoch_alone():
    for mode, switch in {"force_think": " /think", "force_nothink": " /no_think"}.items():
        assert think_switch(DataConfig(enable_think=True, think_mode=mode), "row", 0) == switch
        assert think_switch(DataConfig(think_mode=mode), "row", 0) == ""
    config = DataConfig(enable_think=True)

    def draw(epoch=0, **settings):
        return [think_switch(DataConfig(enable_think=True, **settings), f"row {n}", epoch) for n in range(3000)]

    draws = draw()
    assert draws == draw() and set(draws) == set(possible_switches(config))
    assert all(900 < count < 1100 for count in Counter(draws).values())
    for other in (draw(epoch=1), draw(seed=2)):
        assert 900 < sum(a == b for a, b in zip(draws, other, strict=True)) < 1100  # a third agree by chance


def test_the_switch_goes_to_the_last_user_turn_of_a_copy():
    chat = [*QUESTION, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]
    switched = append_switch(chat, " /think")
    assert [message["content"] for message in switched] == ["Why?", "So.", "And? /think"]
    assert chat[2]["content"] == "And?"
    assert append_switch([{"role": "system", "content": "x"}], " /think") == [{"role": "system", "content": "x"}]


@pytest.mark.parametrize("name", ["tiny", "mini8k", "mini8k-item256"])
def test_tools_stand_in_the_prompt_as_the_agent_loop_puts_them(request, tiny_tokenizers, name):
    folder = tiny_tokenizers[1]
    if name != "tiny":
        folder = request.getfixturevalue("shared_data") / "tokenizer" / name
    tokenizer = hf_tokenizer(folder)
    schemas = [{"type": "function", "function": {"name": "look", "description": "<tools>\n ä", "parameters": {}}}]
    chats = [QUESTION, [{"role": "system", "content": "Be brief."}, *QUESTION]]
    encoder = PromptEncoder(tokenizer, DataConfig(), schemas)
    template = ChatTemplate(tokenizer, schemas)
    for with_tools in (True, False):
        expected = [template.encode_prompt(chat, with_tools) for chat in chats]
        assert encoder.encode(chats, with_tools) == expected
    assert encoder.encode(chats) != PromptEncoder(tokenizer, DataConfig(), []).encode(chats) == expected


SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {}}}


@pytest.mark.parametrize(
    ("template", "settings", "schemas", "notice"),
    [
        ("{{ messages[0].content }}", {"apply_chat_template_kwargs": {"thinking": True}}, [], "thinking has no effect"),
        ("{{ thinking }}", {"apply_chat_template_kwargs": {"thinking": True}}, [], None),
        ("{{ strftime_now('%Y') }}", {}, [], "writes a date, which is 26 Jul 2024 in all prompts"),
        ("{{ messages[0].content }}<think>", {"enable_think": True}, [], "opens a thought in any case"),
        ("{{ messages[0].content }}<think>", {"enable_think": True, "think_mode": "force_think"}, [], None),
        ("{{ messages[0].content }}<think>", {}, [], None),
        ("{{ messages[0].content }}", {"enable_think": True}, [], "appends /think or /no_think to questions"),
        ("{{ messages[0].content }}{{ 'tools' if tools }}", {}, [SCHEMA], "not show ['look'], tools of actor_rollou"),
        ("{{ tools }}", {}, [SCHEMA], None),
    ],
)
def test_what_a_template_does_otherwise_than_asked_is_said(tokenizer, caplog, template, settings, schemas, notice):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    PromptEncoder(tokenizer, DataConfig(**settings), schemas)
    assert (notice in caplog.text) if notice else not caplog.records


def test_a_template_that_writes_a_date_writes_the_same_on_all_days(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ date_string or strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    today = tokenizer.apply_chat_template(QUESTION, tokenize=False)
    encoder = PromptEncoder(tokenizer, DataConfig())
    assert encoder.render(QUESTION) == "26 Jul 2024: Why?" != today
    assert tokenizer.decode(ChatTemplate(tokenizer).encode_prompt(QUESTION, False)) == "26 Jul 2024: Why?"
    chosen = DataConfig(apply_chat_template_kwargs={"date_string": "1 May 2025"})
    assert PromptEncoder(tokenizer, chosen).render(QUESTION) == "1 May 2025: Why?"


def test_a_tokenizer_without_a_template_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        PromptEncoder(hf_tokenizer(tmp_path), DataConfig())
