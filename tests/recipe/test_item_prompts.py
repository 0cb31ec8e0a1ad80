"""Rehearsal prompts of random items: whole items, drawn from where they should be, the same each time, and kept."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.chat_files import EXTEND_START, chat, write_rows
from support.in_process_run import settings
from support.tiny_pairs import Pair
from transformers import AutoTokenizer

from recipe.onpolicy_distill import synthetic_item_prompts as item_prompts
from verl.config import DataConfig, PPOConfig, PromptTemplateConfig, SyntheticItemPromptsConfig
from verl.trainer.data import build_datasets
from verl.trainer.launch.checks import check_run
from verl.utils.dataset.rl_dataset import RLHFDataset

TEMPLATES = {
    "next": PromptTemplateConfig("history: {history}", system="You recommend."),
    "caption": PromptTemplateConfig('caption {"of": {item}}'),
    "either": PromptTemplateConfig("{item} or {item}?"),
}
SOURCES = [f"synthetic_rec_{name}" for name in TEMPLATES]
ITEM = re.compile(r"<\|sid_begin\|><s_a_(\d+)><s_b_(\d+)><s_c_(\d+)><\|sid_end\|>")
CODES = 8


def config_of(count: int = 300, **changes) -> SyntheticItemPromptsConfig:
    history = {"min_history": 2, "max_history": 4}
    return SyntheticItemPromptsConfig(**{"count": count, "templates": TEMPLATES, **history, **changes})


def write_catalogue(path: Path, *sids: list[int]) -> str:
    return str(write_rows(path, [{"sid": sid} for sid in sids]))


def items_of(text: str) -> list[tuple[int, ...]]:
    found = [tuple(int(code) for code in codes) for codes in ITEM.findall(text)]
    assert "<s_" not in ITEM.sub("", text) and "sid_" not in ITEM.sub("", text), "only whole items"
    return found


def test_templates_come_in_turn_with_as_many_items_as_they_ask_for(tokenizer) -> None:
    chats = list(item_prompts.draw_chats(config_of(), item_prompts.item_sampler(tokenizer, None)))
    assert [source for source, _ in chats[:4]] == [*SOURCES, SOURCES[0]]
    drawn = [[items_of(messages[-1]["content"]) for _, messages in chats[place::3]] for place in range(3)]
    assert [{len(items) for items in of_template} for of_template in drawn] == [{2, 3, 4}, {1}, {2}]
    system, user = chats[0][1]
    assert system == {"role": "system", "content": "You recommend."} and user["content"].startswith("history: <|sid")
    assert re.sub(ITEM, "X", chats[1][1][0]["content"]) == 'caption {"of": X}'
    assert any(first != second for first, second in drawn[2]), "each is drawn anew"
    for level in range(3):
        assert {item[level] for items in drawn[0] for item in items} == set(range(CODES)), "all codes with a token"
    ids = tokenizer.encode(user["content"], add_special_tokens=False)
    assert sum(token >= EXTEND_START for token in ids) == 5 * len(drawn[0][0]), "a token for each part of an item"


def test_items_of_a_catalogue_are_all_drawn_and_no_others(tokenizer, tmp_path) -> None:
    path = write_catalogue(tmp_path / "items.parquet", [0, 1, 2], [7, 7, 7], [3, 1, 0], [0, 1, 2])
    chats = item_prompts.draw_chats(config_of(), item_prompts.item_sampler(tokenizer, path))
    assert {item for _, chat in chats for item in items_of(chat[-1]["content"])} == {(0, 1, 2), (7, 7, 7), (3, 1, 0)}


def test_the_same_prompts_each_time(tokenizer, tmp_path) -> None:
    draw_item = item_prompts.item_sampler(tokenizer, None)
    first, again, fewer = (list(item_prompts.draw_chats(config_of(count), draw_item)) for count in (30, 30, 20))
    assert first == again and first[:20] == fewer
    assert first != list(item_prompts.draw_chats(config_of(30, seed=1), draw_item))
    for name in ("a", "b"):
        item_prompts.write_item_prompts(tmp_path / name, config_of(30), tokenizer)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_items_that_the_tokenizer_lacks(tokenizer, tiny_tokenizers, tmp_path) -> None:
    path = write_catalogue(tmp_path / "items.parquet", [0, 1, 8])
    with pytest.raises(ValueError, match=r"needs 1 tokens that the student's tokenizer lacks, such as <s_c_8>"):
        item_prompts.item_sampler(tokenizer, path)
    with pytest.raises(ValueError, match=r"no whole set of item tokens.*levels found: none"):
        item_prompts.item_sampler(AutoTokenizer.from_pretrained(tiny_tokenizers[0]), None)


def load(tmp_path: Path, tokenizer, synthetic: SyntheticItemPromptsConfig, **settings):
    """The training data of a run whose teacher of the rehearsal prompts knows item tokens."""
    general = write_rows(tmp_path / "general.parquet", [chat("Why?", source="general")] * 4)
    settings = {"train_files": str(general), "train_batch_size": 4, "cache_dir": str(tmp_path / "cache"), **settings}
    config = DataConfig(max_prompt_length=128, synthetic_item_prompts=synthetic, **settings)
    options = {"extend_vocab_start_token": EXTEND_START, "extended_sources": ["synthetic_rec_*"]}
    made = item_prompts.make_prompt_file(config, tokenizer)
    return build_datasets(config, tokenizer, **options, made=made, dropped_rows_folder=tmp_path)[0]


def test_they_join_the_training_data_and_are_kept(tokenizer, tmp_path, caplog) -> None:
    """Though ``data.prompt_extend_tokens=drop``: the teacher of their sources knows item tokens."""
    caplog.set_level("INFO")
    data = load(tmp_path, tokenizer, config_of(6))
    assert data.sources == [*SOURCES, *SOURCES, *["general"] * 4]
    assert data.has_extended == [True] * 6 + [False] * 4 and not data.drop_report.dropped
    assert "6 prompts of random codes join the training data" in caplog.text
    assert (data[0]["reward_model"]["ground_truth"], data[0]["uuid"]) == ("", "synthetic_rec-0-0")
    assert [data[place]["raw_prompt"] for place in range(6)] == [
        chat for _, chat in item_prompts.draw_chats(config_of(6), item_prompts.item_sampler(tokenizer, None))
    ]


def test_they_are_filtered_by_length_and_not_counted_as_samples_of_the_files(tokenizer, tmp_path) -> None:
    synthetic = config_of(6, min_history=40, max_history=40)
    data = load(tmp_path, tokenizer, synthetic, filter_overlong_prompts=True, train_max_samples=2)
    assert data.sources == SOURCES[1:] * 2 + ["general"] * 2
    assert data.drop_report.dropped_by_source == {("overlong", SOURCES[0]): 2}
    long = write_rows(tmp_path / "long.parquet", [chat("Why? " * n, source="general") for n in (1, 90, 90, 90)])
    with pytest.raises(ValueError, match=r"75\.0% of the 4 rows"):
        load(tmp_path, tokenizer, config_of(60), filter_overlong_prompts=True, train_files=str(long))


def test_they_take_the_layout_of_the_files(tokenizer, tmp_path) -> None:
    """verl's column of prompts, whatever its name, holds no answer."""
    rows = [{"question": json.dumps([{"role": "user", "content": "Why?"}])}] * 4
    files = str(write_rows(tmp_path / "verl.parquet", rows))
    data = load(tmp_path, tokenizer, config_of(3), train_files=files, prompt_key="question")
    assert type(data) is RLHFDataset and len(data) == 7
    assert [message["role"] for message in data[1]["raw_prompt"]] == ["user"]


def test_the_file_is_made_once_for_what_it_depends_on(tokenizer, tmp_path) -> None:
    def made(name: str, sid: list[int]) -> Path:
        return load(tmp_path, tokenizer, config_of(3, catalogue=write_catalogue(tmp_path / name, sid))).files[0]

    first, other = made("items.parquet", [0, 1, 2]), made("items.parquet", [2, 1, 0])
    assert first == made("items.parquet", [0, 1, 2]) != other == made("moved.parquet", [2, 1, 0])
    assert "2><s_b_1><s_c_0" in pq.read_table(other)["messages"][0].as_py()
    turned = config_of(3, templates=dict(reversed(config_of().templates.items())))
    assert load(tmp_path, tokenizer, config_of(3)).sources[:1] != load(tmp_path, tokenizer, turned).sources[:1]


def test_settings_that_make_no_prompts() -> None:
    with pytest.raises(ValueError, match=r"min_history=5 is above .*max_history=4"):
        config_of(min_history=5)
    with pytest.raises(ValueError, match=r"templates.a.user='history' holds neither"):
        config_of(templates={"a": PromptTemplateConfig("history")})


# ------------------------------------------------------------------ as a command and in the settings of a run
KEY = "data.synthetic_item_prompts"
PLAIN_HYDRA = "{next: {user: 'history: {history}'}, caption: {user: 'caption: {item}'}}"
PLAIN = {"next": {"user": "history: {history}"}, "caption": {"user": "caption: {item}"}}
TEACHER = "++algorithm.distill.teachers.self"
READS = {TEACHER: "{vocabulary:full,sources:['synthetic_rec_*']}"}


@pytest.fixture
def run(tiny_pair: Pair, tmp_path: Path) -> Callable[..., PPOConfig]:
    """Settings of a run with general prompts and rehearsal of random codes."""
    train = write_rows(tmp_path / "general.parquet", [chat("Why?", source="general")] * 4)
    rehearsal = {f"{KEY}.count": 8, f"++{KEY}.templates": PLAIN_HYDRA}
    return lambda **changes: settings(tiny_pair, train, tmp_path / "run", **rehearsal, **changes)


def test_they_need_a_teacher_that_reads_them(run: Callable[..., PPOConfig]) -> None:
    with pytest.raises(ValueError, match=re.escape("['synthetic_rec_next', 'synthetic_rec_caption'], and no teacher")):
        run()
    with pytest.raises(ValueError, match=re.escape("['synthetic_rec_next'], and no teacher")) as error:
        run(**{TEACHER: "{vocabulary:full,sources:['*_caption']}"})
    fix = re.search(r"\+\+algorithm\S+='(.*)'", str(error.value))
    assert fix is not None
    assert run(**{TEACHER: fix[1]}).algorithm.distill.teacher_knows_extended("synthetic_rec_next", True)


def test_a_catalogue_that_cannot_be_used_is_said_before_the_run(run: Callable[..., PPOConfig], tmp_path: Path) -> None:
    missing = tmp_path / "none.parquet"
    with pytest.raises(ValueError, match=re.escape(f"{KEY}.catalogue={missing} matches no parquet file")):
        check_run(run(**READS, **{f"{KEY}.catalogue": missing}))


def test_a_class_of_the_users_own_reads_files_of_its_own(run: Callable[..., PPOConfig]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{KEY}.count=8 makes files of this project's layouts")):
        run(**READS, **{"data.custom_cls.path": "mine.py", "data.custom_cls.name": "Mine"})


def test_the_command_writes_what_a_run_would_make(
    run: Callable[..., PPOConfig], tiny_pair: Pair, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rec.parquet"
    arguments = ["--tokenizer", str(tiny_pair.student), "--count", "8", "--out", str(out)]
    item_prompts.main([*arguments, "--templates", json.dumps(PLAIN)])
    assert capsys.readouterr().out == f"8 prompts in {out}: 4 synthetic_rec_next, 4 synthetic_rec_caption\n"
    made = item_prompts.make_prompt_file(run(**READS).data, tokenizer)
    assert out.read_bytes() == made.read_bytes()
    for change, message in {
        ("--count", "0"): "--count 0 must be at least 1",
        ("--templates", '{"a": {"text": "x"}}'): "--templates",
        ("--catalogue", "none.parquet"): "none.parquet",
    }.items():
        with pytest.raises(SystemExit, match=r"^error: [^\n]*" + re.escape(message)):
            item_prompts.main([*arguments, "--templates", json.dumps(PLAIN), *change])
