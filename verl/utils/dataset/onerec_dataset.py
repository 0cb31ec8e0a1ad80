"""Prompts from OneRec's parquet files, and the choice between this layout, verl's and a user's own class.

In: rows with ``messages`` (a chat, the reference answer last where there is one), ``source``, ``uuid`` and
``metadata``. Out: the items of ``RLHFDataset``: the prompt is everything before the assistant message at its end, that
message's content is the ground truth, and ``extra_info`` is the row's metadata. Rows of plain text (``segments``) are
dropped.

As a command, ``python -m verl.utils.dataset.onerec_dataset``, it prints the report of ``data_report``.
"""

import inspect
import json
import runpy
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.parquet_files import Files, Row, column_names, expand_data_files
from verl.utils.dataset.prompt_rows import BadRowError, PromptRow, parse_messages, split_answer, text_of
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.import_utils import load_extern_type

NEVER_CALLED = {
    "_read_files_and_tokenize": "columns() and read_prompt(row)",
    "_build_messages": "read_prompt(row)",
    "maybe_filter_out_long_prompts": "read_prompt(row), which may raise BadRowError",
}
"""Methods of verl's data set, and what a subclass overrides here in their place."""


class OneRecDataset(RLHFDataset):
    """Prompts from chats in OneRec's layout; arguments and errors as in ``RLHFDataset``."""

    def message_column(self) -> str:
        """OneRec's name for it."""
        return "messages"

    def columns(self) -> set[str]:
        """As in the base class, with OneRec's own columns."""
        return super().columns() | {"segments", "metadata"}

    def read_prompt(self, row: Row) -> PromptRow:
        """Split one chat at its last answer; raises BadRowError where it cannot be used.

        Metadata that are no JSON object are kept as they are: a chat is usable without them.
        """
        try:
            messages = parse_messages(row.get("messages"))
        except BadRowError as bad:
            if bad.reason == "no_messages" and row.get("segments"):
                raise BadRowError("plain_text", "the row holds segments, not a chat") from bad
            raise
        prompt, answer = split_answer(messages)
        metadata = row.get("metadata")
        try:
            known = json.loads(metadata) if isinstance(metadata, str | bytes) else metadata
        except (ValueError, RecursionError):
            known = text_of(metadata)
        if not isinstance(known, dict):
            known = {} if metadata is None else {"metadata": known}
        return PromptRow(prompt, ground_truth=answer, extra_info=known)


def get_dataset_class(data_files: Files, config: DataConfig) -> type[RLHFDataset]:
    """``data.custom_cls`` where it is set; ``RLHFDataset`` for files with the prompt column; else ``OneRecDataset``.

    Raises ValueError where the custom class cannot be loaded, overrides what is never called, or does not extend
    ``RLHFDataset``, whose arguments and ``set_epoch`` the trainer relies on.
    """
    custom = config.custom_cls
    if custom.path is None:
        return RLHFDataset if config.prompt_key in column_names(expand_data_files(data_files)) else OneRecDataset
    if custom.name is None:
        raise ValueError(f"data.custom_cls.path={custom.path!r} needs data.custom_cls.name, the class in it")
    chosen, place = load_extern_type(custom.path, custom.name), f"data.custom_cls.name={custom.name!r} in {custom.path}"
    if not (isinstance(chosen, type) and issubclass(chosen, RLHFDataset)):
        raise ValueError(f"{place} is not a class that extends verl.utils.dataset.rl_dataset.RLHFDataset")
    if unused := [name for name in NEVER_CALLED if hasattr(chosen, name)]:
        fix = f"override {NEVER_CALLED[unused[0]]} (verl.utils.dataset.rl_dataset)"
        raise ValueError(f"{place} overrides {unused[0]}, which nothing calls here: rows stay on disk; {fix}")
    return chosen


def create_rl_dataset(
    data_files: Files, tokenizer: PreTrainedTokenizerBase, config: DataConfig, **options: Any
) -> RLHFDataset:
    """Build the data set of ``get_dataset_class``; arguments and errors as in ``RLHFDataset``.

    Raises ValueError too where a class of the user's own does not take them.
    """
    chosen = get_dataset_class(data_files, config)
    try:
        inspect.signature(chosen).bind(data_files, tokenizer, config, **options)
    except TypeError as error:
        raise ValueError(
            f"data.custom_cls.name={config.custom_cls.name!r} in {config.custom_cls.path}: {error}; write "
            "def __init__(self, data_files, tokenizer, config, **options), and call super().__init__ with all of them"
        ) from error
    return chosen(data_files, tokenizer, config, **options)


if __name__ == "__main__":
    # By name, for the report imports this module.
    runpy.run_module("verl.utils.dataset.data_report", run_name="__main__")
