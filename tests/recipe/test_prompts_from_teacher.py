"""Prompts that a model writes: where the user's text begins and ends, what is dropped, and a file that a run reads."""

import shutil

import pyarrow.parquet as pq
import pytest
from tokenizers.normalizers import NFC

from recipe.onpolicy_distill import prompts_from_teacher as module
from verl.trainer.data import build_datasets
from verl.utils.tokenizer import hf_tokenizer, render_chat
from verl.workers.rollout import replica
from verl.workers.rollout.replica import SamplingOptions, TokenOutput

LOOP = "<bos>{% for m in messages %}"
OWN_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nMine.<|im_end|>\n{% endif %}"
CHATML = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant{{ '\n' }}"
PLAIN = LOOP + "{{ m.role }}: {{ m.content }}\n\n{% endfor %}assistant: "
TEMPLATES = {  # with the token that ends the text, or the text
    "ChatML": (OWN_SYSTEM + CHATML, "<|im_end|>", ""),
    "Llama": (LOOP + "<h>{{ m.role }}</h>\n\n{{ m.content | trim }}<eot>{% endfor %}<h>assistant</h>\n\n", "<eot>", ""),
    "Mistral": (LOOP + "{{ '[INST] ' * (m.role == 'user') + m.content }}{% endfor %} [/INST]", None, "[/INST]"),
    "Gemma": (LOOP + "<h>{{ m.role }}\n{{ m.content | trim }}<eot>\n{% endfor %}<h>model\n\n", "<eot>", ""),
    "plain": (PLAIN, None, "\n\nassistant:"),
}
REFUSED = ["", "Hello", PLAIN + "{{ messages }}", PLAIN.replace("tent", "tent | upper"), "{{ messages[0].content }}."]
QUESTION, SEVEN = "Why is the sky blue? Name 3 causes\n\n- of it.", "one two three four five six seven"


@pytest.fixture
def own(tiny_tokenizers):
    """The tiny teacher's tokenizer, with tokens for other templates."""
    tokenizer = hf_tokenizer(tiny_tokenizers[0])
    tokenizer.add_tokens(["<bos>", "<h>", "</h>", "<eot>", "\n\n"], True)
    return tokenizer


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_text_of_the_model_ends_where_the_template_ends_it(own, name, system) -> None:
    own.chat_template, end, end_text = TEMPLATES[name]
    turn = module.find_user_turn(own, system)
    chat = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": QUESTION}]
    assert turn.prefix + QUESTION + turn.suffix == render_chat(own, chat) and turn.end_text == end_text
    # A model that writes just this: its tokens follow those of the prefix, the engine stops at the first end token.
    ids, known = own.encode(render_chat(own, chat), add_special_tokens=False), len(turn.prompt_ids)
    assert ids[:known] == turn.prompt_ids
    output = TokenOutput([*ids[known:], *own.encode("Rayleigh")], None, "length", 0)
    output = SamplingOptions(99, stop_token_ids=turn.end_ids).cut(output)
    assert output.stop_reason == "length" if end is None else own.decode(output.token_ids[-1]) == end
    assert module.text_of(output, turn, own) == (QUESTION, True)
    assert module.text_of(TokenOutput(own.encode(" Why is"), None, "length", 0), turn, own) == ("Why is", False)


@pytest.mark.parametrize("template", [*REFUSED, "{{ raise_exception('no') }}"])
def test_a_template_without_a_place_for_the_text_is_refused(own, template) -> None:
    own.chat_template = template
    with pytest.raises(ValueError, match=r"its place cannot be found|refuses the prompt: no|has no chat template"):
        module.find_user_turn(own)


def test_what_is_dropped_and_for_which_reason(own) -> None:
    own.chat_template, own.backend_tokenizer.normalizer = PLAIN, NFC()
    config = module.PromptsConfig(model="", count=9, out="", max_prompt_length=160, languages=["latin"])
    prompts = module.PromptFilter(config, module.find_user_turn(own), own)
    texts = {"kept": f"{SEVEN} eight", "cut": "A new text", "empty": " ?! ", "special_tokens": "Say <|im_end|> now"}
    texts |= {"not_encodable": "Say \ufffd now", "overlong": "".join(map(str, range(100))), "repetitive": "ha " * 12}
    texts |= {"language": "Почему небо синее?", "duplicate": f"{SEVEN} eight", "kept without letters": "2 + 2 = ?"}
    # Of their sequences of words 4 of 5 are known, which is not above 0.8, and 5 of 6.
    texts |= {"kept too": f"{SEVEN} nine", "near_duplicate": "One, two three FOUR five six seven: eight! Nine"}
    prompts.add("", "Re\u0301sume\u0301", ended=True)  # encoded, accents join their letters
    for name, text in texts.items():
        prompts.add(name, text, ended=name != "cut")
    assert [*prompts.kept.values()] == [name for name in texts if name.startswith("kept")]
    assert prompts.dropped == {name: 1 + name.startswith("not") for name in texts if not name.startswith("kept")}
    assert module.repeated_share("abcdefgh" * 2) == pytest.approx(1 / 9) and module.repeated_share("abc") == 0
    assert module.script_share("Привет, abc 12 天が", ["cyrillic", "cjk"]) == pytest.approx(7 / 11)


@pytest.fixture(scope="module")
def model(tiny_pair, tmp_path_factory):
    """A random model whose texts end soon, at the first "e"."""
    folder = shutil.copytree(tiny_pair.teacher, tmp_path_factory.mktemp("model") / "teacher")
    (folder / "chat_template.jinja").write_text(LOOP + "{{ m.role }}: {{ m.content }}e{% endfor %}")
    return folder


def command(model, out, *more: str) -> list[str]:
    options = ["--model", str(model), "--out", str(out), "--engine", "hf", "--max-new-tokens", "12"]
    module.main([*options, "--max-repetition", "1", "--count", *more])
    return pq.read_table(out)["messages"].to_pylist()


def test_what_it_writes_a_run_reads_and_it_is_the_same_again(model, tokenizer, tmp_path, capsys, monkeypatch) -> None:
    out, again = tmp_path / "new" / "prompts.parquet", tmp_path / "again.parquet"
    texts = command(model, out, "6", "--seed", "3")
    counts = {line.split()[0]: int(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]}
    assert counts.pop("samples") == sum(counts.values()) and counts["prompts"] == 6
    data = build_datasets(module.DataConfig(train_files=str(out)), tokenizer, dropped_rows_folder=tmp_path)[0]
    assert data.sources == ["synthetic_general"] * 6 and not data.drop_report.dropped
    monkeypatch.setattr(module, "BATCH", (3, 7))
    assert command(model, again, "6", "--seed", "3") == texts and again.read_bytes() == out.read_bytes()
    assert command(model, again, "4", "--seed", "3") == texts[:4] != command(model, again, "4", "--seed", "4")


def test_samples_that_are_used_up(model, tmp_path, capsys) -> None:
    rows = len(command(model, out := tmp_path / "prompts.parquet", "60", "--max-samples", "64"))
    assert 0 < rows < 60 and f"{rows} of the 60 prompts wanted in {out}: " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: none of 64 samples is a prompt to keep: .*'language'"):
        command(model, tmp_path / "none.parquet", "60", "--max-samples", "64", "--languages", "thai")
    assert [*tmp_path.iterdir()] == [out]


def test_what_was_kept_is_written_where_the_engine_dies(model, tmp_path, capsys, monkeypatch) -> None:
    def text_of(*_):
        if not numbers:
            raise RuntimeError("the engine is dead")
        return f"Question {numbers.pop()}", True

    numbers = [1, 2, 3]
    monkeypatch.setattr(module, "text_of", text_of)
    with pytest.raises(SystemExit, match=r"^error: the engine is dead$"):
        command(model, out := tmp_path / "prompts.parquet", "60")
    assert pq.read_table(out).num_rows == 3 and f"3 of the 60 prompts wanted in {out}" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--count 0", "--max-samples 4", "--temperature 0", "--top-p 1.5", "--out ."])
def test_a_wrong_option_is_told_before_the_model_is_loaded(model, tmp_path, monkeypatch, wrong) -> None:
    monkeypatch.setattr(replica, "get_replica_class", lambda name: pytest.fail("it is loaded"))
    with pytest.raises(SystemExit, match=f"^error: {wrong}"):
        command(model, tmp_path / "prompts.parquet", "5", *wrong.split())
