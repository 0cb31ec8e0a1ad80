"""The record of a batch's tokens: states, what is null, and its size."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from verl.experimental.agent_loop.masks import extended_token_mask, trainable_mask
from verl.protocol import DataProto
from verl.utils.rollout_dump import dump_answers
from verl.utils.token_record import SCORES, STATES, write_token_record

START, PAD = 100, 0
LETTER = {"trained": "t", "other": "o", "after_item": "a", "whole_answer": "w"}


class NumberTokenizer:
    """A token is its id in brackets."""

    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{token}>" for token in ids)


def drawn(answers: list[tuple[str, dict[str, bool]]], **scores: Any) -> DataProto:
    """A batch of answers: m, u written by the model or by a tool, M, U items; options of `trainable_mask`.

    Response tokens of a row are 1, 2, ... or 100 more; prompts are 7 and 8, after padding.
    """
    width = max(len(drawing) for drawing, _ in answers) + 1
    tensors: dict[str, list[list[int]]] = {}
    for drawing, options in answers:
        padding = [0] * (width - len(drawing))
        ids = [place + START * letter.isupper() for place, letter in enumerate(drawing, 1)]
        extended = extended_token_mask(ids, START)
        mask = trainable_mask([int(letter in "mM") for letter in drawing], extended, **options)
        row = {"prompts": [PAD, 7, 8], "responses": [*ids, *padding], "response_mask": [*mask, *padding]}
        row["attention_mask"] = [0, 1, 1, *[1] * len(ids), *padding]
        for key, values in (row | {"distill_special_token_mask": [*extended, *padding]}).items():
            tensors.setdefault(key, []).append(values)
    return DataProto.from_dict({key: torch.tensor(rows) for key, rows in tensors.items()} | scores)


def record(batch: DataProto, folder: Path, teachers: tuple[str, ...] = ("ref",)) -> list[dict[str, Any]]:
    return pq.read_table(write_token_record(folder, 3, batch, NumberTokenizer(), teachers)).to_pylist()


ANSWERS = [
    ("mmuumm", {}, "ttoott"),
    ("mMmuMm", {}, "ttaaaa"),  # after an item a tool's tokens too
    ("muUmm", {}, "tooaa"),  # an item in a tool's answer
    ("mMum", {"drop_whole": True}, "wwww"),
    ("mmm", {"drop_whole": True}, "ttt"),  # without an item nothing is left out
    ("mMum", {"keep_rest": True}, "ttot"),  # the teacher knows items
    ("Mu", {"keep_rest": True}, "to"),  # the same, and nothing trained after the item
    ("", {}, ""),
]


@pytest.mark.parametrize("named", [True, False])
def test_states_of_answers(named: bool, tmp_path: Path) -> None:
    answers = ANSWERS if named else [*ANSWERS[:6], *ANSWERS[7:]]  # the mask of one tells what its teacher knows
    batch = drawn([(drawing, options) for drawing, options, _ in answers])
    if named:
        knows = ["keep_rest" in options for _, options, _ in answers]
        batch.non_tensor_batch["teacher_knows_extended"] = np.array(knows, dtype=object)
    rows = record(batch, tmp_path)
    assert ["".join(LETTER[state] for state in row["state"]) for row in rows] == [states for *_, states in answers]
    assert [row["response_length"] for row in rows] == [len(drawing) for drawing, *_ in answers]
    assert {state for row in rows for state in row["state"]} == set(STATES)


def test_an_answer_that_its_loop_left_out_whole(tmp_path: Path) -> None:
    batch = drawn([("mmu", {})])
    batch.tensor("response_mask").zero_()
    assert record(batch, tmp_path)[0]["state"] == ["whole_answer"] * 3


def test_columns_and_what_is_null(tmp_path: Path) -> None:
    """The update scored the student, a stage before it the teacher. Each row's third token is not trained."""
    nan = float("nan")
    student = torch.tensor([[-1.0, -2.0, 0.0, -3.0, 0.0], [-0.5, -0.0, 0.0, 0.0, 0.0]])
    teacher = torch.tensor([[-1.5, nan, -9.0, -3.5, 0.0], [-0.25, -40.0, -7.0, 0.0, 0.0]])
    signal = torch.tensor([[0.5, 0.0, 9.0, 0.25, 0.0], [2.0, 3.0, 0.0, 0.0, 0.0]])
    scores = {"old_log_probs": student, "ref_log_prob": teacher, "advantages": signal, "extend_mass": 0 * signal}
    scores["token_level_scores"] = torch.tensor([[0.0, 0.0, 0.0, 1.5, 0.0], [0.0, 0.0, 0.5, 0.0, 0.0]])
    batch = drawn([("mmum", {}), ("mMm", {})], **scores, teacher=torch.tensor([1, 0]))
    names = {"uid": ["3-8", "3-9"], "index": [8, 9], "source": ["math", "item"]}
    batch.union(DataProto.from_dict(None, names, {"weight_version": 2}))
    (tmp_path / "3.tokens.parquet").write_text("that of a step that is run again is replaced")
    first, second = record(batch, tmp_path, ("ref", "self"))
    assert {name: first[name] for name in list(first)[:11]} == {
        "step": 3,
        "weight_version": 2,
        "uid": "3-8",
        "index": "8",
        "source": "math",
        "teacher": "self",
        "prompt_length": 2,
        "response_length": 4,
        "score": 1.5,
        "signal_name": "advantage",
        "prompt_ids": [7, 8],
    }
    assert (second["teacher"], second["score"], second["token_id"]) == ("ref", 0.5, [1, 102, 3])
    assert (second["text"], second["is_item"]) == (["<1>", "<102>", "<3>"], [False, True, False])
    assert first["student_log_prob"] == [-1.0, -2.0, None, -3.0] and second["student_log_prob"] == [-0.5, 0.0, None]
    assert first["teacher_log_prob"] == [-1.5, pytest.approx(nan, nan_ok=True), -9.0, -3.5]
    assert second["teacher_log_prob"] == [-0.25, None, None], "a stand-in, and a text that the teacher has not read"
    assert first["signal"] == [0.5, 0.0, None, 0.25] and second["signal"] == [2.0, 3.0, None]
    assert first["entropy"] == [None] * 4 and first["extend_mass"] == [0.0, 0.0, None, 0.0]

    batch.union(DataProto.from_dict({"divergence": 2 * signal}))
    first, second = record(batch, tmp_path, ("ref", "self"))
    assert (first["signal_name"], second["signal"]) == ("divergence", [4.0, 6.0, None])


def test_a_run_without_teacher_and_reward(tmp_path: Path) -> None:
    (row,) = record(drawn([("mm", {})]), tmp_path, ())
    assert (row["teacher"], row["source"], row["score"], row["signal_name"]) == ("", "", None, None)
    assert all(row[column] == [None, None] for column in SCORES) and row["state"] == ["trained"] * 2


def test_a_record_is_small(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """20 MB for 1,000 answers of 500 tokens are 1 MB for 50: 40 bytes a token."""
    rows, length, generator = 50, 500, torch.Generator().manual_seed(0)
    shape = (rows, length)
    ones = torch.ones(shape, dtype=torch.int64)
    ids = (len(tokenizer) * torch.rand(shape, generator=generator) ** 4).long()  # few of them are frequent
    scores = {
        key: -torch.randn(shape, generator=generator).abs() for key in (*filter(None, SCORES.values()), "divergence")
    }
    masks = {"response_mask": ones, "distill_special_token_mask": 0 * ones, "attention_mask": ones.repeat(1, 2)}
    batch = DataProto.from_dict({"prompts": ids, "responses": ids} | masks | scores)
    path = write_token_record(tmp_path, 1, batch, tokenizer, ("ref",))
    print(f"{path.stat().st_size / ids.numel():.1f} bytes a token")
    assert path.stat().st_size < 1e6
    table = pq.read_table(path)
    assert torch.equal(torch.tensor(table["signal"].to_pylist()), scores["divergence"])
    assert pa.types.is_dictionary(table["text"].type.value_type)
    leaves = pq.ParquetFile(path).metadata.row_group(0).to_dict()["columns"]
    encodings = {leaf["path_in_schema"].split(".")[0]: leaf["encodings"] for leaf in leaves}
    assert {name for name, used in encodings.items() if "BYTE_STREAM_SPLIT" in used} == set(SCORES)
    assert {"text", "state", "token_id"} <= {name for name, used in encodings.items() if "RLE_DICTIONARY" in used}
    assert {leaf["compression"] for leaf in leaves} == {"ZSTD"}


def test_rows_are_those_of_the_lines_beside_it(tmp_path: Path) -> None:
    batch = drawn([("mm", {}), ("mMm", {})]).union(DataProto.from_dict(None, {"uid": ["a", "b"]}))
    dump_answers(tmp_path / "dump", 7, batch[[1, 0]], NumberTokenizer(), ())
    assert sorted(path.name for path in (tmp_path / "dump").iterdir()) == ["7.jsonl", "7.tokens.parquet"]
    table = pq.read_table(tmp_path / "dump" / "7.tokens.parquet", columns=["uid", "text"]).to_pylist()
    assert [(row["uid"], "".join(row["text"])) for row in table] == [("b", "<1><102><3>"), ("a", "<1><2>")]
