"""Writes the answers of a batch where a person can read them.

In:  a batch after generation. Out: ``<folder>/<step>.jsonl``, one row a line, which training does not read back, with
the record of its tokens beside it (``token_record``); lines on the console, around a progress bar rather than through
it; and for a table of Weights & Biases each answer as HTML, its tokens in the colours of the viewer (``verl.viewer``).
"""

import html
import json
import logging
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.utils.durable_files import write_durably
from verl.utils.token_record import token_record, write_token_record
from verl.utils.torch_functional import real_response_tokens

logger = logging.getLogger(__name__)

COPIED_COLUMNS = ("uid", "index", "source", "data_source")
"""Object columns that are copied as they are, where the batch has them."""
ABOVE, BELOW = "217, 72, 15", "47, 125, 225"
"""Orange where the student gives a token more than the teacher does, blue where it gives less."""
FULL_COLOUR_NATS = 4.0


def generation_rows(batch: DataProto, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """One dict a row.

    ``input`` and ``output`` (text with its special and item tokens, padding left out), ``gts`` (the ground truth or
    None), ``response_tokens``, ``trained_tokens``, ``extend_tokens``; ``num_turns``, ``score`` and the columns of
    `COPIED_COLUMNS` where the batch has them; and what the reward function returned with the score, by its keys, but
    for those that are taken.
    """
    responses, written = batch.tensor("responses"), real_response_tokens(batch)
    in_prompt = batch.tensor("attention_mask")[:, : -responses.shape[1]].bool()
    rows = []
    for row in range(len(batch)):
        columns = {key: batch.non_tensor_batch[key][row] for key in batch.non_tensor_batch}
        described: dict[str, Any] = {key: columns[key] for key in COPIED_COLUMNS if key in columns}
        described["input"] = tokenizer.decode(batch.tensor("prompts")[row][in_prompt[row]].tolist())
        described["output"] = tokenizer.decode(responses[row][written[row]].tolist())
        reward_model = columns.get("reward_model")
        described["gts"] = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
        described["response_tokens"] = int(written[row].sum())
        described["trained_tokens"] = int(batch.tensor("response_mask")[row].sum())
        described["extend_tokens"] = int(batch.tensor("distill_special_token_mask")[row].sum())
        if "__num_turns__" in columns:
            described["num_turns"] = int(columns["__num_turns__"])
        if "token_level_scores" in batch.batch:
            described["score"] = float(batch.batch["token_level_scores"][row].sum())
        rows.append({**columns.get("reward_extra", {}), **described})
    return rows


def show_answers(batch: DataProto, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
    """Write the first answers of a batch to the console, a line each after its ``uid``.

    Returns:
        Their `generation_rows`, each with ``html``, its output with coloured tokens.
    """
    if count < 1:
        return []
    shown = batch.slice(0, min(count, len(batch)))
    rows = generation_rows(shown, tokenizer)
    for row, row["html"] in zip(rows, answers_as_html(shown, tokenizer), strict=True):
        tqdm.write(f"[{row['uid']}] {row['output']}")
    return rows


def answers_as_html(batch: DataProto, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One text an answer; tokens are coloured where the batch has ``old_log_probs`` and ``ref_log_prob`` of them."""
    record = token_record(batch, 0, tokenizer, []).select(["text", "student_log_prob", "teacher_log_prob"])
    answers = ["".join(map(_token, *row.values())) for row in record.to_pylist()]
    style = '<meta charset="utf-8"><div style="white-space: pre-wrap; font: 13px sans-serif">'
    return [f"{style}{answer}</div>" for answer in answers]


def _token(text: str, student: float | None, teacher: float | None) -> str:
    shown = html.escape(text)
    if student is None or teacher is None or not math.isfinite(gap := student - teacher):
        return shown
    share = 0.65 * min(1.0, abs(gap) / FULL_COLOUR_NATS)
    colour = f"rgba({ABOVE if gap > 0 else BELOW}, {share:.2f})"
    return f'<span style="background: {colour}" title="student {student:.3f}, teacher {teacher:.3f}">{shown}</span>'


def _plain(value: Any) -> Any:
    """Numbers of NumPy and torch as Python's, all else that JSON does not know as text."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else str(value)


def dump_answers(
    folder: str | Path | None, step: int, batch: DataProto, tokenizer: PreTrainedTokenizerBase, teachers: Sequence[str]
) -> None:
    """Write a batch's answers to ``<folder>/<step>.jsonl`` and their tokens to ``<folder>/<step>.tokens.parquet``.

    Files of that step are replaced. A folder that cannot be written, a full disk say, is an error in the log.

    Args:
        folder: None: nothing is written.
        teachers: their names, by place.
    """
    if folder is None:
        return
    folder = Path(folder)
    rows = [{"step": step} | row | {"step": step} for row in generation_rows(batch, tokenizer)]
    lines = [json.dumps(row, ensure_ascii=False, default=_plain) for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_token_record(folder, step, batch, tokenizer, teachers)
        write_durably(folder / f"{step}.jsonl", "".join(f"{line}\n" for line in lines))
    except OSError as error:
        with suppress(OSError):  # what is there of the step may be of two runs
            for path in folder.glob(f"{step}.*"):
                path.unlink()
        logger.error("the answers of step %d are not in %s: %s", step, folder, error)
