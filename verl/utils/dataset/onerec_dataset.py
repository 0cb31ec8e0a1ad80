"""Prompts from OneRec's parquet files.

In: rows with ``messages`` (a whole chat, the reference answer last), ``source``, ``uuid`` and ``metadata``. Out: the
items of ``RLHFDataset``: the prompt is everything before the last assistant message, that message's content is the
ground truth, and ``extra_info`` is the row's metadata. Rows of plain text (``segments``) are no prompts and are
dropped.

As a command it prints what the data holds and which rows a run would drop (``data_report``)::

    python -m verl.utils.dataset.onerec_dataset --files F... --tokenizer T [--extend-vocab-start-token N]
        [--max-prompt-length N] [--json]
"""

import json
from typing import Any

from verl.utils.dataset.onerec_messages import BadRowError, parse_messages, split_answer
from verl.utils.dataset.parquet_files import Row
from verl.utils.dataset.prompt_rows import PromptRow, text_of
from verl.utils.dataset.rl_dataset import RLHFDataset


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
        try:
            messages = parse_messages(row.get("messages"))
        except BadRowError as bad:
            if bad.reason == "no_messages" and row.get("segments"):
                raise BadRowError("plain_text", "the row holds segments, not a chat") from bad
            raise
        prompt, answer = split_answer(messages)
        return PromptRow(prompt, ground_truth=answer, extra_info=_metadata_of(row.get("metadata")))

    def text_of(self, row: Row) -> str:
        """As in the base class, or the segments of a row without a chat."""
        return super().text_of(row) or text_of(row.get("segments"))


def _metadata_of(value: Any) -> dict[str, Any]:
    """The row's metadata; what is no JSON object is kept as it is, since a chat is usable without it."""
    known = value
    if isinstance(value, str | bytes):
        try:
            known = json.loads(value)
        except (ValueError, RecursionError):
            known = text_of(value)
    if isinstance(known, dict):
        return known
    return {} if value is None else {"metadata": known}


if __name__ == "__main__":
    from verl.utils.dataset.data_report import main

    main()
