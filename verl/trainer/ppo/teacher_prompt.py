"""Rows as a teacher reads them that has a system prompt of its own: another prompt, the same response.

In: a batch and the chat template of the run. Out: the keys that scoring reads. A prompt is rendered again, so that it
is what the template makes of its messages with another system message, token by token.
"""

import torch

from verl.experimental.agent_loop.base import ChatTemplate
from verl.protocol import DataProto

KEPT = ("responses", "response_mask")


def with_system_prompt(batch: DataProto, system_prompt: str, template: ChatTemplate) -> DataProto:
    """The rows with ``system_prompt`` in place of the prompt's own system message, or before the first.

    Raises:
        ValueError: a prompt is not what the template makes of its messages.
    """
    width, prompts = batch.tensor("responses").shape[1], []
    input_ids, mask = batch.tensor("input_ids"), batch.tensor("attention_mask")
    for row, messages in enumerate(batch.array("raw_prompt")):
        own = input_ids[row, :-width][mask[row, :-width].bool()].tolist()
        # Loops without tools list none in their prompts.
        listed = [flag for flag in (True, False) if template.encode_prompt(messages, flag) == own]
        if not listed:
            raise ValueError(
                f"row {row}: its agent loop made another prompt than the chat template makes of its messages, so that "
                "a system_prompt cannot be put before it; leave system_prompt out"
            )
        rest = messages[messages[0]["role"] == "system" :]
        prompts.append(template.encode_prompt([{"role": "system", "content": system_prompt}, *rest], listed[0]))
    left, real = torch.zeros(2, len(prompts), max(map(len, prompts)), dtype=input_ids.dtype)
    for row, ids in enumerate(prompts):
        left[row, left.shape[1] - len(ids) :], real[row, left.shape[1] - len(ids) :] = torch.tensor(ids), 1
    tensors = {key: batch.tensor(key) for key in KEPT if key in batch.batch}
    tensors["input_ids"] = torch.cat([left, input_ids[:, -width:]], dim=1)
    tensors["attention_mask"] = torch.cat([real.to(mask.dtype), mask[:, -width:]], dim=1)
    return DataProto.from_dict(tensors, meta_info=batch.meta_info)
