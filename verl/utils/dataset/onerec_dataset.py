"""Prompts from OneRec's parquet files, and the choice between this layout, verl's and a user's own class.

In: rows with ``messages`` (a whole chat, the reference answer last), ``source``, ``uuid`` and ``metadata``. Out: the
items of ``RLHFDataset``: the prompt is everything before the last assistant message, that message's content is the
ground truth, and ``extra_info`` is the row's metadata. Rows of plain text (``segments``) are
dropped.

As a command it prints what the data holds and which rows a run would drop::

    python -m verl.utils.dataset.onerec_dataset --files F... --tokenizer T [--extend-vocab-start-token N]
        [--max-prompt-length N] [--json]
"""

import argparse
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.config import DataConfig
from verl.utils.dataset.data_report import describe, render
from verl.utils.dataset.parquet_files import Row, column_names, expand_data_files
from verl.utils.dataset.prompt_rows import BadRowError, PromptRow, parse_messages, split_answer, text_of
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.import_utils import load_extern_type
from verl.utils.tokenizer import hf_tokenizer


class OneRecDataset(RLHFDataset):
    """Prompts from chats in OneRec's layout; arguments and errors as in ``RLHFDataset``."""

    caches_checks = True

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
    """The row's metadata; anything but a JSON object is kept as it is, since a chat is usable without it."""
    known = value
    if isinstance(value, str | bytes):
        try:
            known = json.loads(value)
        except (ValueError, RecursionError):
            known = text_of(value)
    if isinstance(known, dict):
        return known
    return {} if value is None else {"metadata": known}


def get_dataset_class(data_files: str | Path | Sequence[str | Path], config: DataConfig) -> type[RLHFDataset]:
    """``data.custom_cls`` where it is set; ``RLHFDataset`` for files with the prompt column; else ``OneRecDataset``.

    Raises ValueError where the custom class cannot be loaded or does not extend ``RLHFDataset``, whose arguments and
    ``set_epoch`` the trainer relies on.
    """
    custom = config.custom_cls
    if custom.path is None:
        return RLHFDataset if config.prompt_key in column_names(expand_data_files(data_files)) else OneRecDataset
    if custom.name is None:
        raise ValueError(f"data.custom_cls.path={custom.path!r} needs data.custom_cls.name, the class in it")
    chosen = load_extern_type(custom.path, custom.name)
    if not (isinstance(chosen, type) and issubclass(chosen, RLHFDataset)):
        raise ValueError(
            f"data.custom_cls.name={custom.name!r} in {custom.path} is not a class that extends "
            "verl.utils.dataset.rl_dataset.RLHFDataset"
        )
    return chosen


def create_rl_dataset(
    data_files: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    extended_sources: Sequence[str] = (),
    **options: Any,
) -> RLHFDataset:
    """Build the data set of ``get_dataset_class``; arguments and errors as in ``RLHFDataset``."""
    dataset_class = get_dataset_class(data_files, config)
    if extended_sources:
        # Classes of users' own that were written before there was this argument are refused only where it matters.
        options["extended_sources"] = extended_sources
        try:
            inspect.signature(dataset_class).bind(data_files, tokenizer, config, **options)
        except TypeError as error:
            raise ValueError(
                f"data.custom_cls.name={dataset_class.__name__!r} takes no argument 'extended_sources', through which "
                "it would learn which prompts algorithm.distill.teachers can read; let its __init__ take **kwargs and "
                "hand them on"
            ) from error
    return dataset_class(data_files, tokenizer, config, **options)


def main(argv: Sequence[str] | None = None) -> None:
    """The command; a mistake goes to stderr as one line."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.dataset.onerec_dataset",
        description="What a data set holds and which of its rows a run would drop.",
    )
    parser.add_argument("--files", nargs="+", required=True, help="parquet files, folders or globs")
    parser.add_argument("--tokenizer", required=True, help="the student's tokenizer: folder or hub name")
    parser.add_argument("--extend-vocab-start-token", type=int, help="first extended id; prompts with any are dropped")
    parser.add_argument("--max-prompt-length", type=int, default=2**31 - 1, help="longer are dropped; default: none")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    args = parser.parse_args(argv)
    try:
        tokenizer = hf_tokenizer(args.tokenizer)
        limits = {"max_prompt_length": args.max_prompt_length, "filter_overlong_prompts": True}
        dataset = create_rl_dataset(
            args.files,
            tokenizer,
            DataConfig(**limits, max_dropped_fraction=1.0),
            extend_vocab_start_token=args.extend_vocab_start_token,
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    report = describe(dataset, tokenizer)
    print(json.dumps(report, ensure_ascii=False, default=str) if args.json else render(dataset, report))


if __name__ == "__main__":
    main()
