"""The teacher worker: its distribution, its input, and its scores of tokens that it lacks."""

from pathlib import Path

import pytest
import torch
from support.exact_cases import MISSING, TEMPERATURE, Models, workers
from support.tiny_workers import (
    draw_rows,
    load_plain,
    of_tokens,
    rollouts,
    worker_config,
    write_model,
)
from transformers import AutoTokenizer

from verl.config import ActorRolloutRefConfig, RefConfig
from verl.protocol import DataProto
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
        DataParallelPPOActor(config.ref, module).compute_log_prob(batch, mask_special_token=True)


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


def advantages_of(config: ActorRolloutRefConfig, batch: DataProto) -> torch.Tensor:
    return compute_on_policy_distill_reverse_kl(
        workers(config).compute_log_prob(batch).tensor("old_log_probs"),
        teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob"),
        batch.tensor("response_mask"),
        distill_adv_max_clip=5.0,
        distill_adv_min_clip=-30.0,
    )[0]


def test_a_student_that_is_its_teacher_has_no_advantage(models: Models) -> None:
    """Equal weights and no extended ids in sight: old and reference log-probs agree, so every advantage is 0."""
    batch = rollouts(draw_rows(8, models.extend_start), temperature=1.1)
    assert advantages_of(worker_config(models.student, models.student), batch).abs().max() < 1e-5


def test_at_the_first_extended_token_the_advantage_is_the_clipped_one(models: Models) -> None:
    """-(old - stand-in) lies below the bound whatever the student's log-prob of the token."""
    batch = rollouts([([5, 6], [20, 21, models.extend_start + 2, 30])], models.extend_start)
    advantages = advantages_of(models.config(), batch)
    assert advantages[0, 2] == -30.0
    assert (advantages[0, :2].abs() < 30).all()
    assert advantages[0, 3:].tolist() == [0.0] * 5


def test_a_teacher_and_its_extension_agree_where_nothing_is_extended(
    tiny_tokenizers: tuple[Path, Path], models: Models, tmp_path: Path
) -> None:
    """A student that is the teacher with extended rows differs from it by exactly its extended mass."""
    small, large = load_plain(write_model(tmp_path, tiny_tokenizers[0])), load_plain(models.student)
    rows = small.get_input_embeddings().weight.shape[0]
    weights = {
        name: value[:rows] if "embed" in name or "lm_head" in name else value
        for name, value in large.state_dict().items()
    }
    small.load_state_dict(weights)
    small.save_pretrained(tmp_path)
    config = worker_config(models.student, tmp_path, extend_start=models.extend_start)
    batch = rollouts(draw_rows(8, models.extend_start), models.extend_start)
    scores = workers(config).compute_log_prob(batch)
    ref = teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")
    assert scores.tensor("extend_mass").max() > 0.01
    log_shared_mass = (1 - scores.tensor("extend_mass")).log()
    torch.testing.assert_close(scores.tensor("old_log_probs"), ref + log_shared_mass, rtol=0, atol=1e-5)


def test_the_teacher_is_frozen_and_needs_no_path(models: Models) -> None:
    module = teacher(worker_config(models.student, extend_start=models.extend_start)).model.module
    assert not any(parameter.requires_grad for parameter in module.parameters())
    with pytest.raises(ValueError, match="frozen"):
        DataParallelPPOActor(RefConfig(), module).update_policy(rollouts([([1], [2])]))


def test_choose_replacement() -> None:
    assert choose_replacement(7, [1, 2], 10) == 7
    assert choose_replacement(None, [1, 2], 10) == 1
    assert choose_replacement(None, [None, 2], 10) == 2
    assert choose_replacement(None, [12, 2], 10) == 2
    with pytest.raises(ValueError, match=r"ref_replace_token_id=10 is none of the teacher's 10"):
        choose_replacement(10, [1], 10)
    with pytest.raises(ValueError, match="ref_replace_token_id"):
        choose_replacement(None, [None, None], 10)
