"""What models take of memory on a rank, by formulas over their shapes.

In:  settings, and of each model a `ModelShape`, read off its ``config.json``: no weights. Out: bytes of weights and of
what belongs to them, and the most that a pass over the largest micro-batch holds beside them. The formulas count
tensors, and each names the code that makes these; ``benchmarks/plan.py`` holds them against measured peaks on the CPU.

Not here: what a process takes without a model, fragments of an allocator, attention of models that need eager, which
keeps a score for each pair of tokens; engines and stages (``plan``).

Letters: N tokens of a micro-batch, S of them scored, D hidden size, F size inside the MLP, V rows of the head.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM

from verl.config import FSDPConfig, HFModelConfig, PPOConfig
from verl.ops import linear_divergence
from verl.ops import linear_log_prob as ops
from verl.workers.fsdp.build import load_config

FP32 = 4


class ModelShape(NamedTuple):
    """A decoder in numbers of weights and features."""

    weights: int
    """All of them; a tied head counts once."""
    block: int
    """Weights of the largest block."""
    blocks: int
    rows: int
    """V."""
    hidden: int
    """D."""
    queries: int
    """Features of all query heads."""
    keys: int
    """Features of all key heads, and of all value heads."""
    heads: int
    inner: int
    """F; in a mixture, of all experts of a token."""
    tied: bool
    """Whether embedding and head are one."""
    head_norms: bool
    """Whether queries and keys are normalised."""
    linear: Mapping[str, tuple[tuple[int, int], ...]]
    """In and out features of the blocks' linear layers, by the last part of their names."""

    @property
    def ends(self) -> int:
        """Weights of embedding, head and last norm, which FSDP gathers together, as they belong to no block."""
        return self.rows * self.hidden * (1 if self.tied else 2) + self.hidden


def read_shape(path: str, model: HFModelConfig) -> ModelShape:
    """The shape of the model in a folder, or on the hub, built without memory; reads its ``config.json`` alone."""
    config = load_config(path, model)
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
    names = set(causal_lm._no_split_modules or ())  # as FSDP finds the blocks (`build._shard_model`)
    blocks = [module for module in causal_lm.modules() if type(module).__name__ in names]
    linear: dict[str, tuple[tuple[int, int], ...]] = {}
    for block in blocks:
        for name, layer in block.named_modules():
            if type(layer) is torch.nn.Linear:
                last = name.rpartition(".")[2]
                linear[last] = (*linear.get(last, ()), (layer.in_features, layer.out_features))
    heads, hidden = config.num_attention_heads, config.hidden_size
    size = getattr(config, "head_dim", None) or hidden // heads
    experts, of_expert = getattr(config, "num_experts_per_tok", None), getattr(config, "moe_intermediate_size", None)
    rows = causal_lm.get_output_embeddings().weight.shape[0]
    inner = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * hidden
    return ModelShape(
        weights=sum(weight.numel() for weight in causal_lm.parameters()),
        block=max((sum(weight.numel() for weight in block.parameters()) for block in blocks), default=0),
        blocks=len(blocks),
        rows=rows,
        hidden=hidden,
        queries=heads * size,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * size,
        heads=heads,
        inner=experts * (of_expert or inner) if experts else inner,
        tied=bool(config.tie_word_embeddings),
        head_norms=any("q_norm" in name for name, _ in causal_lm.named_parameters()),
        linear=linear,
    )


def itemsize(precision: str, device: str) -> int:
    """Bytes of a number of a precision that the settings name."""
    return {"auto": 2 if device == "cuda" else FP32, "fp32": FP32}.get(precision, 2)  # `device.resolve_dtype`


class RankShare(NamedTuple):
    """What one rank holds of a model, in bytes."""

    parameters: int
    gradients: int
    """Once a mini-batch has gone through; 0 for a frozen model, as all that follows but the last two."""
    moments: int
    rows: int
    """Copy of embedding and head in host memory, which drifts are measured against."""
    ends: int
    """Weights that belong to no block, gathered: from the first pass of a stage to its end."""
    block: int
    """Weights of a block, gathered."""


def shards(fsdp: FSDPConfig, ranks: int) -> int:
    """Ranks that a model is sharded over."""
    return ranks if fsdp.fsdp_size == -1 else fsdp.fsdp_size


def frozen_share(shape: ModelShape, fsdp: FSDPConfig, device: str, ranks: int) -> RankShare:
    """Of a teacher (`build.build_model`)."""
    ranks = shards(fsdp, ranks)
    compute = itemsize(fsdp.mixed_precision.param_dtype, device)
    stored = compute if fsdp.model_dtype == "auto" else itemsize(fsdp.model_dtype, device)
    block = shape.block * compute * (1 if ranks == 1 else 2)  # with the buffer of the collective that brings the next
    return RankShare(shape.weights * stored // ranks, 0, 0, 0, shape.ends * compute, block)


def trained_share(shape: ModelShape, config: PPOConfig, device: str) -> RankShare:
    """Of the student: FSDP gives a gradient the parameter's precision, AdamW's moments have it too
    (`dp_actor.build_optimizer`); an adapter, and rows trained beside it, are fp32 (`adapter.add_adapter`)."""
    models = config.actor_rollout_ref
    model, fsdp = models.model, models.actor.fsdp_config
    ranks, ends = shards(fsdp, config.trainer.world_size), shape.ends - shape.hidden
    frozen = frozen_share(shape, fsdp, device, ranks)
    has_rows = models.rollout.extend_vocab_start_token is not None
    if not model.lora_rank:
        stored = FP32 if fsdp.model_dtype == "auto" else itemsize(fsdp.model_dtype, device)
        each = shape.weights * stored // ranks
        rows = has_rows * ends * stored // ranks
        return frozen._replace(parameters=each, gradients=each, moments=2 * each, rows=rows)
    targets = {name.rpartition(".")[2] for name in model.target_modules}
    adapted = [pair for name, pairs in shape.linear.items() if targets & {name, "all-linear"} for pair in pairs]
    adapter = model.lora_rank * sum(inside + outside for inside, outside in adapted)
    trained = adapter + model.lora_extended_rows * ends
    beside = frozen.parameters - model.lora_extended_rows * ends * frozen.parameters // shape.weights
    each = trained * FP32 // ranks
    rows = has_rows * model.lora_extended_rows * ends * FP32 // ranks
    return frozen._replace(parameters=beside + each, gradients=each, moments=2 * each, rows=rows)


# ------------------------------------------------------------------ a micro-batch


class Micro(NamedTuple):
    """The largest micro-batch of a rank."""

    tokens: int
    """N."""
    scored: int
    """S."""
    is_only: bool
    """Whether a rank has one of them in a mini-batch."""


def largest_micro_batch(config: PPOConfig, stage: str) -> Micro:
    """Of the student in ``update`` or ``score``, or of a teacher (``ref``): rows of the longest prompt and answer
    (`token_stats_model.ScoredRows`)."""
    models = config.actor_rollout_ref
    actor, rollout = models.actor, models.rollout
    by_tokens, most = actor.use_dynamic_bsz, actor.ppo_max_token_len_per_gpu
    max_rows, prompts = actor.ppo_micro_batch_size_per_gpu, actor.ppo_mini_batch_size
    response = max(filter(None, (rollout.horizon.start, rollout.horizon.end)), default=rollout.response_length)
    if stage != "update":
        scoring = rollout if stage == "score" else models.ref
        by_tokens, most = scoring.log_prob_use_dynamic_bsz, scoring.log_prob_max_token_len_per_gpu
        max_rows, prompts = scoring.log_prob_micro_batch_size_per_gpu, config.data.train_batch_size
        if config.data.val_files:  # whose answers are not cut, and whose batches are as large as all of it
            response, prompts = rollout.response_length, max(prompts, config.data.val_batch_size or most)
    split = actor.ulysses_sequence_parallel_size
    rows = max(1, prompts * rollout.n // config.data_parallel_size)
    longest = rollout.prompt_length + response - 1  # the last token is predicted and never read
    whole = rows * longest
    tokens = min(rows, max_rows) * longest if max_rows and not by_tokens else min(most * split, whole)
    scored = min(tokens, -(-tokens // longest) * response)
    return Micro(-(-tokens // split), -(-scored // split), tokens == whole)


def saved_by_block(shape: ModelShape, tokens: int, compute: int, device: str, adapter: int = 0) -> int:
    """Bytes that backward needs of one block: what transformers' decoders of the Llama and Qwen families keep.

    A norm keeps its input in fp32 and, where its weight is trained, the normed input; the layer after it keeps the
    norm's output. SiLU keeps its input, the products in the MLP both factors, ``down_proj`` its input. Attention keeps
    queries, keys, values, its output, and a sum for each head; the row-wise kernel's output is joined to another tensor
    (`ops.attention`). Layers with an adapter keep the narrow vector too.
    """
    normed = 0 if adapter else compute
    norms = 2 * shape.hidden * (FP32 + normed + compute)
    if shape.head_norms:
        norms += (shape.queries + shape.keys) * (FP32 + normed)
    attention = compute * (shape.queries * (2 if device == "cuda" else 3) + 2 * shape.keys) + FP32 * shape.heads
    layers = sum(len(of_name) for of_name in shape.linear.values()) // max(1, shape.blocks)
    return tokens * (norms + attention + 4 * shape.inner * compute + layers * adapter * compute)


def activations(shape: ModelShape, config: PPOConfig, tokens: int, device: str) -> tuple[int, int]:
    """Bytes of a block that wait for backward, and bytes that are computed again there, for one block at a time.

    With gradient checkpointing the block's input waits; offloaded it waits in host memory.
    """
    model = config.actor_rollout_ref.model
    compute = itemsize(config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype, device)
    saved = saved_by_block(shape, tokens, compute, device, model.lora_rank)
    if not model.enable_gradient_checkpointing:
        return saved, 0
    offloads = model.enable_activation_offload and device == "cuda"
    return 0 if offloads else tokens * shape.hidden * compute, saved


def work_of_forward(shape: ModelShape, tokens: int, compute: int, adapter: int = 0) -> int:
    """Bytes that live while a block is computed: in the MLP, where they are most, gate, up and their product; and the
    residual, the MLP's input and two more of D. An adapter's part comes on top."""
    return tokens * compute * ((4 if adapter else 3) * shape.inner + 4 * shape.hidden)


def work_of_backward(shape: ModelShape, tokens: int, compute: int, adapter: int = 0) -> int:
    """The same in backward, beside what the block keeps: in the MLP the gradients of the product and its two factors
    take the place of ``down_proj``'s input; with the gradient of its weight."""
    weight = 0 if adapter else shape.hidden * shape.inner * compute
    return tokens * compute * (2 * shape.inner + 2 * shape.hidden) + weight


def head_chunk(shape: ModelShape, scored: int, compute: int, device: str, free: int | None, teachers: int) -> int:
    """Buffers of a chunk of logits (`linear_log_prob.rows_per_chunk`).

    On the CPU the student's, one for each model of a teacher, one in half precision. On CUDA all that are counted
    there, as many bytes as a 16th of what is free, within limits.

    Args:
        free: bytes of the card that nothing else takes; None: unknown.
        teachers: models of the teacher, 2 of a stitched one; 0 where none is compared with.
    """
    row = shape.rows * FP32
    if device == "cuda":
        buffers = linear_divergence.BUFFERS if teachers else ops.BUFFERS
        return min(scored * row * buffers, max(ops.CHUNK_BYTES, min(ops.MOST_CUDA_CHUNK_BYTES, (free or 0) // 16)))
    rows = max(1, min(max(ops.LEAST_ROWS, ops.CACHED_BYTES // row), ops.CHUNK_BYTES // (ops.CPU_BUFFERS * row)))
    whole = min(scored, rows) * row
    blocks = (linear_divergence.BUFFERS if teachers else ops.BUFFERS) - 1 - teachers  # of a part of the rows
    half = 0 if compute == FP32 else whole // 2
    return whole * (1 + teachers) + half + blocks * min(ops.CACHED_BYTES, whole)


# ------------------------------------------------------------------ passes of a rank


class Teachers(NamedTuple):
    """Frozen models as the update of a divergence objective meets them."""

    models: Sequence[tuple[ModelShape, RankShare]] = ()
    """Those whose whole distributions it needs."""
    compared: int = 0
    """Buffers of logits for them: 2 where a teacher is stitched, 0 where nothing is compared."""
    run_here: bool = True
    """On the student's ranks; from others the head comes, with hidden states."""


def peak_of_scoring(
    shape: ModelShape, share: RankShare, micro: Micro, compute: int, chunk: int, adapter: int = 0
) -> int:
    """The most in addition to weights in a pass without gradient: in a block, or after them in the head."""
    states = 2 * micro.scored * shape.hidden * compute
    return share.ends + max(share.block + work_of_forward(shape, micro.tokens, compute, adapter), states + chunk)


def peaks_of_update(
    shape: ModelShape, share: RankShare, config: PPOConfig, micro: Micro, device: str, chunk: int, teachers: Teachers
) -> dict[str, int]:
    """What lives in addition to parameters and moments, at each moment of a mini-batch that may be its peak."""
    model, fsdp = config.actor_rollout_ref.model, config.actor_rollout_ref.actor.fsdp_config
    compute = itemsize(fsdp.mixed_precision.param_dtype, device)
    reduced = itemsize(fsdp.mixed_precision.reduce_dtype, device)
    tokens, states = micro.tokens, micro.scored * shape.hidden * compute
    trains_ends = not model.lora_rank or model.lora_extended_rows
    kept, again = activations(shape, config, tokens, device)
    ends, head = trains_ends * shape.ends, trains_ends * shape.rows * shape.hidden
    # In the first micro-batch gradients come block by block, and that of the ends last.
    before, at_end = share.gradients, share.gradients
    if micro.is_only:
        before, at_end = 0, share.gradients - ends * FP32 // shards(fsdp, config.trainer.world_size)
    # Teachers run before the student; their heads and hidden states wait until its own are there.
    asked = [peak_of_scoring(of, its, micro, compute, 0) - its.ends for of, its in teachers.models]
    waiting = sum(micro.scored * of.hidden * compute + its.ends for of, its in teachers.models)
    in_block = share.block + work_of_backward(shape, tokens, compute, model.lora_rank) + again
    in_head = 2 * states + chunk + head * (FP32 + (compute if compute != FP32 else 0))  # its gradient, fp32 and rounded
    gathered = share.ends + (2 + shape.tied) * head * compute  # where head and embedding are one, two are added up
    return {
        "teachers": before + waiting + max(asked, default=0) * teachers.run_here,
        "head": before + waiting + share.ends + shape.blocks * kept + in_head,
        "first block": before + waiting + share.ends + shape.blocks * kept + head * compute + in_block,
        "last block": at_end + waiting + share.ends + kept + head * compute + in_block,
        "ends": at_end + waiting + max(gathered, ends * (compute + reduced), ends * reduced * 2),
        "optimizer": share.gradients + waiting,
    }
