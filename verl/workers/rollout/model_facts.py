"""What an engine has to know of a model besides running it.

In:  the model's config, generation config and tokenizer files. Out: how many ids the tokenizer names, which of them end
an answer, and name and shape of every tensor that a weight sync must bring. No weights are read.
"""

from dataclasses import dataclass
from typing import Any

import torch

from verl.config import HFModelConfig
from verl.utils.tokenizer import hf_tokenizer


@dataclass(frozen=True)
class WeightManifest:
    """Names (Hugging Face's) and shapes of a model's weights."""

    shapes: dict[str, tuple[int, ...]]
    """Every tensor, second names of shared tensors included."""
    aliases: frozenset[str]
    """Second names of shared tensors, such as a tied ``lm_head.weight``: a sync may bring them or not."""


@dataclass(frozen=True)
class ModelFacts:
    """See the module."""

    vocab_size: int
    """Ids that the tokenizer names, [0, vocab_size): the support of the policy. The model may have more rows."""
    vocab_rows: int
    """Rows of the model's embedding, padding included."""
    eos_token_ids: tuple[int, ...]
    """Ids that end an answer: those of the generation config, the config and the tokenizer."""
    pad_token_id: int
    weights: WeightManifest


def read_model_facts(model_config: HFModelConfig) -> ModelFacts:
    """Read a model's facts from its files.

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
    return ModelFacts(
        vocab_size=len(tokenizer),
        vocab_rows=config.vocab_size,
        eos_token_ids=_eos_token_ids(model_config, config, tokenizer.eos_token_id),
        pad_token_id=tokenizer.pad_token_id,
        weights=read_manifest(config, model_config.trust_remote_code),
    )


def load_hf_config(model_config: HFModelConfig) -> Any:
    """The model's config with ``model.override_config`` laid over it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        model_config.path, trust_remote_code=model_config.trust_remote_code, **model_config.override_config
    )


def read_manifest(config: Any, trust_remote_code: bool = False) -> WeightManifest:
    """Names and shapes of the tensors of a model with this config, which is built without memory for them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return manifest_of(model)


def manifest_of(model: torch.nn.Module) -> WeightManifest:
    """Names and shapes of a model's parameters."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    first_names = {name for name, _ in model.named_parameters()}
    return WeightManifest(shapes=shapes, aliases=frozenset(shapes.keys() - first_names))


def _eos_token_ids(model_config: HFModelConfig, config: Any, tokenizer_eos: int | None) -> tuple[int, ...]:
    from transformers import GenerationConfig

    try:
        generation_eos = GenerationConfig.from_pretrained(model_config.path).eos_token_id
    except OSError:  # the model ships no generation_config.json
        generation_eos = None
    ids: list[int] = []
    for value in (tokenizer_eos, generation_eos, config.eos_token_id):
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return tuple(dict.fromkeys(ids))
