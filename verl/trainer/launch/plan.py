"""What a run will take of memory, stage by stage, before anything starts; and what would lower it.

In:  a ``PPOConfig`` and the shapes of its models (``memory``). Out: bytes of each part on a rank and in an engine; the
most that each stage holds, of a GPU, or of a node without GPUs; changes of settings with what each would save; an error
for a run that cannot fit, whatever its data. Peaks of engines, and all of CUDA, are computed and were never measured.

Not here: the batch in the driver; the half GiB that each process takes of a GPU beside its tensors.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

from verl.config import BASE_TEACHER, PPOConfig
from verl.config.model import Precision
from verl.trainer.launch.memory import (
    FP32,
    Micro,
    ModelShape,
    RankShare,
    Teachers,
    activations,
    frozen_share,
    head_chunk,
    itemsize,
    largest_micro_batch,
    peak_of_scoring,
    peaks_of_update,
    read_shape,
    trained_share,
)
from verl.utils.device import card_bytes
from verl.weight_sync import DEFAULT_BUCKET_MB

logger = logging.getLogger(__name__)

GIB = 2**30
SCORED = "log_prob_max_token_len_per_gpu"
MOST_TOKENS = ("actor.ppo_max_token_len_per_gpu", f"rollout.{SCORED}", f"ref.{SCORED}")
STAGES = ("start", "generate", "score", "update", "sync", "save")
RANK, ENGINE, TEACHER_RANK = "training rank", "engine", "teacher rank"


class EngineShare(NamedTuple):
    """An engine on each of its devices, in bytes."""

    weights: int
    cache: int
    row: int
    """Of the cache, for the longest prompt with its answer."""
    per_node: int


@dataclass
class MemoryPlan:
    """Bytes by holder and part, and by stage and holder. A GPU holds a training rank and its part of an engine, or a
    teacher rank; a node without GPUs holds all of its processes."""

    device: str
    counts: dict[str, int]
    """Each holder's processes on a node."""
    micro: Micro
    """Of the student's update."""
    engine: EngineShare
    parts: dict[str, dict[str, int]]
    stages: dict[str, dict[str, int]]
    """By stage, the most that each holder has at once."""
    host: dict[str, int]
    """On CUDA, what the memory of a node holds."""
    least: int
    """Weights, gradients and moments on a GPU, in the stage that has most of them."""
    engines_apart: bool = False
    """Whether engines have GPUs, or nodes, of their own."""

    def peak(self, stage: str) -> int:
        """Most bytes that a stage holds, on a GPU or on a node without GPUs."""
        times = dict.fromkeys(self.counts, 1) if self.device == "cuda" else self.counts
        held = {holder: times[holder] * size for holder, size in self.stages[stage].items()}
        apart = held.pop(ENGINE) if self.engines_apart else 0
        if self.device == "cuda":
            return max(held[RANK] + held.get(ENGINE, 0), held.get(TEACHER_RANK, 0), apart)
        return max(sum(held.values()), apart)

    @property
    def highest(self) -> str:
        """The stage with the highest peak."""
        return max(STAGES, key=self.peak)


Measure = Callable[[MemoryPlan], int]
"""Bytes of a plan to compare it by."""


def read_shapes(config: PPOConfig) -> dict[str, ModelShape]:
    """The shapes of a run's models, by path."""
    return {path: read_shape(path, config.actor_rollout_ref.model) for path in {*_paths(config).values()}}


def _paths(config: PPOConfig) -> dict[str, str]:
    """Paths of student and frozen models, by role."""
    models, algorithm = config.actor_rollout_ref, config.algorithm
    own = {BASE_TEACHER: models.ref.model.path, **{name: of.path for name, of in algorithm.distill.teachers.items()}}
    roles = algorithm.distill.roles if algorithm.distils else [BASE_TEACHER] * config.has_kl_term
    here = [role for role in roles if role not in config.served_roles]  # servers take no memory of the run
    return {role: str(own.get(role) or models.model.path) for role in ("actor", *here)}


def _frozen_models(config: PPOConfig) -> list[tuple[str, Precision]]:
    """Path and precision of each frozen model that a rank loads: one that roles share once; the student with its
    adapter switched off is none (`TeacherWorker.init_model`)."""
    (_, student), *frozen = _paths(config).items()
    model, teachers = config.actor_rollout_ref.model, config.algorithm.distill.teachers
    free = model.lora_rank and not model.lora_extended_rows and not config.teacher_ranks_on_nodes
    emas = {role: teachers[role].ema if role in teachers else None for role, _ in frozen}
    own = [(role, path) for role, path in frozen if not (free and path == student)]
    files = {(path, config.knows_extended(role), emas[role]) for role, path in own}
    stored = config.actor_rollout_ref.ref.fsdp_config.model_dtype
    return [(path, stored if ema is None else "fp32") for path, _, ema in sorted(files, key=str)]


def plan_engine(config: PPOConfig, shape: ModelShape, device: str, card: int | None) -> EngineShare:
    """On CUDA vLLM takes ``gpu_memory_utilization`` of the card, and gives its cache what is left of that. Without a
    card, and for ``hf``, the cache is what the rows that are written at once can fill."""
    rollout, run = config.actor_rollout_ref.rollout, config.trainer
    each, split = itemsize(rollout.dtype, device), rollout.tensor_model_parallel_size
    weights, longest = shape.weights * each // split, rollout.prompt_length + rollout.response_length
    row = 2 * shape.blocks * shape.keys * longest * each // split
    gpus, nodes = run.rollout_n_gpus_per_node or run.n_gpus_per_node, run.rollout_nnodes or run.nnodes
    per_node = (run.rollout_n_gpus_per_node or rollout.cpu_engines) if device == "cpu" else max(1, gpus // split)
    rows = -(-config.data.train_batch_size * rollout.n // (nodes * per_node))
    cache = min(rows, rollout.max_num_seqs) * row
    if rollout.name == "vllm" and device == "cpu":
        cache = int(rollout.cpu_kvcache_space_gb * GIB)
    elif rollout.name == "vllm" and card is not None:
        cache = max(0, int(rollout.gpu_memory_utilization * card) - weights)
    return EngineShare(weights, cache, row, per_node)


class _Rank:
    """A training rank with its teachers, which may have ranks of their own; bytes.

    What stays on the device between stages, and what comes for one, is that of `StudentWorker.move` and
    `TeacherWorker._move`.
    """

    def __init__(self, config: PPOConfig, shapes: Mapping[str, ModelShape], device: str, card: int | None) -> None:
        models, run, distill = config.actor_rollout_ref, config.trainer, config.algorithm.distill
        fsdp, of_ref, is_cuda = models.actor.fsdp_config, models.ref.fsdp_config, device == "cuda"
        self._config, self._device, self._card = config, device, card
        self._compute = itemsize(fsdp.mixed_precision.param_dtype, device)
        self.shape, self.apart = shapes[str(models.model.path)], sum(config.teacher_ranks_on_nodes)
        self.own = trained_share(self.shape, config, device)
        of_frozen, ranks = _frozen_models(config), self.apart or run.world_size
        self._frozen = [
            (shapes[path], frozen_share(shapes[path], replace(of_ref, model_dtype=stored), device, ranks))
            for path, stored in of_frozen
        ]
        self.teachers = sum(share.parameters for _, share in self._frozen)
        self._met = Teachers(compared=int(config.algorithm.distils and distill.is_divergence))
        if self._met.compared and distill.needs_full_distribution:
            stitched = any(teacher.is_stitched for teacher in distill.teachers.values())
            # Of a model on other ranks the head comes alone.
            heads = [(of, its._replace(ends=of.rows * of.hidden * self._compute)) for of, its in self._frozen]
            self._met = Teachers(heads if self.apart else self._frozen, 1 + stitched, not self.apart)
        self._moved = is_cuda * fsdp.param_offload * self.own.parameters
        self.moved = self._moved + is_cuda * fsdp.optimizer_offload * self.own.moments
        self.moved_teachers = is_cuda * of_ref.param_offload * self.teachers
        self.stays = self.own.parameters + self.own.moments + (0 if is_cuda else self.own.rows) - self.moved
        self.stays += 0 if self.apart else self.teachers - self.moved_teachers

    def _chunk(self, shape: ModelShape, micro: Micro, used: int, compared: int = 0) -> int:
        return head_chunk(shape, micro.scored, self._compute, self._device, self._card and self._card - used, compared)

    def _scores(self, shape: ModelShape, share: RankShare, micro: Micro, adapter: int = 0) -> int:
        return peak_of_scoring(shape, share, micro, self._compute, self._chunk(shape, micro, self.stays), adapter)

    def student_scores(self) -> int:
        """Bytes in addition to what stays."""
        micro = largest_micro_batch(self._config, "score")
        return self._moved + self._scores(self.shape, self.own, micro, self._config.actor_rollout_ref.model.lora_rank)

    def teachers_score(self) -> int:
        """Bytes in addition to what stays: the most of one teacher, its offloaded weights with it (of a stitched one
        those of both models), for they score one after the other.
        """
        micro, offloads = largest_micro_batch(self._config, "ref"), self.moved_teachers > 0
        stitched = any(teacher.is_stitched for teacher in self._config.algorithm.distill.teachers.values())
        come = [self.moved_teachers if stitched else offloads * share.parameters for _, share in self._frozen]
        return max((more + self._scores(*of, micro) for more, of in zip(come, self._frozen, strict=True)), default=0)

    def update(self) -> tuple[int, int]:
        """The most in an update, and the bytes of a chunk of logits in it."""
        micro = largest_micro_batch(self._config, "update")
        meets = self._met.models and not self.apart
        used = self.stays + self.moved + (self.moved_teachers if meets else 0)

        def most(chunk: int) -> int:
            peaks = peaks_of_update(self.shape, self.own, self._config, micro, self._device, chunk, self._met)
            return used + max(peaks.values())

        chunk = self._chunk(self.shape, micro, most(0), self._met.compared)
        return most(chunk), chunk


def plan_memory(
    config: PPOConfig, shapes: Mapping[str, ModelShape], device: str, card: int | None = None
) -> MemoryPlan:
    """The plan of a run on ``cuda`` or ``cpu``.

    Args:
        shapes: of `read_shapes`.
        card: bytes of a GPU; None: unknown.
    """
    run, rollout, is_cuda = config.trainer, config.actor_rollout_ref.rollout, device == "cuda"
    rank, micro = _Rank(config, shapes, device, card), largest_micro_batch(config, "update")
    own, stays, engine = rank.own, rank.stays, plan_engine(config, rank.shape, device, card)
    exported = rank.shape.weights * itemsize(rollout.dtype, device)
    largest = rank.shape.rows * rank.shape.hidden * exported // rank.shape.weights  # is a bucket of its own, if need be
    bucket = max(largest, min(exported, (rollout.weight_sync_bucket_mb or DEFAULT_BUCKET_MB[device]) * 2**20))
    buckets = min(exported, 2 * bucket) + (0 if is_cuda else bucket)  # there a file, and tensors while it is written
    has_adapter = config.actor_rollout_ref.model.lora_rank > 0  # whose merged weights are copied too
    copied = own.parameters + own.moments + has_adapter * exported // run.world_size
    updating, chunk = rank.update()
    # The copy is in host memory; where training goes on meanwhile, it is beside that.
    saving = stays + rank.moved if is_cuda else copied + (updating if run.async_save else stays)
    kept, again = activations(rank.shape, config, micro.tokens, device)
    whole, apart = engine.weights + engine.cache, bool(run.rollout_gpus_on_nodes)  # apart they never sleep
    asleep = whole * (apart or not (is_cuda and rollout.free_cache_engine))
    stages = {
        "start": {RANK: stays, ENGINE: whole},
        "generate": {RANK: stays, ENGINE: whole},
        "score": {RANK: stays + max(rank.student_scores(), 0 if rank.apart else rank.teachers_score()), ENGINE: asleep},
        "update": {RANK: updating, ENGINE: asleep},
        "sync": {RANK: stays + buckets, ENGINE: max(asleep, engine.weights)},
        "save": {RANK: saving, ENGINE: asleep},
    }
    of_rank = {
        "parameters": own.parameters,
        "gradients": own.gradients,
        "moments": own.moments,
        "frozen teachers": 0 if rank.apart else rank.teachers,
        "copy of embedding and head": 0 if is_cuda else own.rows,
        "gathered weights": own.ends + own.block,
        "saved activations": rank.shape.blocks * kept + again,
        "logits of a chunk": chunk,
        "buckets of a sync": buckets,
    }
    counts = {RANK: run.n_gpus_per_node, ENGINE: engine.per_node}
    parts = {RANK: of_rank, ENGINE: {"weights of the engine": engine.weights, "KV cache": engine.cache}}
    if rank.apart:
        counts[TEACHER_RANK], parts[TEACHER_RANK] = run.teacher_n_gpus_per_node or 0, {"frozen teachers": rank.teachers}
        for stage, held in stages.items():
            held[TEACHER_RANK] = rank.teachers - rank.moved_teachers
            held[TEACHER_RANK] += rank.teachers_score() if stage == "score" else 0
    host = {
        "the largest model, as rank 0 reads it": max(shape.weights for shape in shapes.values()) * FP32,
        "copy of embedding and head": own.rows * run.n_gpus_per_node,
        "offloaded weights and moments": (rank.moved + rank.moved_teachers) * run.n_gpus_per_node,
        "a checkpoint being written": copied * run.n_gpus_per_node,
    }
    beside = 0 if apart else engine.weights
    least = max(own.parameters + own.gradients + own.moments + min(asleep, beside), stays + beside)
    return MemoryPlan(device, counts, micro, engine, parts, stages, host if is_cuda else {}, least, apart)


# ------------------------------------------------------------------ what would help


def _changes(config: PPOConfig) -> list[dict[str, Any]]:
    """Settings that may lower a peak, those of a line together; where they are so already they change nothing."""
    models, gpus = config.actor_rollout_ref, config.trainer.n_gpus_per_node
    longest = models.rollout.prompt_length + models.rollout.response_length
    alone = {
        "model.lora_rank": models.model.lora_rank or 16,
        "model.enable_gradient_checkpointing": True,
        "model.enable_activation_offload": True,
        "actor.fsdp_config.optimizer_offload": True,
        "actor.fsdp_config.param_offload": True,
        "ref.fsdp_config.param_offload": True,
        "rollout.gpu_memory_utilization": 0.3,
        "rollout.weight_sync_bucket_mb": 512,
    }
    together = [
        {"trainer.n_gpus_per_node": 2 * gpus},
        {"trainer.teacher_nnodes": 1, "trainer.teacher_n_gpus_per_node": 1},
    ]
    tokens = {f"actor_rollout_ref.{key}": longest for key in MOST_TOKENS}
    return [*({f"actor_rollout_ref.{key}": value} for key, value in alone.items()), tokens, *together]


def what_helps(
    config: PPOConfig, shapes: Mapping[str, ModelShape], device: str, card: int | None, measure: Measure
) -> list[tuple[str, int]]:
    """Changes of settings, as overrides, and the measure with each of them alone; the lowest first, without those that
    lower it by less than a hundredth."""
    most, found = measure(plan_memory(config, shapes, device, card)), []
    for values in _changes(config):
        other = copy.deepcopy(config)
        for key, value in values.items():
            *sections, name = key.split(".")
            setattr(reduce(getattr, sections, other), name, value)
        words = " ".join(f"{key}={value}" for key, value in values.items())
        found.append((words, measure(plan_memory(other, shapes, device, card))))
    return sorted((pair for pair in found if pair[1] < 0.99 * most), key=lambda pair: pair[1])


def check_fits(config: PPOConfig) -> None:
    """Refuse a run on this machine's GPUs whose weights, gradients and moments alone are more than one of them holds.

    Raises:
        ValueError: it is such a run; with what would lower that, and to what.
    """
    if (card := card_bytes()) is None:
        return
    try:
        shapes = read_shapes(config)
    except (AttributeError, OSError, ValueError) as error:  # entries that a family lacks, or files
        logger.warning("no plan of the run's memory: %s", error)
        return
    if (least := plan_memory(config, shapes, "cuda", card).least) <= card:
        return
    fixes = what_helps(config, shapes, "cuda", card, lambda plan: plan.least)
    raise ValueError(
        f"actor_rollout_ref.model.path={config.actor_rollout_ref.model.path} does not fit: weights, gradients and "
        f"moments alone are {least / GIB:.1f} GiB on a GPU of {card / GIB:.1f} GiB; set "
        + ", or ".join(f"{words} ({size / GIB:.1f} GiB)" for words, size in fixes)
        + "; kai-verl plan with the same settings shows the whole"
    )
