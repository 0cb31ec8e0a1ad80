"""Rows as a teacher reads them that has a view of its own: another prompt, the same response.

In: a batch, the teacher of each row, the chat template of the run. Out: the keys that scoring reads. A prompt is
rendered again, so that it is what the template makes of other messages, token by token.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from jinja2 import TemplateError

from verl.config import PPOConfig
from verl.config.ppo import teacher_key
from verl.experimental.agent_loop.base import ChatTemplate, Message
from verl.protocol import DataProto
from verl.utils.dataset.items import WRITTEN_ITEM, read_item_texts
from verl.utils.dataset.parquet_files import column_names
from verl.utils.dataset.rl_dataset import RLHFDataset

KEPT = ("responses", "response_mask")

Chat = Sequence[Message]


class TeacherPrompts:
    """The prompts that teachers read, where these are not the student's."""

    def __init__(self, config: PPOConfig, template: ChatTemplate) -> None:
        self._config, self._template = config, template
        self._texts: dict[str, dict[str, str]] = {}
        """Of items, by catalogue."""

    def as_read(self, batch: DataProto, roles: Sequence[str]) -> DataProto:
        """The rows as their teachers read them, by the role of each row's.

        Raises:
            ValueError: as `with_prompts`.
        """
        chats = list(batch.array("raw_prompt"))
        for row, teacher in enumerate(self._config.teachers[role] for role in roles):
            text, column = teacher.system_prompt, teacher.system_prompt_column
            chats[row] = told(chats[row], text if column is None else batch.array("hints")[row][column] or None)
            if teacher.item_text is not None:
                chats[row] = with_texts(chats[row], self._item_texts(teacher.item_text))
        return with_prompts(batch, chats, self._template)

    def _item_texts(self, path: str) -> dict[str, str]:
        return self._texts.get(path) or self._texts.setdefault(path, read_item_texts(path))

    def check(self, data: RLHFDataset, runs_in_update: bool) -> None:
        """Check that the chat template, the training data and the limits of micro-batches fit the settings.

        Args:
            runs_in_update: whether teachers read rows in the micro-batches of the update.

        Raises:
            ValueError: they do not.
        """
        models = self._config.actor_rollout_ref
        rollout, split = models.rollout, models.ref.ulysses_sequence_parallel_size
        limits = {}
        if not models.ref.log_prob_micro_batch_size_per_gpu or models.ref.log_prob_use_dynamic_bsz:
            limits["ref.log_prob_max_token_len_per_gpu"] = models.ref.log_prob_max_token_len_per_gpu
        if runs_in_update and models.actor.use_dynamic_bsz is not False:
            limits["actor.ppo_max_token_len_per_gpu"] = models.actor.ppo_max_token_len_per_gpu
        for role, teacher in self._config.teachers.items():
            if teacher.item_text is not None:
                self._item_texts(teacher.item_text)
            key, text = self._told_most(role, data)
            if text is None:
                continue
            try:
                added = len(self._template.encode_prompt(told([{"role": "user", "content": ""}], text), False))
            except (TemplateError, TypeError, ValueError) as error:
                raise ValueError(f"{key}: the chat template takes no system message ({error}); leave it out") from error
            longest = rollout.prompt_length + rollout.response_length + added
            if role in self._config.served_roles:  # servers have limits of their own
                continue
            for name, most in limits.items():
                if longest > most * split:
                    fix = f"raise actor_rollout_ref.{name}={most} to {-(-longest // split)}"
                    raise ValueError(f"{key} makes rows of up to {longest} tokens; {fix}")

    def _told_most(self, role: str, data: RLHFDataset) -> tuple[str, str | None]:
        """The setting of what a teacher is told, and the longest such text; None: it is told nothing."""
        teacher, key = self._config.teachers[role], f"{teacher_key(role)}.system_prompt"
        if (column := teacher.system_prompt_column) is None:
            return key, teacher.system_prompt
        most, longest, key = 0, None, f"{key}_column={column}"
        # A token has a byte at least, so most texts are too short to be the one of the most tokens.
        for size, text in sorted(((len(text.encode()), text) for text in data.texts_of(column)), reverse=True):
            if size <= most:
                break
            if (tokens := len(self._template.tokenizer.encode(text, add_special_tokens=False))) > most:
                most, longest = tokens, text
        if longest is None:
            files, there = self._config.data.train_files, ", ".join(sorted(column_names(data.files)))
            raise ValueError(f"{key} names no column with a text in data.train_files={files}; choose from {there}")
        return key, longest


def told(messages: Chat, system_prompt: str | None) -> Chat:
    """The messages with ``system_prompt`` in place of their own system message, or before the first; None: as it is."""
    if system_prompt is None:
        return messages
    return [{"role": "system", "content": system_prompt}, *messages[messages[0]["role"] == "system" :]]


def with_texts(messages: Chat, texts: Mapping[str, str]) -> Chat:
    """The messages with the texts of items in place of these; an item without a text stays."""

    def text_of(item: re.Match[str]) -> str:
        return texts.get(item[0], item[0])

    return [{**message, "content": WRITTEN_ITEM.sub(text_of, message["content"])} for message in messages]


def with_prompts(batch: DataProto, chats: Sequence[Chat], template: ChatTemplate) -> DataProto:
    """The rows with the prompts of ``chats``; one whose messages are its own keeps its tokens.

    Raises:
        ValueError: a prompt that is to change is not what the template makes of its messages.
    """
    width, prompts = batch.tensor("responses").shape[1], []
    input_ids, mask = batch.tensor("input_ids"), batch.tensor("attention_mask")
    for row, (messages, chat) in enumerate(zip(batch.array("raw_prompt"), chats, strict=True)):
        prompts.append(input_ids[row, :-width][mask[row, :-width].bool()].tolist())
        if chat == messages:
            continue
        # Loops without tools list none in their prompts.
        listed = [flag for flag in (True, False) if template.encode_prompt(messages, flag) == prompts[row]]
        if not listed:
            raise ValueError(
                f"row {row}: its agent loop made another prompt than the chat template makes of its messages, so that "
                "its teacher cannot read another; leave system_prompt and the like out"
            )
        prompts[row] = template.encode_prompt(chat, listed[0])
    left, real = torch.zeros(2, len(prompts), max(map(len, prompts)), dtype=input_ids.dtype)
    for row, ids in enumerate(prompts):
        left[row, left.shape[1] - len(ids) :], real[row, left.shape[1] - len(ids) :] = torch.tensor(ids), 1
    tensors = {key: batch.tensor(key) for key in KEPT if key in batch.batch}
    tensors["input_ids"] = torch.cat([left, input_ids[:, -width:]], dim=1)
    tensors["attention_mask"] = torch.cat([real.to(mask.dtype), mask[:, -width:]], dim=1)
    return DataProto.from_dict(tensors, meta_info=batch.meta_info)
