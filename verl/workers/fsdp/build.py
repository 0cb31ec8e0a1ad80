"""The ranks of a model, and any Hugging Face causal language model as a sharded `TokenStatsModel` on them.

In:  a worker that knows its rank, a model folder, the model and sharding settings. Out: the rank's device and the mesh
of all ranks; the model, sharded over the mesh with FSDP2 and holding the folder's weights. Rank 0 alone reads the
weights; every rank gets its shards from it, one parameter at a time, and never holds more of the model.

    config ─► model without memory ─► fully_shard ─► memory for the shards ─► scatter each parameter from rank 0

Not here: optimizer, roles, tokenizers.
"""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from verl.config import FSDPConfig, HFModelConfig
from verl.ops.attention import PACKED_SDPA, PACKED_VARLEN, needs_eager
from verl.ops.sequence_parallel import SequenceGroup
from verl.single_controller.base import Worker
from verl.utils.device import get_device_name, resolve_dtype, select_device, warn_of_emulated_bf16
from verl.weight_sync import hugging_face_name
from verl.workers.fsdp.adapter import add_adapter
from verl.workers.fsdp.token_stats_model import ScoredRows, TokenStatsModel, reshard

logger = logging.getLogger(__name__)

CHECKPOINTING = {"use_reentrant": False, "preserve_rng_state": False}
"""Blocks draw no random numbers, so recomputing one needs no generator's state."""
LOAD_TIMEOUT = timedelta(hours=6)
EXACT, ROUNDED = 1e-3, 0.1
"""Mean distance in nats, in fp32 and in half precision, up to which log-probs are a model's own."""


def join_ranks(worker: Worker, device_setting: str, seed: int, fsdp_size: int = -1) -> tuple[torch.device, DeviceMesh]:
    """Meet the other ranks: this rank's device, and the mesh of all; each gets random numbers of its own from ``seed``.

    Roles that share a process share the process group: the first of them makes it.

    Args:
        fsdp_size: ranks that share the shards of a model, the last dimension of the mesh; the first counts its copies.
            -1: all, in a mesh of one dimension.
    """
    device_name = get_device_name(device_setting)
    device = select_device(device_name, worker.local_rank)
    if device_name == "cpu":
        # With more threads than cores every small operation waits for threads that do not run: two ranks of two
        # threads on two cores were up to fifty times slower than two ranks of one.
        share = max(1, len(os.sched_getaffinity(0)) // worker.local_world_size)
        torch.set_num_threads(min(share, torch.get_num_threads()))  # those are OMP_NUM_THREADS, where it is set
    # With CUDA, tensors on the CPU communicate too: checkpoints need that.
    worker.init_process_group("cpu:gloo,cuda:nccl" if device_name == "cuda" else "gloo")
    torch.manual_seed(seed + worker.rank)
    if fsdp_size == -1:
        return device, init_device_mesh(device_name, (worker.world_size,))
    shape = worker.world_size // fsdp_size, fsdp_size
    return device, init_device_mesh(device_name, shape, mesh_dim_names=("copies", "shards"))


def choose_attention(
    config: PretrainedConfig, model: HFModelConfig, device_name: str, compute_dtype: torch.dtype, is_split: bool = False
) -> tuple[str, bool]:
    """Name of the attention in transformers' interface, and whether rows are packed, laid end to end.

    Flash-attention in half precision on CUDA where it is installed and rows are not split over ranks; else eager where
    attention has a cap or sinks (`needs_eager`), else torch's own kernels. Packed where rows can be kept apart.
    ``model.override_config.attn_implementation`` decides where it is set.

    Raises:
        ValueError: torch's kernels are set for a model that has more than they compute.
    """
    wanted, packed = model.override_config.get("attn_implementation"), model.use_remove_padding
    if wanted in ("sdpa", PACKED_SDPA, PACKED_VARLEN) and needs_eager(config):
        raise ValueError(
            f"actor_rollout_ref.model.override_config.attn_implementation={wanted!r} drops what attention of "
            f"{type(config).__name__} has beside causality (a cap, sinks); leave it out, or set eager"
        )
    if wanted is not None:
        return wanted, packed and (wanted.startswith("flash") or wanted in (PACKED_SDPA, PACKED_VARLEN))
    has_kernels = device_name == "cuda" and compute_dtype in (torch.bfloat16, torch.float16)
    # A package flash_attn alone may be flash-attn-4.
    if has_kernels and is_flash_attn_2_available() and not is_split:
        return "flash_attention_2", packed
    if needs_eager(config):
        return "eager", False
    # Where every layer attends to all earlier tokens of its row, a mask would only keep rows apart.
    layers = set(getattr(config, "layer_types", None) or ())
    only_causal = layers == {"full_attention"} if layers else getattr(config, "sliding_window", None) is None
    if packed and only_causal:
        # The kernel's architecture begins with that of the A100.
        return (PACKED_VARLEN if has_kernels and torch.cuda.get_device_capability() >= (8, 0) else PACKED_SDPA), True
    return "sdpa", False


def load_config(path: str, model: HFModelConfig) -> PretrainedConfig:
    """The model's own config with ``model.override_config`` over it, and without dropout.

    Dropout would make the policy that is trained another one than the policy that is scored.

    Raises:
        ValueError: an override that this kind of model has no entry for.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    for name, value in model.config_entries.items():
        # Setting a misspelt entry would succeed and change nothing.
        if not hasattr(config, name):
            raise ValueError(
                f"actor_rollout_ref.model.override_config.{name}={value!r}: {type(config).__name__} has no such entry"
            )
        setattr(config, name, value)
    for name, value in config.to_dict().items():
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, float) and value > 0:
            logger.warning("%s=%s of %s is set to 0: training and scoring must be the same function", name, value, path)
            setattr(config, name, 0.0)
    return config


def require_split(path: str, model: HFModelConfig, ranks: int) -> None:
    """Check that rows of a model can be split over so many ranks.

    Raises:
        ValueError: they cannot, or `load_config` or `choose_attention` refuse the model.
    """
    config = load_config(path, model)
    # Whatever the device: without flash-attention rows are packed on all kinds of it, or on none.
    attention, _ = choose_attention(config, model, "cpu", torch.float32)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if attention not in (PACKED_SDPA, PACKED_VARLEN):
        fault = f"its attention is {attention!r}, and what splits rows is built for torch's own, to all earlier tokens"
    elif heads % ranks or (key_heads % ranks and ranks % key_heads):
        fault = f"{heads} attention heads with {key_heads} key heads do not divide over the ranks"
    else:
        return
    key = f"actor_rollout_ref.actor.ulysses_sequence_parallel_size={ranks}"
    raise ValueError(f"{key} cannot split rows of {type(config).__name__}: {fault}; change it, or set it to 1")


def _load_on_rank_zero(
    path: str, config: PretrainedConfig, trust: bool, **options: Any
) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """The model, which takes no memory yet; on rank 0 its parameters and buffers by name, on the others nothing. All
    ranks return once rank 0 has read it.

    Raises:
        ValueError: the files lack weights of the model.
    """
    if dist.get_rank() != 0:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **options)
        _wait_for_rank_zero()
        return model, {}
    options |= {"config": config, "trust_remote_code": trust, "output_loading_info": True}
    model, found = AutoModelForCausalLM.from_pretrained(path, **options)
    if lost := sorted(found["missing_keys"]):  # transformers draws them at random
        raise ValueError(f"{path} lacks {len(lost)} weights of its model ({', '.join(lost[:3])}); copy it again")
    tensors = {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    model.to("meta")
    model.tie_weights()  # on another kind of device a shared tensor has become two
    _wait_for_rank_zero()
    return model, tensors


def _wait_for_rank_zero() -> None:
    """Until it has read the weights, perhaps hundreds of gigabytes from a hub: longer than other collectives wait."""
    group = dist.new_group(backend="gloo", timeout=LOAD_TIMEOUT)
    dist.barrier(group)
    dist.destroy_process_group(group)


def _require_no_buffers(path: str, model: nn.Module) -> None:
    """Raise ValueError where the model's files hold more than parameters."""
    if held := model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys():
        raise ValueError(
            f"{path} cannot be trained: its files hold {len(held)} buffers ({min(held)}), as of a router's bias, that "
            "neither checkpoints nor weight syncs carry; take another model"
        )


def _scatter_from_rank_zero(model: PreTrainedModel, tensors: dict[str, torch.Tensor], mesh: DeviceMesh) -> None:
    """Give every rank its shard of rank 0's weights, and rank 0's buffers, some of which no file holds."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            # Popped, so that rank 0 frees each whole tensor after it; the others' is never read.
            whole = tensors.pop(hugging_face_name(name), None)
            if whole is None:
                whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=mesh.device_type)
            # Rows beside an adapter have become fp32 since rank 0 read them, and all ranks have to send as many bytes.
            shard = distribute_tensor(whole.to(mesh.device_type, parameter.dtype), mesh, parameter.placements)
            parameter.to_local().copy_(shard.to_local())
        dtypes = [{name: tensor.dtype for name, tensor in tensors.items()}]
        dist.broadcast_object_list(dtypes, src=0)
        for name, buffer in model.named_buffers():
            buffer.data = buffer.to(dtypes[0].get(name, buffer.dtype))
            if name in tensors:
                buffer.copy_(tensors[name])
            dist.broadcast(buffer, src=0)


def _shard_model(
    model: TokenStatsModel, mesh: DeviceMesh, precision: MixedPrecisionPolicy, reshard_after_forward: bool
) -> None:
    """Shard in place: every block, then the rest.

    Raises:
        ValueError: the model class does not name its repeated blocks.
    """
    # transformers keeps it for device maps: the classes of a model's repeated blocks.
    names = set(model.causal_lm._no_split_modules or ())
    blocks = [module for module in model.causal_lm.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(model.causal_lm).__name__} cannot be sharded: its _no_split_modules names no blocks")
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=precision, reshard_after_forward=reshard_after_forward)
    # The root is needed first in backward, so it stays gathered after forward; `reshard` ends that.
    fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=False)


def build_model(
    path: str, model: HFModelConfig, fsdp: FSDPConfig, mesh: DeviceMesh, split_over: int = 1, *, trainable: bool
) -> TokenStatsModel:
    """Load and shard a model; every rank of the mesh takes part.

    A trained model is stored in fp32 (``model_dtype=auto``) and computes in ``mixed_precision.param_dtype``. A frozen
    one is stored in that precision at once, without gradients; so are the weights beside an adapter, which is in fp32.

    Args:
        path: folder or hub name of the weights and the config.
        model: how to load and run it.
        fsdp: sharding and precision.
        mesh: the ranks, as `join_ranks` gives it; its device is where the model goes.
        split_over: consecutive ranks that compute the same rows together.
        trainable: whether an optimizer will change it.

    Raises:
        ValueError: a model whose head or blocks cannot be used here, whose scores would not be its own, or whose config
            is another one on another rank.
    """
    device_name = mesh.device_type
    compute_dtype = resolve_dtype(fsdp.mixed_precision.param_dtype, device_name)
    if device_name == "cpu" and compute_dtype == torch.bfloat16 and dist.get_rank() == 0:
        warn_of_emulated_bf16()
    has_adapter = trainable and model.lora_rank > 0
    storage_dtype = torch.float32 if trainable and not has_adapter else compute_dtype
    if fsdp.model_dtype != "auto":
        storage_dtype = resolve_dtype(fsdp.model_dtype, device_name)
    offload = model.enable_activation_offload and device_name == "cuda"
    config = load_config(path, model)
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, config.to_json_string())
    if len(set(of_ranks)) > 1:  # a hub's name, of which nodes have other revisions in their caches
        raise ValueError(f"the ranks read different configs of {path}; give a folder that is the same on all nodes")
    attention, packed = choose_attention(config, model, device_name, compute_dtype, split_over > 1)
    if split_over > 1:
        require_split(path, model, split_over)
    disable_progress_bar()  # a worker writes to a log file
    options = {"dtype": storage_dtype, "attn_implementation": attention}
    causal_lm, tensors = _load_on_rank_zero(path, config, model.trust_remote_code, **options)
    if trainable:
        _require_no_buffers(path, causal_lm)
    module = TokenStatsModel(causal_lm, packed, offload, SequenceGroup.of_size(split_over))
    module.requires_grad_(trainable)
    if has_adapter:
        tensors |= add_adapter(causal_lm, model)
    if trainable and model.enable_gradient_checkpointing:
        causal_lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
    # Casts where precisions differ, and none where they do not (fp32 on CPU).
    precision = MixedPrecisionPolicy(compute_dtype, resolve_dtype(fsdp.mixed_precision.reduce_dtype, device_name))
    _shard_model(module, mesh, precision, fsdp.reshard_after_forward)
    module.to_empty(device=device_name)  # of each parameter the rank's shard
    _scatter_from_rank_zero(causal_lm, tensors, mesh)
    _require_own_scores(module, path, EXACT if compute_dtype == torch.float32 else ROUNDED)
    return module


@torch.no_grad()
def _require_own_scores(module: TokenStatsModel, path: str, tolerance: float) -> None:
    """Score two rows as training does, and compare with the model's own logits of each row alone.

    A decoder may not tell its attention where rows begin, and a model may do something to its logits that no head
    shows. Every rank takes part.
    """
    ids, lengths = (torch.arange(12) * 7 % module.num_rows).view(2, 6), (6, 4)
    real = torch.arange(6) < torch.tensor(lengths)[:, None]
    micro = ScoredRows(ids, real, real[:, 1:]).build([0, 1], module.packed, module.group)

    def distance(hidden: torch.Tensor, weight: torch.Tensor, _: torch.Tensor) -> float:
        scores = (hidden.float() @ weight.float().T).log_softmax(dim=-1)
        # Within the forward pass of the root, while FSDP holds the parameters that belong to no block.
        rows = [row[None, :length].to(module.device) for row, length in zip(ids, lengths, strict=True)]
        own = [module.causal_lm(input_ids=row, use_cache=False).logits[0, :-1].float() for row in rows]
        at = [own[row][column] for row, column in zip(micro.rows, micro.columns, strict=True)]
        # In a group of more ranks than there are positions some have none.
        return float((scores - torch.stack(at).log_softmax(dim=-1)).abs().mean()) if at else 0.0

    was_training = module.training
    found = module.eval().run(micro, distance)
    module.train(was_training)
    reshard(module)
    if not found <= tolerance:
        fix = "set actor_rollout_ref.model.use_remove_padding=False" if module.packed else "take another model"
        raise ValueError(
            f"{type(module.causal_lm).__name__} in {path} is scored otherwise than by its own logits, by {found:.3g} "
            f"nats on average: its decoder or head does more than is known here; {fix}"
        )
