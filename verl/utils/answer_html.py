"""Shows answers as HTML, each token on the colour of what student and teacher think of it.

In:  a batch after generation, of a validation for example. Out: one text an answer, for a table of Weights & Biases.
The viewer of whole runs is ``verl.viewer``; both read the record of ``token_record``.
"""

import html
import math

from transformers import PreTrainedTokenizerBase

from verl.protocol import DataProto
from verl.utils.token_record import token_record

ABOVE, BELOW = "217, 72, 15", "47, 125, 225"
"""Orange where the student gives a token more than the teacher does, blue where it gives less."""
FULL_COLOUR_NATS = 4.0


def answers_as_html(batch: DataProto, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One text an answer; tokens are coloured where the batch has ``old_log_probs`` and ``ref_log_prob`` of them."""
    record = token_record(batch, 0, tokenizer, []).select(["text", "student_log_prob", "teacher_log_prob"])
    answers = ["".join(map(_token, *row.values())) for row in record.to_pylist()]
    style = '<meta charset="utf-8"><div style="white-space: pre-wrap; font: 13px sans-serif">'
    return [f"{style}{answer}</div>" for answer in answers]


def _token(text: str, student: float | None, teacher: float | None) -> str:
    shown = html.escape(text)
    if student is None or teacher is None or not math.isfinite(gap := student - teacher):
        return shown
    share = 0.65 * min(1.0, abs(gap) / FULL_COLOUR_NATS)
    colour = f"rgba({ABOVE if gap > 0 else BELOW}, {share:.2f})"
    return f'<span style="background: {colour}" title="student {student:.3f}, teacher {teacher:.3f}">{shown}</span>'
