"""What is read of a model beside its weights."""

from pathlib import Path

from support.engines import save_tiny_model
from transformers import AutoTokenizer, GenerationConfig

from verl.config import HFModelConfig
from verl.workers.rollout.replica import load_hf_config, read_model_info


def test_end_tokens_of_all_three_files(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path, tiny_tokenizers[1], tied=True)
    model.config.eos_token_id = 11
    model.config.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[12, 13]).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    info = read_model_info(HFModelConfig(path=str(tmp_path)))
    assert info.eos_token_ids == (tokenizer.eos_token_id, 12, 13, 11)
    assert info.pad_token_id == tokenizer.pad_token_id
    (tmp_path / "generation_config.json").unlink()
    assert read_model_info(HFModelConfig(path=str(tmp_path))).eos_token_ids == (tokenizer.eos_token_id, 11)


def test_the_attention_of_training_is_not_that_of_an_engine(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    """Packed attention makes no mask: with an engine's cache each token would see the first one alone."""
    save_tiny_model(tmp_path, tiny_tokenizers[1], tied=True)
    entries = {"attn_implementation": "packed_sdpa", "rms_norm_eps": 0.5}
    config = load_hf_config(HFModelConfig(path=str(tmp_path), override_config=entries))
    assert config._attn_implementation is None and config.rms_norm_eps == 0.5
