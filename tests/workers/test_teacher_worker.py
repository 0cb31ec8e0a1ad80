"""The teacher worker: its distribution, what it reads, and what it says of tokens it lacks."""

from pathlib import Path

import pytest
import torch
from support.tiny_workers import (
    draw_rows,
    load_plain,
    of_tokens,
    plain_log_probs,
    rollouts,
    worker_config,
    write_model,
)
from transformers import AutoTokenizer

from verl.config import ActorRolloutRefConfig, RefConfig
from verl.protocol import DataProto
from verl.trainer.ppo.core_algos import compute_on_policy_distill_reverse_kl
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.student_worker import StudentWorker
from verl.workers.teacher_worker import TeacherWorker, choose_replacement

pytestmark = pytest.mark.usefixtures("one_rank")


def teacher(config: ActorRolloutRefConfig) -> TeacherWorker:
    worker = TeacherWorker(config=config, device="cpu")
    worker.init_model()
    return worker


@pytest.mark.parametrize("remove_padding", [True, False])
def test_scores_by_the_definition(
    remove_padding: bool, student_model: Path, teacher_model: Path, student_ids: int, extend_start: int
) -> None:
    """Extended ids replaced by the pad token, softmax over B alone, the stand-in at extended tokens, 0 at padding."""
    config = worker_config(
        student_model,
        teacher_model,
        extend_start=extend_start,
        model={"use_remove_padding": remove_padding},
        ref={"log_prob_max_token_len_per_gpu": 16},
    )
    e = extend_start
    with_extended = [([5, e, 6], [20, e + 3, 21, 22]), ([e + 1], [e + 2, 30, e + 25])]
    batch = rollouts(draw_rows(7, student_ids) + with_extended, e, temperature=0.8)
    extended = batch.tensor("input_ids") >= e

    result = teacher(config).compute_ref_log_prob(batch)
    assert set(result.batch.keys()) == {"ref_log_prob"}

    pad = AutoTokenizer.from_pretrained(teacher_model).pad_token_id
    readable = DataProto.from_dict({**batch.batch, "input_ids": batch.tensor("input_ids").masked_fill(extended, pad)})
    plain = load_plain(teacher_model)
    assert plain.config.vocab_size > extend_start  # rows past B, which collide with the first extended ids
    with torch.no_grad():
        right = of_tokens(plain_log_probs(plain, readable, extend_start, temperature=0.8), batch)
    right[batch.tensor("distill_special_token_mask").bool()] = -100.0
    torch.testing.assert_close(result.tensor("ref_log_prob"), right, rtol=0, atol=1e-5)


def test_replacement_and_stand_in_are_settings(
    student_model: Path, teacher_model: Path, student_ids: int, extend_start: int
) -> None:
    e = extend_start
    batch = rollouts([([5, e, 6], [7, e + 1, 8])], e)
    scores = {}
    for token in (9, 10):
        ref = {"ref_replace_token_id": token, "ref_log_prob_replace_val": -7.5}
        config = worker_config(
            student_model, teacher_model, extend_start=e, ref=ref, actor={"ref_log_prob_replace_val": -7.5}
        )
        scores[token] = teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")
        assert scores[token][0, 1] == -7.5
        spelled_out = rollouts([([5, token, 6], [7, token, 8])], e)
        same = teacher(config).compute_ref_log_prob(spelled_out).tensor("ref_log_prob")
        torch.testing.assert_close(scores[token][0, [0, 2]], same[0, [0, 2]])
    assert not torch.allclose(scores[9], scores[10])


def test_ids_between_tokenizer_and_extension_are_unknown_too(student_model: Path, teacher_model: Path) -> None:
    """The extension may begin past the teacher's last id; what lies between is in its padded rows, not in B."""
    ids = len(AutoTokenizer.from_pretrained(teacher_model))
    config = worker_config(student_model, teacher_model, extend_start=ids + 4)
    batch = rollouts([([5, 6], [7, ids + 1, ids + 5, 8])], ids + 4)
    scores = teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")[0]
    assert (scores == -100.0).tolist() == [False, True, True, False, False, False, False, False]
    assert scores[4:].tolist() == [0.0] * 4


def test_a_student_that_is_its_teacher_has_no_advantage(student_model: Path, extend_start: int) -> None:
    """Equal weights and no extended ids in sight: old and reference log-probs agree, so every advantage is 0."""
    config = worker_config(student_model, student_model)
    batch = rollouts(draw_rows(8, extend_start), temperature=1.1)
    student = StudentWorker(config=config, device="cpu")
    student.init_model()
    advantages, _ = compute_on_policy_distill_reverse_kl(
        student.compute_log_prob(batch).tensor("old_log_probs"),
        teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob"),
        batch.tensor("response_mask"),
        distill_adv_max_clip=5.0,
        distill_adv_min_clip=-30.0,
    )
    assert advantages.abs().max() < 1e-5


def test_the_pair_of_a_teacher_and_its_extension_agrees_where_nothing_is_extended(
    tiny_tokenizers: tuple[Path, Path], extend_start: int, student_ids: int, tmp_path: Path
) -> None:
    """A student that is the teacher with extended rows differs from it by exactly its extended mass."""
    student_folder = write_model(tmp_path / "student", tiny_tokenizers[1])
    teacher_folder = write_model(tmp_path / "teacher", tiny_tokenizers[0])
    small, large = load_plain(teacher_folder), load_plain(student_folder)
    weights = large.state_dict()
    rows = small.get_input_embeddings().weight.shape[0]
    weights = {name: value[:rows] if "embed" in name or "lm_head" in name else value for name, value in weights.items()}
    small.load_state_dict(weights)
    small.save_pretrained(teacher_folder)

    config = worker_config(student_folder, teacher_folder, extend_start=extend_start)
    batch = rollouts(draw_rows(8, extend_start), extend_start)
    worker = StudentWorker(config=config, device="cpu")
    worker.init_model()
    scores = worker.compute_log_prob(batch)
    ref = teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")
    log_shared_mass = (1 - scores.tensor("extend_mass")).log()
    assert scores.tensor("extend_mass").max() > 0.01
    torch.testing.assert_close(scores.tensor("old_log_probs"), ref + log_shared_mass, rtol=0, atol=1e-5)


def test_at_the_first_extended_token_the_advantage_is_the_clipped_one(
    student_model: Path, teacher_model: Path, extend_start: int
) -> None:
    """-(old + 100) lies below the bound whatever the student thinks of the token."""
    config = worker_config(student_model, teacher_model, extend_start=extend_start)
    batch = rollouts([([5, 6], [20, 21, extend_start + 2, 30])], extend_start)
    worker = StudentWorker(config=config, device="cpu")
    worker.init_model()
    advantages, _ = compute_on_policy_distill_reverse_kl(
        worker.compute_log_prob(batch).tensor("old_log_probs"),
        teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob"),
        batch.tensor("response_mask"),
        distill_adv_max_clip=5.0,
        distill_adv_min_clip=-30.0,
    )
    assert advantages[0, 2] == -30.0
    assert (advantages[0, :2].abs() < 30).all()
    assert advantages[0, 3:].tolist() == [0.0] * 5


def test_the_teacher_is_frozen_and_needs_no_path(student_model: Path, extend_start: int) -> None:
    worker = teacher(worker_config(student_model, extend_start=extend_start))
    assert not any(parameter.requires_grad for parameter in worker.model.module.parameters())
    with pytest.raises(ValueError, match="frozen"):
        DataParallelPPOActor(RefConfig(), worker.model.module).update_policy(rollouts([([1], [2])]))


def test_choose_replacement() -> None:
    assert choose_replacement(7, [1, 2], 10) == 7
    assert choose_replacement(None, [1, 2], 10) == 1
    assert choose_replacement(None, [None, 2], 10) == 2
    assert choose_replacement(None, [12, 2], 10) == 2
    with pytest.raises(ValueError, match=r"ref_replace_token_id=10 is none of the teacher's 10"):
        choose_replacement(10, [1], 10)
    with pytest.raises(ValueError, match="ref_replace_token_id"):
        choose_replacement(None, [None, None], 10)
