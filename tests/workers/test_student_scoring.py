"""Log-probs, entropy and extended mass of the student worker, against whole logits of transformers."""

from pathlib import Path

import pytest
import torch
from support.peak_memory import measure
from support.tiny_workers import (
    PROMPT,
    draw_rows,
    load_plain,
    of_tokens,
    plain_log_probs,
    rollouts,
    worker_config,
    write_model,
)

from verl.config import ActorRolloutRefConfig
from verl.workers.student_worker import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

MODES = {
    "packed": {"use_remove_padding": True},
    "padded": {"use_remove_padding": False},
    "eager": {"override_config": {"attn_implementation": "eager"}},
}


def student(config: ActorRolloutRefConfig) -> StudentWorker:
    worker = StudentWorker(config=config, device="cpu")
    worker.init_model()
    return worker


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_scores_are_those_of_whole_logits(
    family: str,
    tied: bool,
    mode: str,
    tiny_tokenizers: tuple[Path, Path],
    student_ids: int,
    extend_start: int,
    tmp_path: Path,
) -> None:
    folder = write_model(tmp_path, tiny_tokenizers[1], family=family, tied=tied)
    config = worker_config(
        folder, extend_start=extend_start, model=MODES[mode], rollout={"log_prob_max_token_len_per_gpu": 16}
    )
    batch = rollouts(draw_rows(7, student_ids), extend_start, temperature=1.3)
    scores = student(config).compute_log_prob(batch)

    with torch.no_grad():
        log_probs = plain_log_probs(load_plain(folder), batch, student_ids, temperature=1.3)
    real = batch.tensor("attention_mask")[:, PROMPT:]
    right = {
        "old_log_probs": of_tokens(log_probs, batch),
        "entropys": -(log_probs.exp() * log_probs).sum(-1) * real,
        "extend_mass": log_probs.exp()[..., extend_start:].sum(-1) * real,
    }
    assert set(scores.batch.keys()) == set(right)
    for key, value in right.items():
        assert scores.tensor(key).dtype == torch.float32
        torch.testing.assert_close(scores.tensor(key), value, rtol=0, atol=1e-5)


def test_micro_batches_by_rows_score_the_same(student_model: Path, student_ids: int, extend_start: int) -> None:
    batch = rollouts(draw_rows(7, student_ids), extend_start)
    scores = []
    for rollout in ({}, {"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": 2}):
        config = worker_config(student_model, extend_start=extend_start, rollout=rollout)
        scores.append(student(config).compute_log_prob(batch))
    for key in scores[0].batch.keys():  # noqa: SIM118  a TensorDict iterates over rows
        torch.testing.assert_close(scores[0].tensor(key), scores[1].tensor(key), rtol=0, atol=1e-5)


def test_without_an_extension_its_mass_is_zero(student_model: Path, student_ids: int) -> None:
    scores = student(worker_config(student_model)).compute_log_prob(rollouts(draw_rows(3, student_ids)))
    assert not scores.tensor("extend_mass").any()


def test_scoring_leaves_the_batch_as_it_was(student_model: Path, student_ids: int) -> None:
    batch = rollouts(draw_rows(3, student_ids))
    keys, meta = set(batch.batch.keys()), dict(batch.meta_info)
    student(worker_config(student_model)).compute_log_prob(batch)
    assert set(batch.batch.keys()) == keys
    assert batch.meta_info == meta


def test_a_missing_temperature_is_an_error(student_model: Path, student_ids: int) -> None:
    batch = rollouts(draw_rows(3, student_ids))
    del batch.meta_info["temperature"]
    with pytest.raises(ValueError, match="temperature"):
        student(worker_config(student_model)).compute_log_prob(batch)


def test_a_missing_key_names_its_producer(student_model: Path, student_ids: int) -> None:
    batch = rollouts(draw_rows(3, student_ids))
    batch.pop(["attention_mask"])
    with pytest.raises(KeyError, match=r"attention_mask.*rollout"):
        student(worker_config(student_model)).compute_log_prob(batch)


def test_a_tokenizer_larger_than_the_model_is_an_error(
    tiny_tokenizers: tuple[Path, Path], student_ids: int, tmp_path: Path
) -> None:
    folder = write_model(tmp_path, tiny_tokenizers[1], rows=student_ids - 1)
    with pytest.raises(ValueError, match=f"{student_ids} ids .* {student_ids - 1} rows"):
        student(worker_config(folder))


def test_a_missing_model_path_is_an_error(student_model: Path) -> None:
    config = worker_config(student_model)
    config.model.path = None
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.model\.path"):
        student(config)


def test_peak_memory_does_not_grow_with_tokens_times_vocabulary(tiny_tokenizers, tmp_path) -> None:
    """Scoring and training at V = 176,384: the logits of the 512 tokens more would take 361 MB a buffer."""
    fewer, more = measure("model", write_model(tmp_path, tiny_tokenizers[1], rows=176384), 48, 112)
    assert more - fewer < 100
