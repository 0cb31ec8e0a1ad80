"""Log-probs, entropy and extended mass of the student worker, against whole logits of transformers."""

from pathlib import Path

import pytest
import torch
from support.exact_cases import Models, workers
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
    folder = write_model(tmp_path, tiny_tokenizers[1], family=family, tied=tied)
    config = models.config(folder, model=MODES[mode], rollout={"log_prob_max_token_len_per_gpu": 16})
    batch = rollouts(draw_rows(7, models.ids), models.extend_start, temperature=1.3)
    keys, meta = set(batch.batch.keys()), dict(batch.meta_info)
    scores = workers(config).compute_log_prob(batch)
    with torch.no_grad():
        log_probs = plain_log_probs(load_plain(folder), batch, models.ids, temperature=1.3)
    real = batch.tensor("attention_mask")[:, PROMPT:]
    right = {
        "old_log_probs": of_tokens(log_probs, batch),
        "entropys": -(log_probs.exp() * log_probs).sum(-1) * real,
        "extend_mass": log_probs.exp()[..., models.extend_start :].sum(-1) * real,
    }
    assert set(scores.batch.keys()) == set(right)
    for key, value in right.items():
        assert scores.tensor(key).dtype == torch.float32
        torch.testing.assert_close(scores.tensor(key), value, rtol=0, atol=1e-5)
    assert (set(batch.batch.keys()), batch.meta_info) == (keys, meta), "the batch is as it was"


def test_micro_batches_by_rows_score_the_same(models: Models) -> None:
    batch = rollouts(draw_rows(7, models.ids), models.extend_start)
    by_rows = {"log_prob_use_dynamic_bsz": False, "log_prob_micro_batch_size_per_gpu": 2}
    first, second = (workers(models.config(rollout=rollout)).compute_log_prob(batch) for rollout in ({}, by_rows))
    none = workers(worker_config(models.student)).compute_log_prob(batch)
    assert not none.tensor("extend_mass").any(), "there is no extension"
    for key in ("old_log_probs", "entropys", "extend_mass"):
        torch.testing.assert_close(first.tensor(key), second.tensor(key), rtol=0, atol=1e-5)


def test_what_a_batch_lacks_is_named(models: Models) -> None:
    batch, student = rollouts(draw_rows(3, models.ids)), workers(models.config())
    batch.pop(["attention_mask"])
    with pytest.raises(KeyError, match=r"attention_mask.*rollout"):
        student.compute_log_prob(batch)


def test_models_that_cannot_be_scored(tiny_tokenizers: tuple[Path, Path], models: Models, tmp_path: Path) -> None:
    folder = write_model(tmp_path, tiny_tokenizers[1], rows=models.ids - 1)
    with pytest.raises(ValueError, match=f"{models.ids} ids .* {models.ids - 1} rows"):
        workers(models.config(folder))
