"""Log-probs of student and teacher workers, entropy and extended mass, against whole logits of transformers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import MISSING, TEMPERATURE, Models, lone_teacher, workers
from transformers import AutoTokenizer

from verl.trainer.ppo.core_algos import compute_on_policy_distill_reverse_kl
from verl.vocabulary import Vocabulary, choose_replacement
from verl.workers.actor.dp_actor import DataParallelPPOActor

pytestmark = pytest.mark.usefixtures("one_rank")

MODES = {
    "packed": {"use_remove_padding": True},
    "padded": {"use_remove_padding": False},
    "eager": {"override_config": {"attn_implementation": "eager"}},
}


@pytest.mark.parametrize(
    ("family", "tied", "mode"),
    [
        ("qwen2", True, "packed"),
        ("qwen3", False, "packed"),
        ("llama", True, "packed"),
        ("qwen3", True, "padded"),
        ("qwen2", False, "eager"),
    ],
)
def test_scores_are_those_of_whole_logits(
    family: str, tied: bool, mode: str, tiny_tokenizers: tuple[Path, Path], models: Models, tmp_path: Path
) -> None:
    folder = tiny.write_model(tmp_path, tiny_tokenizers[1], family=family, tied=tied)
    config = models.config(folder, model=MODES[mode], rollout={"log_prob_max_token_len_per_gpu": 16})
    batch = tiny.rollouts(tiny.draw_rows(7, models.ids), models.extend_start, temperature=1.3)
    keys, meta = set(batch.batch.keys()), dict(batch.meta_info)
    scores = workers(config).compute_log_prob(batch)
    with torch.no_grad():
        log_probs = tiny.plain_log_probs(tiny.load_plain(folder), batch, models.ids, temperature=1.3)
    real = batch.tensor("attention_mask")[:, tiny.PROMPT :]
    right = {
        "old_log_probs": tiny.of_tokens(log_probs, batch),
        "entropys": -(log_probs.exp() * log_probs).sum(-1) * real,
        "extend_mass": log_probs.exp()[..., models.extend_start :].sum(-1) * real,
    }
    assert set(scores.batch.keys()) == set(right)
    for key, value in right.items():
        assert scores.tensor(key).dtype == torch.float32
        torch.testing.assert_close(scores.tensor(key), value, rtol=0, atol=1e-5)
    assert (set(batch.batch.keys()), batch.meta_info) == (keys, meta), "the batch is as it was"


def test_a_teacher_without_an_extension_scores_the_ids_that_the_student_has_too(models: Models) -> None:
    worker = lone_teacher(tiny.worker_config(models.teacher, models.student))
    assert worker.model.ids == models.extend_start < models.ids


def test_models_that_cannot_be_scored(tiny_tokenizers: tuple[Path, Path], models: Models, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path, tiny_tokenizers[1], rows=models.ids - 1)
    with pytest.raises(ValueError, match=f"has {models.ids} ids, .* only {models.ids - 1} rows"):
        workers(models.config(folder))


@pytest.mark.parametrize("packed", [True, False])
def test_scores_by_the_definition(packed: bool, models: Models) -> None:
    """Extended ids replaced by the pad token, softmax over B alone, the stand-in at extended tokens, 0 at padding."""
    e = models.extend_start
    with_extended = [([5, e, 6], [20, e + 3, 21, 22]), ([e + 1], [e + 2, 30, e + 25])]
    batch = tiny.rollouts(tiny.draw_rows(7, models.ids) + with_extended, e, TEMPERATURE)
    config, plain = models.config(packed=packed, ref={"log_prob_max_token_len_per_gpu": 16}), models.plain()
    result = lone_teacher(config).compute_ref_log_prob(batch)
    assert set(result.batch.keys()) == {"ref_log_prob"}
    assert plain.base.config.vocab_size > e  # rows past B, which collide with the first extended ids
    unknown = batch.tensor("distill_special_token_mask").bool()
    right = tiny.of_tokens(models.teacher_log_probs(plain, batch)["base"], batch).masked_fill(unknown, MISSING)
    torch.testing.assert_close(result.tensor("ref_log_prob"), right, rtol=0, atol=1e-5)
    # The same as verl's actor scores it.
    module, vocabulary = lone_teacher(config).model.module, Vocabulary(models.ids, e)
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


def test_ids_between_the_teachers_tokenizer_and_the_extension_are_unknown_too(models: Models) -> None:
    ids = len(AutoTokenizer.from_pretrained(models.teacher))
    batch = tiny.rollouts([([5, 6], [7, ids + 1, ids + 5, 8])], ids + 4)
    config = tiny.worker_config(models.student, models.teacher, extend_start=ids + 4)
    scores = lone_teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")[0]
    assert (scores == -100.0).tolist() == [False, True, True, False, *[False] * 4]
    assert scores[3] < 0 and not scores[4:].any()


def test_replacement_and_stand_in_are_settings(models: Models) -> None:
    e, scores = models.extend_start, {}
    batch = tiny.rollouts([([5, e, 6], [7, e + 1, 8])], e)
    for token in (9, 10):
        worker = lone_teacher(models.config(ref={"ref_replace_token_id": token, "ref_log_prob_replace_val": -7.5}))
        scores[token] = worker.compute_ref_log_prob(batch).tensor("ref_log_prob")
        assert scores[token][0, 1] == -7.5
        spelled_out = tiny.rollouts([([5, token, 6], [7, token, 8])], e)
        same = worker.compute_ref_log_prob(spelled_out).tensor("ref_log_prob")
        torch.testing.assert_close(scores[token][0, [0, 2]], same[0, [0, 2]])
    assert not torch.allclose(scores[9], scores[10])


def test_the_students_own_start_reads_and_scores_every_id(models: Models) -> None:
    """A reference without a path, whatever the threshold: the KL of a student to it is 0 before the first update.

    Against the softmax over all ids in float64.
    """
    e = models.extend_start
    rows = [*tiny.draw_rows(6, models.ids), ([5, e, 6], [20, e + 3, 21, 22]), ([e + 1], [e + 2, 30, e + 25])]
    batch, config = tiny.rollouts(rows, e, temperature=1.1), models.config()
    config.ref.model.path = None
    old = workers(config).compute_log_prob(batch).tensor("old_log_probs")
    scores = lone_teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")
    torch.testing.assert_close(scores, old, rtol=0, atol=0)
    whole = tiny.plain_log_probs(tiny.load_plain(models.student).double(), batch, models.ids, temperature=1.1)
    torch.testing.assert_close(scores.double(), tiny.of_tokens(whole, batch), rtol=0, atol=1e-5)


def test_a_student_that_is_its_teacher_has_no_advantage(models: Models) -> None:
    """Equal weights and no extended ids in sight; at the first extended token it is the clipped one, whatever else."""
    for config, rows in (
        (tiny.worker_config(models.student), tiny.draw_rows(8, models.extend_start)),
        (models.config(), [([5, 6], [20, 21, models.extend_start + 2, 30])]),
    ):
        batch = tiny.rollouts(rows, models.extend_start, temperature=1.1)
        old = workers(config).compute_log_prob(batch).tensor("old_log_probs")
        ref = lone_teacher(config).compute_ref_log_prob(batch).tensor("ref_log_prob")
        mask, bounds = batch.tensor("response_mask"), {"distill_adv_max_clip": 5.0, "distill_adv_min_clip": -30.0}
        advantages = compute_on_policy_distill_reverse_kl(old, ref, mask, **bounds)[0]
        if len(rows) == 8:
            assert advantages.abs().max() < 1e-5
    assert advantages[0, 2] == -30.0 and (advantages[0, :2].abs() < 30).all() and not advantages[0, 3:].any()


def test_choose_replacement() -> None:
    def chosen(setting: int | None, pad: int | None, eos: int | None) -> int:
        tokenizer: Any = SimpleNamespace(pad_token_id=pad, eos_token_id=eos)
        return choose_replacement(setting, tokenizer, 10)

    assert chosen(7, 1, 2) == 7
    assert [chosen(None, pad, 2) for pad in (1, None, 12)] == [1, 2, 2]
    for setting, pad in ((10, 1), (None, None)):
        with pytest.raises(ValueError, match=rf"ref_replace_token_id={setting} .* is none of 10 ids"):
            chosen(setting, pad, None)
