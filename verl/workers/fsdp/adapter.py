"""An adapter (LoRA) in a student: pairs of small matrices that peft puts beside the linear layers.

::

    y = W x + (lora_alpha / lora_rank) B A x     W (out, in) is frozen; A (rank, in) is drawn, B (out, rank) starts at 0

In:  a student that has no memory yet, or one that is sharded. Out: the same with an adapter, and what that starts from;
whole weights W + s B A under the names of the model's own files; the model with its adapter switched off, which is the
student as it was before the run. FSDP cuts B into the rows that W is cut into, so each rank merges its own rows.

Not here: files of adapters (``checkpoint``).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Replicate
from transformers import PreTrainedModel

from verl.config import HFModelConfig
from verl.weight_sync import hugging_face_name, named_weights

ADAPTER = "default"
"""Peft's name of the adapter, of which there is one."""
FILE_PREFIX = "base_model.model."
"""Prefix of the names of tensors in peft's files."""
ALL_LINEAR = "all-linear"


def add_adapter(causal_lm: PreTrainedModel, model: HFModelConfig) -> dict[str, torch.Tensor]:
    """Put an adapter into a model on the meta device. From then on only the adapter is trained, and with
    ``model.lora_extended_rows`` embedding and head too; all that is trained is stored in fp32.

    Returns:
        what the adapter's parameters start from, by name, in fp32.

    Raises:
        ValueError: ``model.target_modules`` names what the model lacks, or what is no linear layer below the head.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets, ends = model.target_modules, (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    known = dict(causal_lm.named_modules())
    if targets == [ALL_LINEAR]:  # peft's own meaning of it takes experts too, whose matrices are no linear layers
        linear = [name for name, layer in known.items() if type(layer) is nn.Linear and layer not in ends]
        targets = sorted({name.rpartition(".")[2] for name in linear})
    if missing := [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in known)]:
        raise ValueError(f"actor_rollout_ref.model.target_modules={targets}: the model has no {missing}; correct them")
    config = LoraConfig(
        r=model.lora_rank,
        lora_alpha=model.lora_alpha,
        target_modules=targets,
        base_model_name_or_path=model.path,
        task_type="CAUSAL_LM",
    )
    inject_adapter_in_model(config, causal_lm, ADAPTER, low_cpu_mem_usage=True)
    for name, layer in adapted_layers(causal_lm).items():
        # A head is read as a matrix, without what stands beside it.
        if layer.get_base_layer() in ends or type(layer.get_base_layer()) is not nn.Linear:
            fix = "name linear layers of the blocks"
            raise ValueError(f"actor_rollout_ref.model.target_modules={targets} adapts {name}; {fix}, or {ALL_LINEAR}")
        layer.lora_A.float()
        layer.lora_B.float()
    start = {}
    for name, parameter in causal_lm.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            start[name] = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(start[name], a=math.sqrt(5))  # as peft draws it
    for end in ends if model.lora_extended_rows else ():
        end.float().requires_grad_(True)
    return start


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """Peft's layers around linear ones, by the Hugging Face name of the weight; none without an adapter."""
    layers = ((name, layer) for name, layer in module.named_modules() if hasattr(layer, "lora_A"))
    return {hugging_face_name(f"{name}.weight"): layer for name, layer in layers}


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """What has a gradient, by its name in files: weights under Hugging Face names, an adapter under peft's."""
    weights = {name: weight for name, weight in named_weights(module).items() if weight.requires_grad}
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            weights[FILE_PREFIX + hugging_face_name(name).replace(f".{ADAPTER}.", ".")] = parameter
    return weights


@torch.no_grad()
def merge(layers: dict[str, Any], name: str, weight: torch.Tensor) -> torch.Tensor:
    """A weight with its part of the adapter in it, sharded as it was; every rank takes part.

    Args:
        layers: of `adapted_layers`.
        name: of the weight.
        weight: the shards, on the device to compute on.
    """
    if name not in layers:
        return weight
    layer = layers[name]
    first, second = (part[ADAPTER].weight.to(weight.device) for part in (layer.lora_A, layer.lora_B))
    delta: torch.Tensor = second @ first.redistribute(placements=[Replicate()] * first.device_mesh.ndim)
    return (weight.float() + layer.scaling[ADAPTER] * delta).to(weight.dtype)


def merged_weights(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All weights as `merge` gives them, one at a time, under Hugging Face names."""
    layers = adapted_layers(module)
    for name, weight in named_weights(module).items():
        yield name, merge(layers, name, weight.detach())


@contextmanager
def as_frozen(module: nn.Module) -> Iterator[None]:
    """Within the block the model runs in eval mode without its adapter, if it has one; for passes without gradient."""
    was_training, layers = module.training, adapted_layers(module).values()
    module.eval()
    for layer in layers:
        # `enable_adapters` would also take the gradient from parameters, of which FSDP keeps copies.
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False
        module.train(was_training)
