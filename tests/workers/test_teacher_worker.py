"""The teacher worker: its distribution, its input, and its scores of tokens that it lacks."""

import pytest
import torch
from support.exact_cases import MISSING, TEMPERATURE, Models, workers
from support.tiny_workers import (
    draw_rows,
    of_tokens,
    rollouts,
    worker_config,
)
from transformers import AutoTokenizer

from verl.config import ActorRolloutRefConfig
from verl.trainer.ppo.core_algos import compute_on_policy_distill_reverse_kl
from verl.vocabulary import Vocabulary
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.teacher_worker import TeacherWorker, choose_replacement

pytestmark = pytest.mark.usefixtures("one_rank")


def teacher(config: ActorRolloutRefConfig) -> TeacherWorker:
    worker = TeacherWorker(config=config, device="cpu")
    worker.init_model()
    return worker


@pytest.mark.parametrize("packed", [True, False])
def test_scores_by_the_definition(packed: bool, models: Models) -> None:
    """Extended ids replaced by the pad token, softmax over B alone, the stand-in at extended tokens, 0 at padding."""
    e = models.extend_start
    with_extended = [([5, e, 6], [20, e + 3, 21, 22]), ([e + 1], [e + 2, 30, e + 25])]
    batch = rollouts(draw_rows(7, models.ids) + with_extended, e, TEMPERATURE)
    config, plain = models.config(packed=packed, ref={"log_prob_max_token_len_per_gpu": 16}), models.plain()
    result = teacher(config).compute_ref_log_prob(batch)
    assert set(result.batch.keys()) == {"ref_log_prob"}
    assert plain.base.config.vocab_size > e  # rows past B, which collide with the first extended ids
    unknown = batch.tensor("distill_special_token_mask").bool()
    right = of_tokens(models.teacher_log_probs(plain, batch)["base"], batch).masked_fill(unknown, MISSING)
    torch.testing.assert_close(result.tensor("ref_log_prob"), right, rtol=0, atol=1e-5)
    # The same as verl's actor scores it.
    module, vocabulary = teacher(config).model.module, Vocabulary(models.ids, e)
    pad = AutoTokenizer.from_pretrained(models.teacher).pad_token_id
    actor = DataParallelPPOActor(config.ref, module, vocabulary=vocabulary, replace_token_id=pad)
    log_probs, entropy = actor.compute_log_prob(batch, calculate_entropy=True, mask_special_token=True)
    torch.testing.assert_close(log_probs, right, rtol=0, atol=1e-5)
    assert entropy is not None and entropy.shape == right.shape
    with pytest.raises(ValueError, match="needs the actor's replace_token_id"):
        DataParallelPPOActor(config.ref, module, vocabulary=vocabulary).compute_log_prob(batch, mask_special_token=True)
    # Nothing is trained.
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(ValueError, match="frozen"):
        actor.update_policy(batch)


def test_replacement_and_stand_in_are_settings(models: Models) -> None:
    e, scores = models.extend_start, {}
    batch = rollouts([([5, e, 6], [7, e + 1, 8])], e)
    for token in (9, 10):
        worker = teacher(models.config(ref={"ref_replace_token_id": token, "ref_log_prob_replace_val": -7.5}))
        scores[token] = worker.compute_ref_log_prob(batch).tensor("ref_log_prob")
        assert scores[token][0, 1] == -7.5
        spelled_out = rollouts([([5, token, 6], [7, token, 8])], e)
        same = worker.compute_ref_log_prob(spelled_out).tensor("ref_log_prob")
        torch.testing.assert_close(scores[token][0, [0, 2]], same[0, [0, 2]])
    assert not torch.allclose(scores[9], scores[10])


def test_ids_between_tokenizer_and_extension_are_unknown_too(models: Models) -> None:
    """The extension may begin past the teacher's last id; what lies between is in its padded rows, not in B."""
    ids = models.extend_start
    config = worker_config(models.student, models.teacher, extend_start=ids + 4)
    batch = rollouts([([5, 6], [7, ids + 1, ids + 5, 8])], ids + 4)
    scores = teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")[0]
    assert (scores == -100.0).tolist() == [False, True, True, False, False, False, False, False]
    assert scores[4:].tolist() == [0.0] * 4


def test_a_student_that_is_its_teacher_has_no_advantage(models: Models) -> None:
    """Equal weights and no extended ids in sight; at the first extended token it is the clipped one, whatever else."""
    for config, rows in (
        (worker_config(models.student), draw_rows(8, models.extend_start)),
        (models.config(), [([5, 6], [20, 21, models.extend_start + 2, 30])]),
    ):
        batch = rollouts(rows, models.extend_start, temperature=1.1)
        old = workers(config).compute_log_prob(batch).tensor("old_log_probs")
        ref = teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")
        mask, bounds = batch.tensor("response_mask"), {"distill_adv_max_clip": 5.0, "distill_adv_min_clip": -30.0}
        advantages = compute_on_policy_distill_reverse_kl(old, ref, mask, **bounds)[0]
        if len(rows) == 8:
            assert advantages.abs().max() < 1e-5
    assert advantages[0, 2] == -30.0 and (advantages[0, :2].abs() < 30).all() and not advantages[0, 3:].any()


def test_choose_replacement() -> None:
    assert choose_replacement(7, [1, 2], 10) == 7
    assert [choose_replacement(None, [first, 2], 10) for first in (1, None, 12)] == [1, 2, 2]
    for setting, candidates in ((10, [1]), (None, [None, None])):
        with pytest.raises(ValueError, match=rf"ref_replace_token_id={setting} .* is none of 10 ids"):
            choose_replacement(setting, candidates, 10)
