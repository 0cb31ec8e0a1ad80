"""What an engine needs to know about a model besides its weights.

In:  the model's config, generation config and tokenizer files. Out: how many ids the tokenizer names, which of them end
an answer, and name and shape of every tensor that a weight sync must bring. No weights are read.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from verl.config import HFModelConfig
from verl.utils.tokenizer import hf_tokenizer
from verl.weight_sync.receive import WeightShapes, weight_shapes


@dataclass(frozen=True)
class ModelInfo:
    """See the module."""

    vocab_size: int
    """Ids that the tokenizer names, [0, vocab_size): the support of the policy. The model may have more rows."""
    vocab_rows: int
    """Rows of the model's embedding, padding included."""
    eos_token_ids: tuple[int, ...]
    """Ids that end an answer: those of the tokenizer, the generation config and the config."""
    pad_token_id: int
    weights: WeightShapes


def read_model_info(model_config: HFModelConfig) -> ModelInfo:
    """Read it from the model's files.

    Raises:
        ValueError: no path, or no tokenizer that fits the model.
    """
    if model_config.path is None:
        raise ValueError("actor_rollout_ref.model.path is not set; give the folder or hub name of the model")
    config = load_hf_config(model_config)
    tokenizer_path = model_config.tokenizer_path or model_config.path
    tokenizer = hf_tokenizer(tokenizer_path, model_config.trust_remote_code)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer_path} names {len(tokenizer)} ids, and "
            f"actor_rollout_ref.model.path={model_config.path} has {config.vocab_size} embedding rows; use the "
            "tokenizer that belongs to the model (actor_rollout_ref.model.tokenizer_path)"
        )
    try:
        generation_eos = GenerationConfig.from_pretrained(model_config.path).eos_token_id
    except OSError:  # the model ships no generation_config.json
        generation_eos = None
    eos_ids: list[int | None] = []
    for value in (tokenizer.eos_token_id, generation_eos, config.eos_token_id):
        eos_ids += value if isinstance(value, list) else [value]
    with torch.device("meta"):  # without memory for the weights
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=model_config.trust_remote_code)
    return ModelInfo(
        vocab_size=len(tokenizer),
        vocab_rows=config.vocab_size,
        eos_token_ids=tuple(token_id for token_id in dict.fromkeys(eos_ids) if token_id is not None),
        pad_token_id=tokenizer.pad_token_id,
        weights=weight_shapes(model),
    )


def load_hf_config(model_config: HFModelConfig) -> Any:
    """The model's config with ``model.override_config`` over it."""
    return AutoConfig.from_pretrained(
        model_config.path, trust_remote_code=model_config.trust_remote_code, **model_config.override_config
    )
