"""The run: resources, steps, logging, checkpoints (``trainer``)."""

from dataclasses import dataclass, field

from verl.config.best_rule import BestRule

LOGGERS = ("console", "wandb", "tensorboard", "file")
VOCAB_CHECKS = ("strict", "warn", "off")


@dataclass
class TrainerConfig:
    """Length, cadence and outputs of a run."""

    project_name: str = "kai-verl"
    """Project in the experiment loggers."""
    experiment_name: str = "default"
    """Run in the experiment loggers."""
    logger: list[str] = field(default_factory=lambda: ["console"])
    """Any of ``console``, ``wandb``, ``tensorboard``, ``file``."""
    device: str = "auto"
    """``auto`` (CUDA where there is one, else CPU), ``cuda`` or ``cpu``."""
    nnodes: int = 1
    """Machines."""
    n_gpus_per_node: int = 1
    """Training ranks per machine: GPUs, or processes on CPU."""
    teacher_nnodes: int | None = None
    """Machines of a teacher with GPUs of its own; null: the teacher shares the student's ranks."""
    teacher_n_gpus_per_node: int | None = None
    """Ranks per machine of a teacher with GPUs of its own; goes with ``teacher_nnodes``."""
    total_epochs: int = 1
    """Passes over the training prompts."""
    total_training_steps: int | None = None
    """Steps of the run; null: ``total_epochs`` times the steps of an epoch."""
    save_freq: int = -1
    """Steps between checkpoints; -1: none."""
    test_freq: int = -1
    """Steps between validations; -1: none."""
    val_before_train: bool = True
    """Validate the starting model; a run that goes on from a checkpoint has done so."""
    val_only: bool = False
    """Validate and stop."""
    default_local_dir: str = ""
    """Folder of the checkpoints and of ``metrics.jsonl``; empty: ``checkpoints/<project_name>/<experiment_name>``."""
    rollout_data_dir: str | None = None
    """Folder that receives every training rollout as JSONL; null: none."""
    validation_data_dir: str | None = None
    """The same for validation."""
    max_actor_ckpt_to_keep: int | None = None
    """Newest whole checkpoints that stay; null: all. A new one is written before the oldest goes."""
    best_metric: str | None = None
    """The rule by which a validation is the best one: ``NAME [max|min] [subject to NAME >= X [of step 0] [and ...]]``,
    such as ``val/general_*/reward subject to val/rec_*/reward >= 0.98 of step 0``; see ``config.best_rule``. The best
    checkpoint stays whatever ``max_actor_ckpt_to_keep`` says, and its model is ``best/huggingface``; a best step at
    which none is due is saved all the same. null: no rule."""
    stop_after_no_better: int | None = None
    """End the run after so many validations in a row that are no better by ``best_metric``; null: never."""
    async_save: bool = True
    """Write checkpoints while training goes on, at most one at a time; until it is written, a copy of parameters and
    optimizer state takes host memory. False: training waits. Either way a save that fails (no room, no right to write)
    is said and counted (``training/failed_saves``) and training goes on; a run whose last save failed ends in an
    error. What was whole before stays."""
    resume_mode: str = "auto"
    """``auto`` (the newest checkpoint in ``default_local_dir``), ``disable`` or ``resume_path``."""
    resume_from_path: str | None = None
    """Checkpoint folder for ``resume_mode=resume_path``."""
    resume_allow_changed: list[str] = field(default_factory=list)
    """What may differ from the checkpoint that is resumed though it changes what is trained: keys or sections, such as
    ``algorithm.distill_adv_max_clip`` or ``data`` (whose position then starts over), and ``student.weights``,
    ``teacher``, ``vocabulary``."""
    grace_s: float = 120.0
    """Seconds that the first SIGTERM or Ctrl-C leaves the run to finish its step and save it; at their end, or at a
    second signal, it leaves at once. Ending the processes takes some seconds more."""
    vocab_check: str | bool = "strict"
    """What to do where the vocabularies of student and teacher do not fit together: ``strict`` (stop), ``warn`` (say
    so) or ``off`` (do not look)."""
    balance_batch: bool = True
    """Give every rank about as many tokens."""
    max_skipped_updates: int | None = 10
    """Updates that may be skipped because their loss or gradient is not finite, before the run ends; 0: none, null: any
    number. Ten that are taken make up for one that is skipped, so that a bad row now and then never ends a long run."""
    canary_tolerance: float | None = 0.5
    """Largest change, in nats, of a log-prob that a teacher gives to some fixed tokens, between the run's first start
    and any checkpoint or resume; beyond it the run ends, for the teacher's weights went wrong. null: not looked at. In
    one run the same tokens in the same layout score alike, to the bit or nearly (``distill/teacher_canary``); a resume
    on other GPUs, ranks or attention may round single bf16 log-probs otherwise by tenths of a nat, and weights that
    went wrong move some by nats."""
    engine_gap_bound: float | None = 0.1
    """Mean |difference| in nats between the engine's and the trainer's log-probs of sampled tokens
    (``distill/engine_gap``) beyond which a step is reported; null: never. Reported for bf16 engines are 0.01 to 0.06;
    fp32 ones are below 1e-4, and a head that a sync had left behind was off by 1.9."""
    log_val_generations: int = 0
    """Validation answers printed with each validation."""
    ray_timeline_dir: str | None = None
    """Folder that receives Ray's timeline at the end; null: none."""

    def __post_init__(self) -> None:
        if isinstance(self.logger, str):
            self.logger = [self.logger]
        unknown = [name for name in self.logger if name not in LOGGERS]
        if unknown:
            raise ValueError(f"trainer.logger={self.logger} names {unknown}; choose from {', '.join(LOGGERS)}")
        if not self.default_local_dir:
            self.default_local_dir = f"checkpoints/{self.project_name}/{self.experiment_name}"
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"trainer.device={self.device!r} is not one of auto, cuda, cpu")
        if self.resume_mode not in ("auto", "disable", "resume_path"):
            raise ValueError(f"trainer.resume_mode={self.resume_mode!r} is not one of auto, disable, resume_path")
        if self.resume_mode == "resume_path" and not self.resume_from_path:
            raise ValueError(
                "trainer.resume_mode=resume_path needs trainer.resume_from_path; name the folder of a checkpoint"
            )
        if self.vocab_check is False:  # what YAML makes of a bare off
            self.vocab_check = "off"
        if self.vocab_check not in VOCAB_CHECKS:
            raise ValueError(f"trainer.vocab_check={self.vocab_check!r} is not one of {', '.join(VOCAB_CHECKS)}")
        self._check_counts()
        self._check_best_metric()

    def _check_counts(self) -> None:
        for name in ("nnodes", "n_gpus_per_node", "total_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be at least 1")
        self._check_teacher_pool()
        if not self.grace_s >= 0:
            raise ValueError(f"trainer.grace_s={self.grace_s} must be at least 0")
        if self.total_training_steps is not None and self.total_training_steps < 1:
            raise ValueError(
                f"trainer.total_training_steps={self.total_training_steps} must be at least 1, or null for whole epochs"
            )
        if self.max_actor_ckpt_to_keep is not None and self.max_actor_ckpt_to_keep < 1:
            raise ValueError(
                f"trainer.max_actor_ckpt_to_keep={self.max_actor_ckpt_to_keep} must be at least 1, or null to keep all"
            )
        for name, off in (
            ("max_skipped_updates", "for no limit"),
            ("canary_tolerance", "for no canary"),
            ("engine_gap_bound", "for no bound"),
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"trainer.{name}={value} must be at least 0, or null {off}")

    def _check_best_metric(self) -> None:
        if self.stop_after_no_better is not None and (self.stop_after_no_better < 1 or not self.best_metric):
            raise ValueError(
                f"trainer.stop_after_no_better={self.stop_after_no_better} counts validations, from 1 on, that are no "
                f"better by trainer.best_metric={self.best_metric}; set both, or leave it at null"
            )
        if not self.best_metric:
            return
        rule = BestRule.parse(self.best_metric)
        if self.val_only:
            return
        if self.test_freq < 1:
            raise ValueError(
                f"trainer.best_metric={self.best_metric!r} judges validations, and trainer.test_freq={self.test_freq} "
                "makes none; set it to the steps between them"
            )
        if rule.names_of_start and not self.val_before_train:
            raise ValueError(
                f"trainer.best_metric={self.best_metric!r} compares with step 0, and trainer.val_before_train=False "
                "leaves it out; set it to True, or give the bound as a number"
            )

    def _check_teacher_pool(self) -> None:
        nodes, ranks = self.teacher_nnodes, self.teacher_n_gpus_per_node
        if (nodes is None) != (ranks is None):
            raise ValueError(
                f"trainer.teacher_nnodes={nodes} and trainer.teacher_n_gpus_per_node={ranks} go together; set both for "
                "a teacher with GPUs of its own, or neither for one that shares the student's"
            )
        for name in ("teacher_nnodes", "teacher_n_gpus_per_node"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"trainer.{name}={value} must be at least 1, or null")

    @property
    def saves_checkpoints(self) -> bool:
        """Whether the run writes any."""
        return self.save_freq > 0 or bool(self.best_metric)

    @property
    def world_size(self) -> int:
        """The student's ranks over all machines."""
        return self.nnodes * self.n_gpus_per_node

    @property
    def ranks_on_nodes(self) -> list[int]:
        """The student's ranks, machine by machine."""
        return [self.n_gpus_per_node] * self.nnodes

    @property
    def teacher_ranks_on_nodes(self) -> list[int]:
        """Ranks of a teacher with GPUs of its own, machine by machine; empty where it shares the student's."""
        return [self.teacher_n_gpus_per_node or 0] * (self.teacher_nnodes or 0)
