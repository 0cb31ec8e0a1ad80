"""Rows as a teacher reads them that has a view of its own: another prompt, the same response.

In: a batch, the teacher of each row, the chat template of the run. Out: the keys that scoring reads. A prompt is
rendered again, so that it is what the template makes of other messages, token by token.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from jinja2 import TemplateError

from verl.config import PPOConfig, TeacherConfig
from verl.config.ppo import teacher_key
from verl.experimental.agent_loop.base import ChatTemplate, Message
from verl.protocol import DataProto
from verl.utils.dataset.items import WRITTEN_ITEM, read_item_texts
from verl.utils.dataset.parquet_files import column_names
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import local_model_folder, position_limit

SERVED_LENGTH = "engine_kwargs.max_model_len"
KEPT = ("responses", "response_mask")

Chat = Sequence[Message]
EMPTY: Chat = [{"role": "user", "content": ""}]


class TeacherPrompts:
    """The prompts that teachers read, where these are not the student's."""

    def __init__(self, config: PPOConfig, template: ChatTemplate) -> None:
        self._config, self._template = config, template
        self._item_texts = cache(read_item_texts)

    def as_read(self, batch: DataProto, roles: Sequence[str], in_update: bool = False) -> DataProto:
        """The rows with the prompts that their teachers read.

        Args:
            roles: of each row's teacher.
            in_update: whether lengths are held to the limits of the update, and not to those of scoring.

        Raises:
            ValueError: as `with_prompts`, or a row is longer than a micro-batch or a server takes.
        """
        chats = list(batch.array("raw_prompt"))
        for row, teacher in enumerate(self._config.teachers[role] for role in roles):
            text, column = teacher.system_prompt, teacher.system_prompt_column
            if column is not None:
                text = batch.array("hints")[row][column] or None
            chats[row] = with_system_prompt(chats[row], text)
            if teacher.item_text is not None:
                chats[row] = with_texts(chats[row], self._item_texts(teacher.item_text))
        read = with_prompts(batch, chats, self._template)
        lengths = read.tensor("attention_mask").sum(dim=1).tolist()
        # Sorted, each teacher's last row is its longest.
        for role, longest in dict(sorted(zip(roles, lengths, strict=True))).items():
            if own := self._config.teachers[role].own_prompt:
                key = f"{teacher_key(role)}.{' and '.join(own)}"
                self._check_length(role, key, longest, in_scoring=not in_update, in_update=in_update)
        return read

    def _check_length(self, role: str, key: str, longest: int, in_scoring: bool, in_update: bool) -> None:
        """Raise ``ValueError`` where ``key`` makes rows longer than micro-batches or the run's own servers take."""
        teacher, models, limits = self._config.teachers[role], self._config.actor_rollout_ref, dict[str, Any]()
        ref, actor, needed = models.ref, models.actor, -(-longest // models.ref.ulysses_sequence_parallel_size)
        if role in self._config.served_roles:
            limits[f"{teacher_key(role)}.{SERVED_LENGTH}"] = teacher.engine_kwargs.get("max_model_len")
            needed = longest + 1  # one is written
        else:
            if in_scoring and (not ref.log_prob_micro_batch_size_per_gpu or ref.log_prob_use_dynamic_bsz):
                limits["actor_rollout_ref.ref.log_prob_max_token_len_per_gpu"] = ref.log_prob_max_token_len_per_gpu
            if in_update and (not actor.ppo_micro_batch_size_per_gpu or actor.use_dynamic_bsz):
                limits["actor_rollout_ref.actor.ppo_max_token_len_per_gpu"] = actor.ppo_max_token_len_per_gpu
            own = teacher.path if isinstance(teacher, TeacherConfig) else ref.model.path
            folder = local_model_folder(own or models.model.path)
            described = json.loads((folder / "config.json").read_text("utf-8")) if folder else {}
            if (positions := position_limit(described | models.model.override_config) or longest) < longest:
                raise ValueError(f"{key} makes rows of up to {longest} tokens; shorten it, {folder} takes {positions}")
        for name, most in limits.items():
            if isinstance(most, int) and 0 <= most < needed:
                raise ValueError(f"{key} makes rows of up to {longest} tokens; raise {name}={most} to {needed}")

    def check(self, data: RLHFDataset, held_out: RLHFDataset | None, runs_in_update: bool) -> None:
        """Check that the chat template, the data and the limits of micro-batches and servers fit the settings.

        Args:
            data: to train on.
            held_out: to validate on.
            runs_in_update: whether teachers read rows in the micro-batches of the update.

        Raises:
            ValueError: they do not.
        """
        rollout = self._config.actor_rollout_ref.rollout
        for role, teacher in self._config.teachers.items():
            if teacher.item_text is not None:
                known, texts = self._template.tokenizer.get_vocab().keys(), self._item_texts(teacher.item_text)
                if not any(known >= {*re.findall(r"<[^>]+>", item)} for item in texts):
                    what = "the student's tokenizer has not all tokens of any item; give the catalogue of its items"
                    raise ValueError(f"{teacher_key(role)}.item_text={teacher.item_text}: {what}")
            if teacher.engine and "max_model_len" not in teacher.engine_kwargs:
                for name in teacher.own_prompt:
                    if name != "system_prompt":  # of which the length is known
                        what, limit = f"{teacher_key(role)}.{name}", f"{teacher_key(role)}.{SERVED_LENGTH}"
                        why = f"{what}={getattr(teacher, name)} makes rows longer than the run's own servers take"
                        raise ValueError(f"{why}; set {limit} above the longest row's tokens")
            key, text = self._longest_system_prompt(role, data, held_out)
            if text is None:
                continue
            chats = (with_system_prompt(EMPTY, told) for told in (text, f"{text} 1"))
            try:
                shown, other = (self._template.encode_prompt(chat, False) for chat in chats)
            except (TemplateError, TypeError, ValueError) as error:
                raise ValueError(f"{key}: the chat template takes no system message ({error}); leave it out") from error
            if shown == other:
                raise ValueError(f"{key}: the chat template shows no system message; leave it out")
            longest = rollout.prompt_length + rollout.response_length + len(shown)
            self._check_length(role, key, longest, in_scoring=True, in_update=runs_in_update)

    def _longest_system_prompt(
        self, role: str, data: RLHFDataset, held_out: RLHFDataset | None
    ) -> tuple[str, str | None]:
        """The setting of what a teacher is told, and the longest such text; None: it is told nothing."""
        teacher, key = self._config.teachers[role], f"{teacher_key(role)}.system_prompt"
        if (column := teacher.system_prompt_column) is None:
            return key, teacher.system_prompt
        distill = self._config.algorithm.distill
        own = cache(lambda *kind: distill.roles[distill.teacher_of(*kind)] == role)
        most, longest, key = 0, "", f"{key}_column={column}"
        texts = data.texts_of(column, map(own, data.sources, data.has_extended))
        if not any(texts):
            files, there = self._config.data.train_files, ", ".join(sorted(column_names(data.files)))
            raise ValueError(f"{key} names no column with a text in data.train_files={files}; choose from {there}")
        if held_out is not None:
            texts |= held_out.texts_of(column, map(own, held_out.sources, held_out.has_extended))
        # A token has a byte at least, so most texts are too short to be the one of the most tokens.
        for size, text in sorted(((len(text.encode()), text) for text in texts), reverse=True):
            if size <= most:
                break
            if (tokens := len(self._template.tokenizer.encode(text, add_special_tokens=False))) > most:
                most, longest = tokens, text
        return key, longest


def with_system_prompt(messages: Chat, system_prompt: str | None) -> Chat:
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
        wanted = (flag for flag in (True, False) if template.encode_prompt(messages, flag) == prompts[row])
        if (lists_tools := next(wanted, None)) is None:
            raise ValueError(
                f"row {row}: its agent loop made another prompt than the chat template makes of its messages, so that "
                "its teacher cannot read another; leave system_prompt and the like out"
            )
        prompts[row] = template.encode_prompt(chat, lists_tools)
    left, real = torch.zeros(2, len(prompts), max(map(len, prompts)), dtype=input_ids.dtype)
    for row, ids in enumerate(prompts):
        left[row, left.shape[1] - len(ids) :], real[row, left.shape[1] - len(ids) :] = torch.tensor(ids), 1
    tensors = {key: batch.tensor(key) for key in KEPT if key in batch.batch}
    tensors["input_ids"] = torch.cat([left, input_ids[:, -width:]], dim=1)
    tensors["attention_mask"] = torch.cat([real.to(mask.dtype), mask[:, -width:]], dim=1)
    return DataProto.from_dict(tensors, meta_info=batch.meta_info)
