"""The run: resources, steps, logging, checkpoints (``trainer``)."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from verl.config import schema
from verl.config.best_rule import BestRule, Bound, parse_kept
from verl.config.schema import Count, IsListed, NonNegativeFloat, PositiveFloat, Texts, TextsOrNull, UserPath, section

VocabCheck = Annotated[
    Literal["strict", "warn", "off"],
    BeforeValidator(lambda value: "off" if value is False else value),  # what YAML makes of a bare off
]


@section("trainer")
class TrainerConfig:
    """Length, cadence and outputs of a run."""

    project_name: str = "kai-verl"
    """Project in the experiment loggers."""
    experiment_name: str = "default"
    """Run in the experiment loggers."""
    logger: Annotated[list[Literal["console", "wandb", "tensorboard", "file"]], IsListed] = field(
        default_factory=lambda: ["console"]
    )
    """Where metrics go."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """``auto``: CUDA where there is one, else the CPU."""
    nnodes: Count = 1
    """Machines."""
    n_gpus_per_node: Count = 1
    """Training ranks per machine: GPUs, or processes on CPU."""
    teacher_nnodes: Count | None = None
    """Machines of a teacher with GPUs of its own; null: the teacher shares the student's ranks."""
    teacher_n_gpus_per_node: Count | None = None
    """Ranks per machine of a teacher with GPUs of its own; goes with ``teacher_nnodes``."""
    rollout_nnodes: Count | None = None
    """Machines of engines with GPUs of their own; null: engines run beside the student's ranks."""
    rollout_n_gpus_per_node: Count | None = None
    """GPUs of engines on each of these machines (on CPU: engines, in place of ``rollout.cpu_engines``); goes with
    ``rollout_nnodes``."""
    rollout_weight_sync: Literal["object_store", "broadcast"] = "object_store"
    """How weights get to engines with GPUs of their own: through Ray's object store, or from rank 0 by NCCL (by gloo on
    CPU)."""
    max_staleness: Annotated[int, Field(ge=0)] = 0
    """How many steps the weights that wrote an answer may be behind those that it trains. 0: engines and ranks take
    turns. 1: engines write the next batch while this one trains. More: they get weights once in so many steps, which
    evens out batches that take longer than others; see ``trainer.ppo.rollout_queue``."""
    total_epochs: Count = 1
    """Passes over the training prompts."""
    total_training_steps: Count | None = None
    """Steps of the run; null: ``total_epochs`` times the steps of an epoch."""
    save_freq: int = -1
    """Steps between checkpoints; -1: none, but the best ones of ``best_metric``."""
    test_freq: int = -1
    """Steps between validations, one after the last step too; -1: none, but that of ``val_before_train``."""
    val_before_train: bool = True
    """Validate the starting model; a run that goes on from a checkpoint has done so."""
    val_only: bool = False
    """Validate and stop."""
    check_only: bool = False
    """Check settings, models, vocabularies and data as a run does before it starts Ray, and stop."""
    default_local_dir: UserPath = ""
    """Folder of the checkpoints and of ``metrics.jsonl``; empty: ``checkpoints/<project_name>/<experiment_name>``."""
    rollout_data_dir: UserPath | None = None
    """Folder that receives every step's answers as ``<step>.jsonl``, and what is known of each of their tokens as
    ``<step>.tokens.parquet`` (docs/metrics.md, "What a run records of its tokens"); null: none."""
    validation_data_dir: UserPath | None = None
    """The same for validation."""
    max_actor_ckpt_to_keep: Count | None = None
    """Newest whole checkpoints that stay; null: all. A new one is written before the oldest goes."""
    best_metric: str | None = None
    """The rule by which a validation is the best one: ``NAME [max|min] [subject to NAME >= X [of step 0] [and ...]]``,
    such as ``val/general_*/reward subject to val/rec_*/reward >= 0.98 of step 0``; see ``config.best_rule``. The best
    step is saved even where no checkpoint is due, kept beyond ``max_actor_ckpt_to_keep``, and its model is
    ``best/huggingface``. null: no rule."""
    stop_after_no_better: Count | None = None
    """End the run after so many validations in a row that are no better by ``best_metric``; null: never."""
    keep: TextsOrNull = field(default_factory=list)
    """Bounds on metrics of validation, ``NAME >= X [of step 0] [by GROUP]``, that training keeps by the mixture of its
    batches: ``val/rec_*/reward >= 0.98 of step 0`` raises the share of ``rec_*``, a group of ``data.source_weights``,
    while the metric is below its bound, and lowers it while it is above; see ``trainer.ppo.keep``. ``by`` is for groups
    with other names than the metric's sources. Empty: shares stay as they are."""
    keep_rate: PositiveFloat = 10.0
    """How fast shares move: log-odds for each validation that misses its bound, times the part of it that is missing.
    Noisy validations want less, few validations more."""
    async_save: bool = True
    """Write checkpoints while training goes on, at most one at a time; until it is written, a copy of parameters and
    optimizer state takes host memory. False: training waits. A save that fails (disk full, no permission) is logged
    and counted (``training/failed_saves``) and training goes on; a run whose last save failed ends in an error. Earlier
    checkpoints stay."""
    resume_mode: Literal["auto", "disable", "resume_path"] = "auto"
    """``auto`` (the newest checkpoint in ``default_local_dir``), ``disable`` or ``resume_path``."""
    resume_from_path: UserPath | None = None
    """Checkpoint folder for ``resume_mode=resume_path``."""
    resume_allow_changed: Texts = field(default_factory=list)
    """What may differ from the checkpoint that is resumed though it changes what is trained: keys or sections, such as
    ``algorithm.distill_adv_max_clip`` or ``data`` (whose position then starts over), and ``student.weights``,
    ``teacher``, ``vocabulary``."""
    grace_s: NonNegativeFloat = 120.0
    """Seconds that the run has after SIGTERM or Ctrl-C to finish its step and save it; then, or at a second signal, it
    ends at once. Ending the processes takes some seconds more. With ``max_staleness`` the save waits for the answers of
    up to so many batches that are begun."""
    vocab_check: VocabCheck = "strict"
    """What to do where the vocabularies of student and teacher do not fit together: ``strict`` (stop), ``warn``, or
    ``off`` (do not compare them)."""
    balance_batch: bool = True
    """Give every rank about as many tokens."""
    max_skipped_updates: Annotated[int, Field(ge=0)] | None = 10
    """Updates that may be skipped because their loss or gradient is not finite, before the run ends; null: any number.
    Ten updates that are taken make up for one that is skipped, so rare bad rows never end a long run."""
    canary_tolerance: NonNegativeFloat | None = 0.5
    """Largest change, in nats, of the log-probs that a teacher gives to fixed tokens, between the run's first start and
    any checkpoint or resume (``distill/teacher_canary``); beyond it the run ends, as the teacher's weights must have
    changed. null: not checked. Within a run the change is about 0; a resume on other GPUs, ranks or attention can
    change single bf16 log-probs by tenths of a nat, and wrong weights change some by nats."""
    engine_gap_bound: NonNegativeFloat | None = 0.1
    """Mean |difference| in nats between the engine's and the trainer's log-probs of sampled tokens
    (``distill/engine_gap``) beyond which a step is reported; null: never. Usual are 0.01 to 0.06 for bf16 engines and
    below 1e-4 for fp32; a head that a sync did not update gave 1.9."""
    log_val_generations: int = 0
    """Validation answers printed with each validation, and shown in TensorBoard and Weights & Biases."""
    timeline: bool = False
    """Append the driver's stages and the spans in which engines write to ``timeline.json`` in ``default_local_dir``,
    which https://ui.perfetto.dev shows."""
    ray_timeline_dir: UserPath | None = None
    """Folder that receives Ray's timeline at the end; null: none."""

    def __post_init__(self) -> None:
        self.default_local_dir = self.default_local_dir or f"checkpoints/{self.project_name}/{self.experiment_name}"
        if self.resume_mode == "resume_path" and not self.resume_from_path:
            raise ValueError(
                "trainer.resume_mode=resume_path needs trainer.resume_from_path; name a checkpoint's folder"
            )
        for whose, nodes, gpus in (
            ("teacher", self.teacher_nnodes, self.teacher_n_gpus_per_node),
            ("rollout", self.rollout_nnodes, self.rollout_n_gpus_per_node),
        ):
            if (nodes is None) != (gpus is None):
                raise ValueError(
                    f"trainer.{whose}_nnodes={nodes} and trainer.{whose}_n_gpus_per_node={gpus} go together; set both "
                    "for GPUs of its own, or neither"
                )
        if self.rollout_weight_sync == "broadcast" and self.rollout_nnodes is None:
            raise ValueError(
                "trainer.rollout_weight_sync=broadcast is for engines with GPUs of their own: set "
                "trainer.rollout_nnodes and trainer.rollout_n_gpus_per_node, or this to object_store"
            )
        rules = {"stop_after_no_better": "best_metric", "keep_rate": "keep"}
        for name, (value, _) in schema.changed(self, *rules).items():
            if not getattr(self, rule := rules[name]):
                raise ValueError(f"trainer.{name}={value} has no effect without trainer.{rule}; set both, or neither")
        for rule, (_, of_start) in self.rules.items():
            if self.test_freq < 1 and not self.val_only:
                raise ValueError(
                    f"{rule} compares validations; set trainer.test_freq={self.test_freq} to the steps between"
                )
            if of_start and not (self.val_before_train or self.val_only):
                raise ValueError(
                    f"{rule} compares with step 0, and trainer.val_before_train=False leaves it out; set it to True"
                )

    @property
    def rules(self) -> dict[str, tuple[list[str], bool]]:
        """Of each rule about validations, as key and value, what it reads, and whether it compares with step 0."""
        rules = {f"trainer.keep={text!r}": ([bound.name], bound.of_start) for text, bound, _ in self.kept}
        if self.best_metric:
            best = BestRule.parse(self.best_metric)
            rules[f"trainer.best_metric={self.best_metric!r}"] = best.names, bool(best.names_of_start)
        return rules

    @property
    def kept(self) -> list[tuple[str, Bound, str]]:
        """Text, bound and group of each entry of ``keep``."""
        return [parse_kept(text) for text in self.keep]

    @property
    def saves_checkpoints(self) -> bool:
        """Whether the run writes any."""
        return self.save_freq > 0 or bool(self.best_metric)

    @property
    def timeline_file(self) -> Path | None:
        """Where ``timeline`` is written; None: nowhere."""
        return Path(self.default_local_dir, "timeline.json") if self.timeline else None

    @property
    def data_may_change(self) -> bool:
        """Whether a resumed run may start over in other training data: it is allowed, or no step is taken."""
        return self.val_only or any(key.partition(".")[0] == "data" for key in self.resume_allow_changed)

    @property
    def world_size(self) -> int:
        """The student's ranks over all machines."""
        return self.nnodes * self.n_gpus_per_node

    @property
    def teacher_ranks_on_nodes(self) -> list[int]:
        """Ranks of a teacher with GPUs of its own, machine by machine; empty where it shares the student's."""
        return [self.teacher_n_gpus_per_node or 0] * (self.teacher_nnodes or 0)

    @property
    def rollout_gpus_on_nodes(self) -> list[int]:
        """GPUs of engines with GPUs of their own, machine by machine; empty where they share the student's."""
        return [self.rollout_n_gpus_per_node or 0] * (self.rollout_nnodes or 0)
