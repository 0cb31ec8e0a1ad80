"""What is read of a model beside its weights."""

from pathlib import Path

import pytest
from support.rollout_reference import PADDED_ROWS, save_tiny_model, weights_of
from transformers import AutoTokenizer, GenerationConfig

from verl.config import HFModelConfig
from verl.workers.rollout.model_facts import manifest_of, read_model_facts


@pytest.mark.parametrize("tied", [True, False])
def test_the_manifest_is_that_of_the_trained_model(
    tiny_tokenizers: tuple[Path, Path], tmp_path: Path, tied: bool
) -> None:
    model = save_tiny_model(tmp_path, tiny_tokenizers[1], tied)
    facts = read_model_facts(HFModelConfig(path=str(tmp_path)))
    assert facts.weights == manifest_of(model)
    assert facts.weights.aliases == ({"lm_head.weight"} if tied else set())
    assert facts.weights.shapes.keys() - facts.weights.aliases == weights_of(model).keys()
    assert facts.weights.shapes["lm_head.weight"] == (facts.vocab_rows, 64)
    assert facts.vocab_rows == facts.vocab_size + PADDED_ROWS


def test_end_tokens_of_all_three_files(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, tiny_tokenizers[1], tied=True)
    model.config.eos_token_id = 11
    model.config.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[12, 13]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    facts = read_model_facts(HFModelConfig(path=str(tmp_path)))
    assert facts.eos_token_ids == (tokenizer.eos_token_id, 12, 13, 11)
    assert facts.pad_token_id == tokenizer.pad_token_id
    (tmp_path / "generation_config.json").unlink()
    assert read_model_facts(HFModelConfig(path=str(tmp_path))).eos_token_ids == (tokenizer.eos_token_id, 11)


def test_a_tokenizer_too_large_for_the_model_is_named(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, tiny_tokenizers[1], tied=True)
    model.config.vocab_size = 100
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names \d+ ids, and actor_rollout_ref.model.path=.* has 100 embedding rows"):
        read_model_facts(HFModelConfig(path=str(tmp_path)))


def test_a_missing_path_is_named() -> None:
    with pytest.raises(ValueError, match=r"actor_rollout_ref\.model\.path is not set"):
        read_model_facts(HFModelConfig())
