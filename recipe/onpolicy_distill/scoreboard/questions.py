"""Held-out rows, ready to be asked.

In:  parquet files in OneRec's layout, the answer as the assistant message at the end or, in the benchmarks' layout, as
``metadata.answer``. Out: prompt tokens beside the wanted answer, which may be unknown. Rows that cannot be used, and
prompts that are too long or (where these are to be left out) hold extended tokens, are dropped and counted by the data
set.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipe.onpolicy_distill.scoreboard.items import listed_items
from recipe.onpolicy_distill.scoreboard.measures import final_answer
from verl.config import DataConfig
from verl.utils.dataset.items import Item
from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.dataset.parquet_files import Row
from verl.utils.dataset.prompt_rows import PromptRow
from verl.utils.dataset.prompt_tokens import PromptEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """One prompt and what should follow it."""

    uuid: str
    source: str
    prompt: str
    """The last message of the prompt, for people to read."""
    prompt_ids: list[int]
    """The whole prompt under the model's chat template, the opening of the answer included."""
    wanted: str
    """Empty: unknown."""

    @property
    def targets(self) -> frozenset[Item]:
        """The items wanted, where the answer is items and nothing else."""
        return frozenset(listed_items(final_answer(self.wanted)))


class HeldOutDataset(OneRecDataset):
    """OneRec's chats, those of its benchmarks included."""

    def read_prompt(self, row: Row) -> PromptRow:
        """Split a chat at its last answer, or take the answer from the metadata; empty: neither has one."""
        prompt = super().read_prompt(row)
        if prompt.ground_truth is None:
            answer = prompt.extra_info.get("answer")
            prompt.ground_truth = answer if isinstance(answer, str) else ""
        return prompt


def read_questions(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_prompt_length: int,
    extend_vocab_start_token: int | None,
    max_rows: int = -1,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[Question]:
    """Read the rows of a file, folder or glob.

    Args:
        tokenizer: the model's.
        max_prompt_length: longer prompts are left out.
        extend_vocab_start_token: prompts with ids from here on are left out; None: they stay.
        max_rows: read only the first rows; -1: all.
        chat_template_kwargs: passed to the chat template.

    Raises:
        ValueError: the file is missing or holds no usable row.
    """
    config = DataConfig(
        max_prompt_length=max_prompt_length,
        filter_overlong_prompts=True,
        max_dropped_fraction=1.0,
        apply_chat_template_kwargs=dict(chat_template_kwargs or {}),
    )
    dataset = HeldOutDataset(
        path, tokenizer, config, extend_vocab_start_token=extend_vocab_start_token, max_samples=max_rows
    )
    rows = [dataset[number] for number in range(len(dataset))]
    if dataset.drop_report.dropped:
        logger.warning("%s: %s", path, dataset.drop_report.summary())
    encoded = PromptEncoder(tokenizer, config).encode([row["raw_prompt"] for row in rows])
    return [
        Question(
            uuid=row["uuid"],
            source=row["source"],
            prompt=row["raw_prompt"][-1]["content"],
            prompt_ids=ids,
            wanted=row["reward_model"]["ground_truth"],
        )
        for row, ids in zip(rows, encoded, strict=True)
    ]
