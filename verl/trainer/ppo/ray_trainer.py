"""The training loop: one controller, one line per stage::

    prompts -> generate -> reward -> old_log_prob -> ref_log_prob -> advantage -> update_actor -> sync_weights
                                                                                                        |
              the next step generates with the weights that were just sent  <-----------------------------

A stage takes the batch and returns a ``DataProto`` of its new keys alone (``verl/protocol.py`` lists every key with
its producer), which ``train_step`` adds; only ``balance`` and ``generate`` move rows. A recipe overrides stages, never
``train_step``. ``old_log_prob`` has nothing to do where the update scores the student (``student_scores_in_update``).

Workers compute on models (``workers``), engines generate (``agent_loop``). B sequences, R response tokens.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from verl.config import PPOConfig
from verl.experimental.agent_loop.agent_loop import AgentLoopManager
from verl.protocol import DataProto
from verl.single_controller.base import WorkerGroup
from verl.trainer.checkpoint.best import BestCheckpoint
from verl.trainer.checkpoint.layout import checkpoint_step, is_of_run
from verl.trainer.checkpoint.resume import find_resumable, load_driver_state, run_identity
from verl.trainer.checkpoint.saver import CheckpointSaver
from verl.trainer.data import PromptStream, build_val_loader
from verl.trainer.ppo.advantage import apply_kl_penalty, compute_advantage, compute_rollout_is_weights, new_keys
from verl.trainer.ppo.core_algos import get_kl_controller, reads_student_scores
from verl.trainer.ppo.guards import EngineGap, SkippedUpdates, TeacherProbe
from verl.trainer.ppo.keep import MixtureControl
from verl.trainer.ppo.metric_utils import Metrics, compute_data_metrics, compute_pace_metrics, reduce_metrics
from verl.trainer.ppo.reward import RewardFn, compute_rewards
from verl.trainer.ppo.rollout_queue import RolloutQueue
from verl.trainer.ppo.stop_request import StopRequest
from verl.trainer.ppo.validation_metrics import compute_validation_reward_metrics, join_metrics
from verl.trainer.ppo.worker_groups import WorkerGroups
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.rollout_dump import dump_answers, show_answers
from verl.utils.seqlen_balancing import balanced_order
from verl.utils.timing import Timeline, marked_timer
from verl.utils.tracking import Tracking, as_numbers

__all__ = ["RayPPOTrainer", "compute_advantage"]

logger = logging.getLogger(__name__)


class RayPPOTrainer:
    """Policy optimisation with a task reward: generate, score, compute advantages, update, sync, repeat."""

    def __init__(
        self,
        config: PPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        role_worker_mapping: dict[str, type],
        train_dataset: RLHFDataset,
        val_dataset: RLHFDataset | None = None,
        reward_fn: RewardFn | None = None,
        *,
        device_name: str = "cpu",
        vocab_fingerprint: str | None = None,
    ) -> None:
        """Build the parts; start nothing.

        Args:
            role_worker_mapping: worker class by role: ``actor`` (trained) and ``ref`` (frozen, where it is used).
            reward_fn: scores an answer; needed wherever the advantage is made from rewards.
            device_name: ``cuda`` or ``cpu``.
            vocab_fingerprint: of the shared vocabulary, which a checkpoint has to match; None: any.

        Raises:
            ValueError: no reward function although this trainer needs one, too few prompts for one batch, or a
                checkpoint that this run cannot go on from.
        """
        self.config, self.tokenizer = config, tokenizer
        self.role_worker_mapping, self.reward_fn = role_worker_mapping, reward_fn
        self.device_name, self.train_dataset = device_name, train_dataset
        self.prompts = PromptStream(train_dataset, config.data, steered=bool(config.trainer.keep))
        self.val_loader = build_val_loader(val_dataset, config.data) if val_dataset is not None else None
        self.kl_controller = get_kl_controller(config.algorithm.kl_ctrl)
        self.global_steps, self.stage_metrics = 0, Metrics()
        epochs = config.trainer.total_epochs
        self.total_steps = config.trainer.total_training_steps or self.prompts.batches_per_epoch * epochs
        """Steps of the whole run."""
        config.resolve_schedule(self.total_steps)
        if self.uses_reward and reward_fn is None:
            raise ValueError(f"{type(self).__name__} learns from a task reward and none is given; give a reward_fn")
        self.worker_groups, identity = WorkerGroups(config, self.roles), run_identity(config, vocab_fingerprint)
        self.resume_from = find_resumable(config, identity, self.total_steps)
        self.driver_state = load_driver_state(self.resume_from, identity) if self.resume_from else {}
        if self.driver_state:
            self.prompts.load_state_dict(self.driver_state, config.trainer.data_may_change)
        self.timeline = Timeline(config.trainer.timeline_file)
        parts = self.prompts, self.prepare, lambda: self.agent_loop_manager, self.timeline
        self.rollouts = RolloutQueue(config, *parts, self.total_steps, self.driver_state)
        self.keep = MixtureControl(config, self.prompts.mixture, val_dataset, self.driver_state)
        self.best = BestCheckpoint(config.trainer, self.resume_from)
        self.saver = CheckpointSaver(config, identity, self.best)
        self.skipped_updates, self.engine_gap = SkippedUpdates(config, self.saver), EngineGap(config)
        self.teacher_probe = TeacherProbe(config, len(tokenizer), self.saver)

    # ------------------------------------------------------------------ choices; a recipe overrides these and stages

    @property
    def uses_reference(self) -> bool:
        """Whether the reference scores the batch before the update."""
        return self.config.has_kl_term

    @property
    def roles(self) -> list[str]:
        """The models of a run: ``actor``, which is trained, and those that are frozen."""
        return ["actor", "ref"] if self.uses_reference else ["actor"]

    def worker_arguments(self, role: str) -> dict[str, Any]:
        """What the workers of a role are built with."""
        return {"config": self.config.actor_rollout_ref, "device": self.device_name}

    @property
    def uses_reward(self) -> bool:
        """Whether advantages are made from task rewards."""
        return True

    @property
    def uses_advantage(self) -> bool:
        """Whether the update follows an advantage."""
        return True

    @property
    def student_scores_in_update(self) -> bool:
        """Whether the update's own pass gives the student's scores, so that no stage has to before it.

        A trainer that overrides ``advantage`` keeps the stage, and so does one that overrides this with False.
        """
        own = type(self).advantage is not RayPPOTrainer.advantage
        return self.config.takes_one_step and not (own or reads_student_scores(self.config.algorithm))

    def reward(self, batch: DataProto) -> DataProto:
        """``token_level_scores`` (B, R): the task reward at each answer's last token; ``reward_extra`` (B,)."""
        assert self.reward_fn is not None, "checked at construction"
        return compute_rewards(batch, self.tokenizer, self.reward_fn)

    def advantage(self, batch: DataProto) -> DataProto:
        """``advantages``, ``returns`` (B, R); where used ``token_level_rewards`` and ``rollout_is_weights`` too."""
        algorithm, rewarded = self.config.algorithm, batch
        if self.uses_reward and algorithm.use_kl_in_reward:
            rewarded, metrics = apply_kl_penalty(batch, self.kl_controller, algorithm.kl_penalty)
            self.stage_metrics |= metrics
        names, n = ("adv_estimator", "gamma", "lam", "norm_adv_by_std_in_grpo"), self.config.actor_rollout_ref.rollout.n
        settings = {name: getattr(algorithm, name) for name in names}
        weighted = compute_advantage(rewarded, **settings, num_repeat=n, config=algorithm)
        if algorithm.rollout_correction.rollout_is is None:
            return new_keys(weighted, batch)
        return new_keys(weighted, batch).union(compute_rollout_is_weights(batch, algorithm.rollout_correction))

    def step_metrics(self, batch: DataProto) -> Metrics:
        """Metrics of one step's batch."""
        return compute_data_metrics(batch)

    def score_validation(self, batch: DataProto) -> DataProto:
        """New keys that ``validation_metrics`` needs, for one validation batch."""
        return self.reward(batch) if self.reward_fn is not None else DataProto()

    def validation_metrics(self, batch: DataProto) -> Metrics:
        """Metrics of all validation answers together."""
        return compute_validation_reward_metrics(batch) if self.reward_fn is not None else {}

    # ------------------------------------------------------------------ stages

    def prepare(self, rows: dict[str, Any], *, n: int, validate: bool = False, step: int | None = None) -> DataProto:
        """Rows of the data set as a batch of prompts for a step, ``n`` copies each, with one ``uid`` per prompt."""
        step = self.global_steps if step is None else step
        prompts, rollout = DataProto.from_single_dict(rows), self.config.actor_rollout_ref.rollout
        # Sampling seeds follow from these: training never draws the same ones twice, validation always does.
        uids = [f"{'val' if validate else step}-{index}" for index in prompts.non_tensor_batch["index"]]
        prompts.non_tensor_batch["uid"] = np.array(uids, dtype=object)
        if not self.config.scores_without_extended:  # then nothing after an extended id is masked
            prompts.non_tensor_batch["teacher_knows_extended"] = np.full(len(uids), True, dtype=object)
        prompts.meta_info = {
            "global_steps": 0 if validate else step,
            "epoch": self.prompts.epoch,
            "validate": validate,
            "horizon": None if validate else rollout.horizon.at(step),
            "temperature": rollout.val_kwargs.temperature if validate else rollout.temperature,
            "keeps_divergence": self.config.trainer.rollout_data_dir is not None,
        }
        # Copies lie side by side, so that a mini-batch of ppo_mini_batch_size * n rows holds whole prompts.
        return prompts.repeat(n, interleave=True)

    def generate(self, batch: DataProto) -> DataProto:
        """The rollout's keys; rows that ``rollout.oversample`` leaves out are removed. Engines sleep to free memory."""
        if self.agent_loop_manager.asleep:
            self.sync_weights()
        generated = self.rollouts.answers_to(batch)
        self.stage_metrics |= generated.meta_info.pop("metrics")
        self.agent_loop_manager.sleep()
        return generated

    def balance(self, batch: DataProto) -> DataProto:
        """The rows, in place, in the order that gives every rank its equal, token-balanced share of a mini-batch."""
        models, lengths = self.config.actor_rollout_ref, batch.tensor("attention_mask").sum(-1).tolist()
        order = balanced_order(
            lengths if self.config.trainer.balance_batch else [1] * len(lengths),
            mini_batch_rows=models.actor.ppo_mini_batch_size * models.rollout.n,
            dp_size=self.config.data_parallel_size,
        )
        batch.reorder(order)
        return batch

    def old_log_prob(self, batch: DataProto) -> DataProto:
        """``old_log_probs``, ``entropys``, ``extend_mass`` (B, R) of the student; nothing where the update scores."""
        if self.student_scores_in_update and not batch.meta_info["validate"]:
            return DataProto()
        return self.actor_wg.compute_log_prob(batch)

    def ref_log_prob(self, batch: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R) of the reference."""
        return self.role_groups["ref"].compute_ref_log_prob(batch) if self.uses_reference else DataProto()

    def update_actor(self, batch: DataProto) -> DataProto:
        """One pass of optimizer steps over the batch; new keys are the scores that its own pass gives."""
        updated = self.actor_wg.update_actor(batch)
        self.stage_metrics |= reduce_metrics(updated.meta_info.pop("metrics"))
        return updated

    def sync_weights(self) -> None:
        """Wait until the engines have answered, then send them the student's weights."""
        self.rollouts.drain()
        self.agent_loop_manager.update_weights(self.actor_wg)

    # ------------------------------------------------------------------ the loop

    def fit(self, stop: StopRequest | None = None) -> None:
        """Train until ``total_steps`` or until ``stop`` is requested: resume, step, validate, save, log."""
        config, stop = self.config.trainer, stop or StopRequest()
        self.resume()
        if self.agent_loop_manager.asleep:
            self.sync_weights()
        starts = config.val_before_train and self.global_steps == 0  # a resumed run did at its first start
        if self.val_loader is not None and (starts or config.val_only):
            self.logger.log(self.validate(), self.global_steps)
        if config.val_only or (self.global_steps > 0 and self.best.gives_up()):
            return
        stop.takes_steps = True
        with tqdm(total=self.total_steps, initial=self.global_steps, desc="train", unit="step", disable=None) as bar:
            for prompts in self.rollouts.batches(self.global_steps):
                self.global_steps += 1
                metrics = self.train_step(prompts)
                try:
                    if self.val_loader is not None and self.is_due(config.test_freq):
                        metrics |= self.validate()
                    is_last = stop.requested or self.global_steps >= self.total_steps or self.best.gives_up()
                    saves = self.is_saved(is_last)
                    metrics |= self.save_checkpoint(metrics, is_last) if saves else self.saver.poll()
                finally:  # a run that ends here with an error keeps the metrics of its last step
                    self.logger.log(metrics, self.global_steps)
                self.skipped_updates.check(metrics, self.global_steps)
                bar.update()
                if is_last or (saves and stop.requested):
                    break
        self.saver.finish()

    def is_due(self, every: int) -> bool:
        """Whether something is due after this step: every so many steps and after the last; never if ``every`` < 1."""
        return every > 0 and (self.global_steps % every == 0 or self.global_steps >= self.total_steps)

    def is_saved(self, is_last: bool) -> bool:
        """Whether this step leaves a checkpoint: due, the last of a run that saves, or the best so far."""
        every = self.config.trainer.save_freq
        return self.is_due(every) or (is_last and every > 0) or self.best.is_new(self.global_steps)

    def train_step(self, batch: DataProto) -> Metrics:
        """One step, one line per stage; ``batch`` has the prompts."""
        timing, self.stage_metrics = dict[str, float](), {}

        def stage(name: str, run: Callable[[DataProto], DataProto], batch: DataProto) -> DataProto:
            with marked_timer(name, timing, self.timeline):
                return batch.union(run(batch))

        with marked_timer("step", timing, self.timeline):
            batch = stage("gen", self.generate, batch)
            batch = stage("reward", self.reward, batch) if self.uses_reward else batch
            batch = self.balance(batch)
            batch = stage("old_log_prob", self.old_log_prob, batch)
            batch = stage("ref", self.ref_log_prob, batch) if self.uses_reference else batch
            batch = stage("adv", self.advantage, batch) if self.uses_advantage else batch
            batch = stage("update_actor", self.update_actor, batch)
            if self.rollouts.is_low or (self.val_loader is not None and self.is_due(self.config.trainer.test_freq)):
                with marked_timer("update_weights", timing, self.timeline):
                    self.sync_weights()
        dump_answers(self.config.trainer.rollout_data_dir, self.global_steps, batch, self.tokenizer, self.roles[1:])
        metrics = self.stage_metrics | self.step_metrics(batch)
        metrics |= self.engine_gap.check(metrics, self.global_steps)
        metrics |= compute_pace_metrics(batch, timing, self.config.trainer.world_size, self.global_steps)
        return metrics | self.rollouts.step_metrics()

    def validate(self) -> Metrics:
        """Answer every validation prompt, of which there have to be some, and measure the answers.

        Metrics of the stages are ``val_<family>/<name>``; below ``val/`` they could be taken for those of a source.
        """
        assert self.val_loader is not None
        answers, stages, timing = list[DataProto](), [], dict[str, float]()
        with marked_timer("testing", timing, self.timeline):
            for rows in tqdm(self.val_loader, desc="validate", unit="batch", leave=False, disable=None):
                self.stage_metrics = {}
                batch = self.prepare(rows, n=self.config.actor_rollout_ref.rollout.val_kwargs.n, validate=True)
                batch = batch.union(self.generate(batch))
                # Where engines wake for each batch, the same weights come as another version.
                batch.meta_info["weight_version"] = (answers or [batch])[0].meta_info.get("weight_version")
                answers.append(batch.union(self.score_validation(batch)))
                stages.append((len(batch), self.stage_metrics))
        batch, joined = DataProto.concat(answers), join_metrics(stages)
        dump_answers(self.config.trainer.validation_data_dir, self.global_steps, batch, self.tokenizer, self.roles[1:])
        if shown := show_answers(batch, self.tokenizer, self.config.trainer.log_val_generations):
            self.logger.log_answers(shown, self.global_steps)
        metrics = {f"val_{name}": value for name, value in joined.items() if not name.startswith("timing_s/")}
        metrics |= self.validation_metrics(batch)
        noted = self.best.note(self.global_steps, metrics) | self.keep.note(self.global_steps, metrics)
        return metrics | noted | {"timing_s/testing": timing["testing"]}

    # ------------------------------------------------------------------ set-up, data, checkpoints

    def init_workers(self, in_process: bool = False) -> None:
        """Start training ranks and engines, and build the models.

        On CPU side by side. On CUDA one after the other: both sides measure how much of a GPU's memory is free.

        Args:
            in_process: run one rank on CPU and one engine in this process, without Ray; for tests and many short runs.

        Raises:
            ValueError: a model or setting cannot be used, or ``in_process`` with a GPU or several ranks.
        """
        start = self.worker_groups.start_in_process if in_process else self.worker_groups.start
        arguments = self.role_worker_mapping, self.worker_arguments, self.device_name
        self.role_groups: Mapping[str, WorkerGroup] = start(*arguments)
        self.actor_wg = self.role_groups["actor"]
        parts, groups = (self.config, self.actor_wg, self.tokenizer), self.worker_groups
        options: dict[str, Any] = {"watch": groups.check_alive, "pool": groups.engine_pool, "in_process": in_process}
        self.agent_loop_manager = AgentLoopManager(*parts, device=self.device_name, **options)
        groups.watch(self.agent_loop_manager.check_alive)
        if self.device_name == "cpu":
            self.agent_loop_manager.start()
        for role in self.roles:
            self.role_groups[role].init_model()
        if self.device_name != "cpu":
            self.agent_loop_manager.start()
        self.agent_loop_manager.wait_ready()
        run = self.config.trainer
        self.logger = Tracking(run.project_name, run.experiment_name, run.logger, self.config, run.default_local_dir)

    def shutdown(self) -> None:
        """End engines, workers and loggers, each whatever the others raise; safe to call after a failure anywhere."""
        with ExitStack() as last_first:
            if hasattr(self, "logger"):
                last_first.callback(lambda: self.logger.finish(self.saver.written_folders()))
            last_first.callback(self.worker_groups.shutdown)
            if hasattr(self, "agent_loop_manager"):
                last_first.callback(self.agent_loop_manager.shutdown)

    def save_checkpoint(self, metrics: Metrics, is_last: bool) -> Metrics:
        """Begin a checkpoint of model, optimizer, driver and the step's metrics; wait for the last one."""
        checked = self.check_teachers()
        state = {
            **self.prompts.state_dict(),
            **self.rollouts.state_dict(),
            "kl_coef": self.kl_controller.value,
            "keep": self.keep.state_dict(),
            "teacher_probe": self.teacher_probe.state_dict(),
            "metrics": as_numbers(metrics | checked),
        }
        return checked | self.saver.save(self.actor_wg, self.global_steps, state, last=is_last)

    def check_teachers(self) -> Metrics:
        """Compare every teacher's scores of its fixed tokens with those of the run's start; engines sleep first."""
        self.agent_loop_manager.sleep()
        return self.teacher_probe.check({role: self.role_groups[role] for role in self.roles[1:]}, self.global_steps)

    def resume(self) -> None:
        """Continue from the checkpoint that was found, if any; check teachers; drop what logs hold of later steps."""
        config, folder, step, logged = self.config.trainer, self.resume_from, None, None
        if folder is not None:
            self.global_steps = step = checkpoint_step(folder)
            self.kl_controller.load(self.driver_state["kl_coef"])
            self.teacher_probe.load_state_dict(self.driver_state["teacher_probe"])
            # A kill between a checkpoint and the log line of its step loses the line; another run's log is not ours.
            logged = (self.driver_state["metrics"] or None) if is_of_run(folder, config.default_local_dir) else None
        self.check_teachers()
        if not config.val_only:
            self.logger.truncate_after(step, logged)
            self.best.update_files()
        if folder is not None:
            self.actor_wg.load_checkpoint(str((folder / "actor").absolute()))
            logger.warning("resumed from %s at step %d (trainer.resume_mode=disable starts afresh)", folder, step)
            self.sync_weights()
