"""The ids of a run: which the student knows, which of them extend the teacher's vocabulary, which both models share.

    0 ......................... shared_ids ... extend_start ................ ids ......... rows of the head
    known to both models                       item tokens, the student's    padding, no text

The teacher's distribution runs over the shared ids alone, the student's over all ids that its tokenizer names.
"""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary(NamedTuple):
    """The student's ids, and where they extend the teacher's."""

    ids: int
    """Number of ids in the student's softmax: those that its tokenizer names."""
    extend_start: int | None = None
    """First id that the teacher lacks; None: the vocabularies are the same."""

    def shared_ids(self, teacher_ids: int | None = None) -> int:
        """Number of ids in the softmax of a teacher whose tokenizer names ``teacher_ids``; None: as many as here."""
        known = self.ids if teacher_ids is None else min(teacher_ids, self.ids)
        return known if self.extend_start is None else min(known, self.extend_start)

    def check_head(self, rows: int, model: str = "the model") -> None:
        """Raise ValueError where a head has fewer rows than there are ids: model and tokenizer do not fit each other.

        Args:
            rows: of the lm head.
            model: its name, for the message.
        """
        if not 0 < self.ids <= rows:
            raise ValueError(
                f"the tokenizer has {self.ids} ids, the lm head of {model} only {rows} rows; check tokenizer_path"
            )


def choose_replacement(setting: int | None, tokenizer: "PreTrainedTokenizerBase", shared_ids: int) -> int:
    """Replacement of ids that the teacher lacks in its input: the setting, or else pad or eos, where it knows these.

    Raises:
        ValueError: it does not know that id, or neither of the two.
    """
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    for token in candidates if setting is None else [setting]:
        if token is not None and 0 <= token < shared_ids:
            return token
    raise ValueError(
        f"ref.ref_replace_token_id={setting} (pad, eos: {candidates}) is none of {shared_ids} ids; set one"
    )
