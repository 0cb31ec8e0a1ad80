"""Prompts from OneRec's parquet files.

In: rows with ``messages`` (a whole chat, the reference answer last), ``source``, ``uuid`` and ``metadata``. Out: the
items of ``RLHFDataset``: the prompt is everything before the last assistant message, that message's content is the
ground truth, and ``extra_info`` is the row's metadata. Rows of plain text (``segments``) are no prompts and are
dropped.
"""

import json
from typing import Any

from verl.utils.dataset.onerec_messages import BadRowError, parse_messages, split_answer
from verl.utils.dataset.parquet_files import Row
from verl.utils.dataset.rl_dataset import PromptRow, RLHFDataset


class OneRecDataset(RLHFDataset):
    """Prompts from chats in OneRec's layout; arguments and errors as in ``RLHFDataset``."""

    def message_column(self) -> str:
        """OneRec's name for it."""
        return "messages"

    def columns(self) -> set[str]:
        """As in the base class, with OneRec's own columns."""
        return super().columns() | {"segments", "metadata"}

    def read_prompt(self, row: Row) -> PromptRow:
        """Split one chat at its last answer; raises BadRowError where it cannot be used."""
        if not row.get("messages") and row.get("segments"):
            raise BadRowError("plain_text", "the row holds segments, not a chat")
        prompt, answer = split_answer(parse_messages(row.get("messages")))
        return PromptRow(prompt, ground_truth=answer, extra_info=_metadata_of(row.get("metadata")))


def _metadata_of(value: Any) -> dict[str, Any]:
    """The row's metadata; what is no JSON object is kept as text, since a chat is usable without it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"metadata": value}
    if isinstance(value, dict):
        return value
    return {} if value is None else {"metadata": value}
