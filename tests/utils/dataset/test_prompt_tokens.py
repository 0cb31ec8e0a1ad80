"""Think switches, truncation and exact prompt lengths."""

from collections import Counter

import pytest

from verl.config import DataConfig
from verl.experimental.agent_loop.chat_template import ChatTemplate
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


def test_a_tokenizer_without_a_template_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        PromptEncoder(hf_tokenizer(tmp_path), DataConfig())
