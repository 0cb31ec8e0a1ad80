"""Rehearsal prompts of random items: whole items, drawn from where they should be, the same each time, and kept."""

import json
import re
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from verl.config import DataConfig, DistillConfig, PromptTemplateConfig, SyntheticItemPromptsConfig, TeacherConfig
from verl.trainer.data import build_datasets
from verl.utils.dataset.items import read_catalogue
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.dataset.synthetic_items import draw_chats, item_source, write_prompts

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


@pytest.fixture(scope="module")
def student(tiny_tokenizers):
    return AutoTokenizer.from_pretrained(tiny_tokenizers[1])


@pytest.fixture(scope="module")
def extend_start(tiny_tokenizers) -> int:
    return len(AutoTokenizer.from_pretrained(tiny_tokenizers[0]))


def write_catalogue(path: Path, sids: list[list[int]]) -> str:
    pq.write_table(pa.table({"sid": sids}), path)
    return str(path)


def write_general(path: Path, rows: int = 4, column: str = "messages") -> str:
    chat = [{"role": "user", "content": "Why is the sky blue?"}, {"role": "assistant", "content": "Air."}]
    messages = [json.dumps(chat if column == "messages" else chat[:1])] * rows
    pq.write_table(pa.table({column: messages, "source": ["general"] * rows}), path)
    return str(path)


def items_of(text: str) -> list[tuple[int, ...]]:
    found = [tuple(int(code) for code in codes) for codes in ITEM.findall(text)]
    assert "<s_" not in ITEM.sub("", text) and "sid_" not in ITEM.sub("", text), "only whole items"
    return found


def test_templates_come_in_turn_with_as_many_items_as_they_ask_for(student) -> None:
    chats = list(draw_chats(config_of(), item_source(student, None)))
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


def test_random_codes_are_all_that_the_tokenizer_has_tokens_for(student, extend_start) -> None:
    chats = [chat for _, chat in draw_chats(config_of(), item_source(student, None))]
    items = [item for chat in chats for item in items_of(chat[-1]["content"])]
    for level in range(3):
        assert {item[level] for item in items} == set(range(CODES))
    ids = student.encode(chats[0][-1]["content"], add_special_tokens=False)
    extended = [token for token in ids if token >= extend_start]
    assert len(extended) == 5 * len(items_of(chats[0][-1]["content"])), "a token for each part of an item"


def test_items_of_a_catalogue_are_all_drawn_and_no_others(student, tmp_path) -> None:
    path = write_catalogue(tmp_path / "items.parquet", [[0, 1, 2], [7, 7, 7], [3, 1, 0], [0, 1, 2]])
    chats = draw_chats(config_of(), item_source(student, path))
    assert {item for _, chat in chats for item in items_of(chat[-1]["content"])} == {(0, 1, 2), (7, 7, 7), (3, 1, 0)}


def test_tokens_of_the_real_recommender(shared_data) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizer" / "qwen3-onerec")
    draw_item, random = item_source(tokenizer, None), Random(0)
    drawn = [draw_item(random) for _ in range(2000)]
    assert all(len(item) == 3 and max(item) < 8192 for item in drawn)
    assert [max(item[level] for item in drawn) > 8000 for level in range(3)] == [True] * 3
    (_, chat), *_ = draw_chats(config_of(1, min_history=6, max_history=6), draw_item)
    ids = tokenizer.encode(chat[-1]["content"], add_special_tokens=False)
    assert sum(token >= 151669 for token in ids) == 6 * 5
    retail = shared_data / "rec" / "online_retail" / "items.parquet"
    known, draw_item = set(read_catalogue(retail)), item_source(tokenizer, str(retail))
    assert all(draw_item(random) in known for _ in range(2000))


def test_the_same_prompts_each_time(student, tmp_path) -> None:
    draw_item = item_source(student, None)
    first, again, fewer = (list(draw_chats(config_of(count), draw_item)) for count in (30, 30, 20))
    assert first == again and first[:20] == fewer
    assert first != list(draw_chats(config_of(30, seed=1), draw_item))
    for name in ("a", "b"):
        write_prompts(tmp_path / name, config_of(30), draw_item)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("sids", [[[0, 1, 8]], [[0, 1, 2, 3]]])
def test_a_catalogue_of_another_tokenizer(student, tmp_path, sids) -> None:
    path = write_catalogue(tmp_path / "items.parquet", sids)
    with pytest.raises(ValueError, match=r"needs 1 tokens that the student's tokenizer lacks, such as <s_[cd]_[83]>"):
        item_source(student, path)


def test_a_tokenizer_without_items(tiny_tokenizers) -> None:
    with pytest.raises(ValueError, match=r"no whole set of item tokens.*levels found: none"):
        item_source(AutoTokenizer.from_pretrained(tiny_tokenizers[0]), None)


def load(tmp_path: Path, student, extend_start: int, synthetic: SyntheticItemPromptsConfig, **settings):
    """The training data of a run whose rehearsal prompts the frozen student judges."""
    settings = {"train_files": write_general(tmp_path / "general.parquet"), "train_batch_size": 4, **settings}
    config = DataConfig(max_prompt_length=128, synthetic_item_prompts=synthetic, **settings)
    teacher = TeacherConfig(sources=["synthetic_rec_*"], prompts="with_items")
    return build_datasets(
        config,
        student,
        extend_vocab_start_token=extend_start,
        extended_sources=DistillConfig(teachers={"self": teacher}).extended_sources,
        dropped_rows_folder=tmp_path,
    )[0]


def test_they_join_the_training_data_and_are_kept(student, extend_start, tmp_path, caplog) -> None:
    """Though ``data.prompt_extend_tokens=drop``: the teacher of their sources reads them."""
    caplog.set_level("INFO")
    data = load(tmp_path, student, extend_start, config_of(6))
    rec = [f"synthetic_rec_{name}" for name in TEMPLATES]
    assert data.sources == [*rec, *rec, *["general"] * 4]
    assert data.has_extended == [True] * 6 + [False] * 4
    assert not data.ledger.dropped and data.ledger.kept["synthetic_rec_next"] == 2
    assert "6 prompts of random codes join the training data" in caplog.text
    assert "source synthetic_rec_caption: 2" in caplog.text
    item = data[0]
    assert [message["role"] for message in item["raw_prompt"]] == ["system", "user"]
    assert (item["reward_model"]["ground_truth"], item["uuid"]) == ("", "synthetic_rec-0-0")
    assert [data[place]["raw_prompt"] for place in range(6)] == [
        chat for _, chat in draw_chats(config_of(6), item_source(student, None))
    ]
    distill = DistillConfig(teachers={"self": TeacherConfig(sources=["synthetic_rec_*"], prompts="with_items")})
    kinds = zip(data.sources, data.has_extended, strict=True)
    assert [distill.teacher_of(*kind) for kind in kinds] == [1] * 6 + [0] * 4


def test_the_limit_on_samples_speaks_of_the_files(student, extend_start, tmp_path) -> None:
    data = load(tmp_path, student, extend_start, config_of(3), train_max_samples=2)
    assert data.sources == [f"synthetic_rec_{name}" for name in TEMPLATES] + ["general"] * 2


def test_they_are_filtered_by_length_as_other_rows_are(student, extend_start, tmp_path) -> None:
    synthetic = config_of(9, min_history=40, max_history=40)
    data = load(tmp_path, student, extend_start, synthetic, filter_overlong_prompts=True)
    assert data.ledger.dropped == {"overlong": 3} and "synthetic_rec_next" not in data.sources


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_they_take_the_layout_of_the_files(student, extend_start, tmp_path, column) -> None:
    """verl's column of prompts, whatever its name, holds no answer."""
    files = write_general(tmp_path / "verl.parquet", column="prompt")
    if column == "messages":
        pq.write_table(pq.read_table(files).rename_columns({"prompt": column}), files)
    data = load(tmp_path, student, extend_start, config_of(3), train_files=files, prompt_key=column)
    assert type(data) is RLHFDataset and len(data) == 7
    assert [message["role"] for message in data[1]["raw_prompt"]] == ["user"]


def test_the_file_is_made_once_for_what_it_depends_on(student, extend_start, tmp_path) -> None:
    path = write_catalogue(tmp_path / "items.parquet", [[0, 1, 2]])
    made = [load(tmp_path, student, extend_start, config_of(3, catalogue=path)).files[0] for _ in range(2)]
    assert made[0] == made[1] and "0><s_b_1><s_c_2" in pq.read_table(made[0])["messages"][0].as_py()
    write_catalogue(tmp_path / "items.parquet", [[2, 1, 0]])
    other = load(tmp_path, student, extend_start, config_of(3, catalogue=path)).files[0]
    assert other != made[0] and "2><s_b_1><s_c_0" in pq.read_table(other)["messages"][0].as_py()
    moved = write_catalogue(tmp_path / "moved.parquet", [[2, 1, 0]])
    assert load(tmp_path, student, extend_start, config_of(3, catalogue=moved)).files[0] == other


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
