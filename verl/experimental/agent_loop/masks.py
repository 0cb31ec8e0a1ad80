"""Which response tokens are trained on, and which the teacher does not know.

Token ids and 0/1 lists in, 0/1 lists of the same length out, an empty response included. Nothing else computes these
masks: the trainer takes them as they are.

`trainable_mask` is the batch's ``response_mask``, `extended_token_mask` its ``distill_special_token_mask``. With M for
a token that the model wrote and U for one of a tool or user::

    written by                   M  M  U  U  M  M  M  U  M
    extended                     0  0  0  0  0  1  0  0  0
    trainable                    1  1  0  0  1  1  0  0  0     after an item the teacher would read replaced tokens
    trainable with drop_whole    0  0  0  0  0  0  0  0  0
    trainable with keep_rest     1  1  0  0  1  1  1  0  1
"""

from collections.abc import Sequence


def extended_token_mask(token_ids: Sequence[int], extend_start: int | None) -> list[int]:
    """1 where a token's id is at or above ``extend_start``, whoever wrote it; all 0 where that is None."""
    if extend_start is None:
        return [0] * len(token_ids)
    return [int(token_id >= extend_start) for token_id in token_ids]


def trainable_mask(
    model_mask: Sequence[int], extended_mask: Sequence[int], *, drop_whole: bool = False, keep_rest: bool = False
) -> list[int]:
    """1 for the model's own tokens up to and including the first extended token, 0 after it.

    Args:
        model_mask: 1 for tokens the model wrote, 0 for tokens of tools and users.
        extended_mask: as ``extended_token_mask`` gives it, of the same length.
        drop_whole: train on nothing of a response that holds an extended token.
        keep_rest: train on what follows the first extended token too: of rows whose teacher knows these tokens, and
            without ``mask_after_extend_token``, where the teacher reads replaced tokens there.
    """
    if 1 not in extended_mask or (keep_rest and not drop_whole):
        return list(model_mask)
    kept = 0 if drop_whole else list(extended_mask).index(1) + 1
    return [*model_mask[:kept], *[0] * (len(model_mask) - kept)]
