"""Rehearsal prompts of random items: whole items, drawn from where they should be, the same each time, and kept."""

import json
import re
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
from support.chat_files import EXTEND_START, write_rows
from transformers import AutoTokenizer

from verl.config import DataConfig, PromptTemplateConfig, SyntheticItemPromptsConfig
from verl.trainer.data import build_datasets
from verl.utils.dataset.items import draw_chats, item_sampler, read_catalogue, write_item_prompts
from verl.utils.dataset.rl_dataset import RLHFDataset

TEMPLATES = {
    "next": PromptTemplateConfig("history: {history}", system="You recommend."),
    "caption": PromptTemplateConfig('caption {"of": {item}}'),
    "either": PromptTemplateConfig("{item} or {item}?"),
}
ITEM = re.compile(r"<\|sid_begin\|><s_a_(\d+)><s_b_(\d+)><s_c_(\d+)><\|sid_end\|>")
CODES = 8


def config_of(count: int = 300, **changes) -> SyntheticItemPromptsConfig:
    settings = {"count": count, "templates": TEMPLATES, "min_history": 2, "max_history": 4, **changes}
    return SyntheticItemPromptsConfig(**settings)


def write_catalogue(path: Path, sids: list[list[int]]) -> str:
    return str(write_rows(path, [{"sid": sid} for sid in sids]))


def write_general(path: Path, column: str = "messages", answered: bool = True) -> str:
    chat = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Air."}]
    row = {column: json.dumps(chat if answered else chat[:1]), "source": "general"}
    return str(write_rows(path, [row] * 4))


def items_of(text: str) -> list[tuple[int, ...]]:
    found = [tuple(int(code) for code in codes) for codes in ITEM.findall(text)]
    assert "<s_" not in ITEM.sub("", text) and "sid_" not in ITEM.sub("", text), "only whole items"
    return found


def test_templates_come_in_turn_with_as_many_items_as_they_ask_for(tokenizer) -> None:
    chats = list(draw_chats(config_of(), item_sampler(tokenizer, None)))
    assert [source for source, _ in chats[:4]] == [f"synthetic_rec_{name}" for name in [*TEMPLATES, "next"]]
    lengths = {
        name: {len(items_of(chat[-1]["content"])) for source, chat in chats if source.endswith(name)}
        for name in TEMPLATES
    }
    assert lengths == {"next": {2, 3, 4}, "caption": {1}, "either": {2}}
    system, user = chats[0][1]
    assert system == {"role": "system", "content": "You recommend."} and user["content"].startswith("history: <|sid")
    assert re.sub(ITEM, "X", chats[1][1][0]["content"]) == 'caption {"of": X}'
    first, second = zip(*(items_of(chat[0]["content"]) for _, chat in chats[2::3]), strict=True)
    assert first != second, "each is drawn anew"


def test_random_codes_are_all_that_the_tokenizer_has_tokens_for(tokenizer) -> None:
    chats = [chat for _, chat in draw_chats(config_of(), item_sampler(tokenizer, None))]
    items = [item for chat in chats for item in items_of(chat[-1]["content"])]
    for level in range(3):
        assert {item[level] for item in items} == set(range(CODES))
    ids = tokenizer.encode(chats[0][-1]["content"], add_special_tokens=False)
    extended = [token for token in ids if token >= EXTEND_START]
    assert len(extended) == 5 * len(items_of(chats[0][-1]["content"])), "a token for each part of an item"


def test_items_of_a_catalogue_are_all_drawn_and_no_others(tokenizer, tmp_path) -> None:
    path = write_catalogue(tmp_path / "items.parquet", [[0, 1, 2], [7, 7, 7], [3, 1, 0], [0, 1, 2]])
    chats = draw_chats(config_of(), item_sampler(tokenizer, path))
    assert {item for _, chat in chats for item in items_of(chat[-1]["content"])} == {(0, 1, 2), (7, 7, 7), (3, 1, 0)}


def test_tokens_of_the_real_recommender(shared_data) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "qwen3-onerec")
    draw_item, random = item_sampler(tokenizer, None), Random(0)
    drawn = [draw_item(random) for _ in range(2000)]
    assert [8000 < max(item[level] for item in drawn) < 8192 for level in range(3)] == [True] * 3
    (_, chat), *_ = draw_chats(config_of(1, min_history=6, max_history=6), draw_item)
    ids = tokenizer.encode(chat[-1]["content"], add_special_tokens=False)
    assert sum(token >= 151669 for token in ids) == 6 * 5
    retail = shared_data / "rec" / "online_retail" / "items.parquet"
    assert len(read_catalogue(retail)) > 1000 and callable(item_sampler(tokenizer, str(retail)))


def test_the_same_prompts_each_time(tokenizer, tmp_path) -> None:
    draw_item = item_sampler(tokenizer, None)
    first, again, fewer = (list(draw_chats(config_of(count), draw_item)) for count in (30, 30, 20))
    assert first == again and first[:20] == fewer
    assert first != list(draw_chats(config_of(30, seed=1), draw_item))
    for name in ("a", "b"):
        write_item_prompts(tmp_path / name, config_of(30), tokenizer)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("sids", [[[0, 1, 8]], [[0, 1, 2, 3]]])
def test_a_catalogue_of_another_tokenizer(tokenizer, tmp_path, sids) -> None:
    path = write_catalogue(tmp_path / "items.parquet", sids)
    with pytest.raises(ValueError, match=r"needs 1 tokens that the student's tokenizer lacks, such as <s_[cd]_[83]>"):
        item_sampler(tokenizer, path)


def test_a_tokenizer_without_items(tiny_tokenizers) -> None:
    with pytest.raises(ValueError, match=r"no whole set of item tokens.*levels found: none"):
        item_sampler(AutoTokenizer.from_pretrained(tiny_tokenizers[0]), None)


def load(tmp_path: Path, tokenizer, synthetic: SyntheticItemPromptsConfig, **settings):
    """The training data of a run whose teacher of the rehearsal prompts knows item tokens."""
    settings = {"train_files": write_general(tmp_path / "general.parquet"), "train_batch_size": 4, **settings}
    config = DataConfig(max_prompt_length=128, synthetic_item_prompts=synthetic, **settings)
    options = {"extend_vocab_start_token": EXTEND_START, "extended_sources": ["synthetic_rec_*"]}
    return build_datasets(config, tokenizer, **options, dropped_rows_folder=tmp_path)[0]


def test_they_join_the_training_data_and_are_kept(tokenizer, tmp_path, caplog) -> None:
    """Though ``data.prompt_extend_tokens=drop``: the teacher of their sources knows item tokens."""
    caplog.set_level("INFO")
    data = load(tmp_path, tokenizer, config_of(6))
    rec = [f"synthetic_rec_{name}" for name in TEMPLATES]
    assert data.sources == [*rec, *rec, *["general"] * 4]
    assert data.has_extended == [True] * 6 + [False] * 4
    assert not data.drop_report.dropped and data.drop_report.kept["synthetic_rec_next"] == 2
    assert "6 prompts of random codes join the training data" in caplog.text
    assert "source synthetic_rec_caption: 2" in caplog.text
    item = data[0]
    assert [message["role"] for message in item["raw_prompt"]] == ["system", "user"]
    assert (item["reward_model"]["ground_truth"], item["uuid"]) == ("", "synthetic_rec-0-0")
    assert [data[place]["raw_prompt"] for place in range(6)] == [
        chat for _, chat in draw_chats(config_of(6), item_sampler(tokenizer, None))
    ]


def test_they_are_filtered_by_length_and_not_counted_as_samples_of_the_files(tokenizer, tmp_path) -> None:
    synthetic = config_of(6, min_history=40, max_history=40)
    data = load(tmp_path, tokenizer, synthetic, filter_overlong_prompts=True, train_max_samples=2)
    assert data.sources == ["synthetic_rec_caption", "synthetic_rec_either"] * 2 + ["general"] * 2
    assert data.drop_report.dropped_by_source == {("overlong", "synthetic_rec_next"): 2}


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_they_take_the_layout_of_the_files(tokenizer, tmp_path, column) -> None:
    """verl's column of prompts, whatever its name, holds no answer."""
    files = write_general(tmp_path / "verl.parquet", column, answered=False)
    data = load(tmp_path, tokenizer, config_of(3), train_files=files, prompt_key=column)
    assert type(data) is RLHFDataset and len(data) == 7
    assert [message["role"] for message in data[1]["raw_prompt"]] == ["user"]


def test_the_file_is_made_once_for_what_it_depends_on(tokenizer, tmp_path) -> None:
    path = write_catalogue(tmp_path / "items.parquet", [[0, 1, 2]])
    made = [load(tmp_path, tokenizer, config_of(3, catalogue=path)).files[0] for _ in range(2)]
    assert made[0] == made[1] and "0><s_b_1><s_c_2" in pq.read_table(made[0])["messages"][0].as_py()
    write_catalogue(tmp_path / "items.parquet", [[2, 1, 0]])
    other = load(tmp_path, tokenizer, config_of(3, catalogue=path)).files[0]
    assert other != made[0] and "2><s_b_1><s_c_0" in pq.read_table(other)["messages"][0].as_py()
    moved = write_catalogue(tmp_path / "moved.parquet", [[2, 1, 0]])
    assert load(tmp_path, tokenizer, config_of(3, catalogue=moved)).files[0] == other


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": -1}, "count=-1 must be at least 0"),
        ({"min_history": 5}, "min_history=5 must lie between 1 and data.synthetic_item_prompts.max_history=4"),
        ({"min_history": 0}, "min_history=0 must be at least 1"),
        ({"templates": {}}, "count=300 needs data.synthetic_item_prompts.templates"),
        ({"templates": {"a": PromptTemplateConfig("history")}}, "templates.a.user='history' holds neither"),
    ],
)
def test_settings_that_make_no_prompts(changes, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config_of(**changes)
