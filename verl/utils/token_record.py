"""Writes, token by token, what a batch's answers are and what the update made of them, for programs that show it.

In:  a batch after the update, or of a validation. Out: ``<folder>/<step>.tokens.parquet``, one row an answer, in the
order of ``<step>.jsonl`` beside it (``rollout_dump``). docs/metrics.md describes the columns for those who read them.
Training does not read the file back.

Letters: B answers, R response tokens.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.utils.durable_files import write_durably
from verl.utils.torch_functional import knows_extended, real_response_tokens

STATES = {
    "trained": "The update learns from this token.",
    "other": "The model did not write it (a tool's output, a user's turn), or its agent loop left it out.",
    "after_item": "It stands after the first item token of a row whose teacher lacks these and reads something else.",
    "whole_answer": "No token of the answer is trained: it holds an item token and "
    "rollout.mask_response_if_have_extend_token is on, or its agent loop left it out.",
}
"""Why a token of an answer is trained or not, with a sentence each."""

SCORES = {
    "student_log_prob": "old_log_probs",
    "teacher_log_prob": "ref_log_prob",
    "signal": "",
    "entropy": "entropys",
    "extend_mass": "extend_mass",
}
"""Columns of numbers, and the batch key of each; that of ``signal`` follows from the objective."""
SIGNALS = {"divergence": "divergence", "advantages": "advantage"}
"""Batch keys that the update follows, the first that is there, and how the record names it."""
TOKENS = ("token_id", "text", "state")
"""Further columns over an answer's tokens, which have few distinct values."""


def token_states(batch: DataProto) -> np.ndarray:
    """(B, R) places in `STATES`, of real response tokens; those of padding mean nothing.

    Behind an item ``after_item`` also stands for what a tool wrote: masks do not tell them apart.
    """
    trained, _, void = _masks(batch)
    states = np.where(void, 2, 1)
    states[~trained.any(axis=1)] = 3
    states[trained] = 0
    return states


def _masks(batch: DataProto) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(B, R) bool: trained tokens; items that the row's teacher lacks; untrained tokens after the first such item."""
    trained, items = (batch.tensor(key).bool().numpy() for key in ("response_mask", "distill_special_token_mask"))
    items = items & ~knows_extended(batch).numpy()[:, None]
    behind = items.cumsum(axis=1) > items
    # A row with a trained token after an item keeps them all (`mask_after_extend_token=False`).
    keeps = (behind & trained).any(axis=1)
    return trained, items, behind & ~keeps[:, None]


def token_record(batch: DataProto, step: int, tokenizer: PreTrainedTokenizerBase, teachers: Sequence[str]) -> pa.Table:
    """One row an answer: its scalars, the prompt's ids, and lists over the answer's tokens.

    Args:
        batch: with the rollout's keys; of all others those that are there. A column of numbers is null where the run
            does not know a value, and everywhere where the batch lacks its key.
        step: of the run.
        tokenizer: shows each token as text by itself.
        teachers: names, by place among the teachers; the first scores all rows where rows name none.
    """
    trained, unknown_items, void = _masks(batch)
    in_prompt = batch.tensor("attention_mask")[:, : -trained.shape[1]].bool().numpy()
    real = real_response_tokens(batch).numpy()
    followed = next((key for key in SIGNALS if key in batch.batch), "")

    def numbers(column: str) -> pa.Array:
        """Null where no stage and no update scored: a key that is 0 at all real, untrained tokens is of an update."""
        key = SCORES[column] or followed
        if key not in batch.batch:
            return pa.nulls(int(real.sum()), pa.float32())
        values, known = batch.tensor(key).float().numpy(), trained
        if key != followed and values[real & ~trained].any():
            known = real
        if column == "teacher_log_prob":  # what stands there is no log-prob of this token in this text
            known = known & ~(unknown_items | void)
        return pa.array(values[real], mask=~known[real])

    rows = len(batch)
    scored = bool(teachers) and "ref_log_prob" in batch.batch
    places = batch.tensor("teacher").tolist() if "teacher" in batch.batch else [0] * rows
    score = batch.tensor("token_level_scores").sum(dim=1).numpy() if "token_level_scores" in batch.batch else None
    arrays = batch.non_tensor_batch
    source = arrays.get("source", arrays.get("data_source", [""] * rows))
    ids, inverse = np.unique(batch.tensor("responses").numpy()[real], return_inverse=True)
    # Parts of a character have the same text, and Parquet keeps no dictionary that names one twice.
    texts = pa.array([tokenizer.decode([token]) for token in ids.tolist()], pa.string()).dictionary_encode()
    columns: dict[str, Any] = {
        "step": pa.array([step] * rows, pa.int64()),
        "weight_version": pa.array([batch.meta_info.get("weight_version")] * rows, pa.int64()),
        "uid": pa.array([str(uid) for uid in arrays.get("uid", [""] * rows)]),
        "index": pa.array([str(index) for index in arrays.get("index", [""] * rows)]),
        "source": pa.array([str(name) for name in source]),
        "teacher": pa.array([teachers[place] if scored else "" for place in places]),
        "prompt_length": pa.array(in_prompt.sum(axis=1)),
        "response_length": pa.array(real.sum(axis=1)),
        "score": pa.nulls(rows, pa.float32()) if score is None else pa.array(score, pa.float32()),
        "signal_name": pa.array([SIGNALS.get(followed)] * rows, pa.string()),
        "prompt_ids": _lists(pa.array(batch.tensor("prompts").numpy()[in_prompt], pa.int32()), in_prompt),
    }
    of_tokens = {
        "token_id": pa.array(ids[inverse], pa.int32()),
        "text": texts.take(pa.array(inverse)),
        "is_item": pa.array(batch.tensor("distill_special_token_mask").bool().numpy()[real]),
        "state": pa.DictionaryArray.from_arrays(token_states(batch)[real].astype(np.int32), list(STATES)),
    } | {column: numbers(column) for column in SCORES}
    return pa.table(columns | {name: _lists(values, real) for name, values in of_tokens.items()})


def _lists(values: pa.Array, mask: np.ndarray) -> pa.ListArray:
    """``values`` at the places of ``mask``, row by row, as one list a row."""
    return pa.ListArray.from_arrays(np.concatenate([[0], mask.sum(axis=1).cumsum()]).astype(np.int32), values)


def write_token_record(
    folder: str | Path, step: int, batch: DataProto, tokenizer: PreTrainedTokenizerBase, teachers: Sequence[str]
) -> Path:
    """Write `token_record` to ``<folder>/<step>.tokens.parquet`` and return its path; a file of that step is replaced.

    Raises:
        OSError: the folder cannot be written; a file that was there is unchanged.
    """
    path, sink = Path(folder) / f"{step}.tokens.parquet", pa.BufferOutputStream()
    pq.write_table(
        token_record(batch, step, tokenizer, teachers),
        sink,
        compression="zstd",
        use_dictionary=["uid", "source", "teacher", "prompt_ids.list.element", *map(_leaf, TOKENS)],
        use_byte_stream_split=[*map(_leaf, SCORES)],
    )
    write_durably(path, sink.getvalue().to_pybytes())
    return path


def _leaf(column: str) -> str:
    """The name that Parquet gives the values of a list column."""
    return f"{column}.list.element"
