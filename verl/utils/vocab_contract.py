"""What student and teacher share: the ids below ``extend_vocab_start_token``.

In: the sizes of both tokenizers and the threshold. Out: nothing, or an error before anything starts. Contents of the
tokenizers are not compared here.
"""


def check_extension(student_ids: int, teacher_ids: int, extend_vocab_start_token: int | None) -> None:
    """Every id that the student may write is either known to the teacher or extended.

    An id between the two would be read by the teacher as padding and scored with a stand-in, while the masks take it
    for a shared token.

    Args:
        student_ids: ids that the student's tokenizer names.
        teacher_ids: ids that the teacher's tokenizer names.
        extend_vocab_start_token: first extended id; None: no extension.

    Raises:
        ValueError: there are such ids.
    """
    key = "actor_rollout_ref.rollout.extend_vocab_start_token"
    first_extended = student_ids if extend_vocab_start_token is None else extend_vocab_start_token
    if min(first_extended, student_ids) > teacher_ids:
        raise ValueError(
            f"{key}={extend_vocab_start_token}: the student's tokenizer names {student_ids} ids and the teacher's "
            f"{teacher_ids}, so ids {teacher_ids} to {min(first_extended, student_ids) - 1} are neither shared nor "
            f"extended; set {key}={teacher_ids}"
        )
