"""The whole configuration of a run, and the checks that need more than one section."""

from dataclasses import dataclass, field
from typing import Any

from verl.config.actor import FSDPActorConfig, RefConfig
from verl.config.algorithm import ON_POLICY_DISTILL, AlgoConfig
from verl.config.data import CustomClassConfig, DataConfig
from verl.config.distill import ANY
from verl.config.model import HFModelConfig
from verl.config.rollout import RolloutConfig
from verl.config.trainer import TrainerConfig


@dataclass
class ActorRolloutRefConfig:
    """Student, teacher and generation."""

    model: HFModelConfig = field(default_factory=HFModelConfig)
    actor: FSDPActorConfig = field(default_factory=FSDPActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass
class RayKwargsConfig:
    """How the driver connects to Ray."""

    ray_init: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``ray.init``, such as ``num_cpus``, ``address`` or ``runtime_env``."""


@dataclass
class PPOConfig:
    """Everything a trainer is built from."""

    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    algorithm: AlgoConfig = field(default_factory=AlgoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    custom_reward_function: CustomClassConfig = field(default_factory=CustomClassConfig)
    ray_kwargs: RayKwargsConfig = field(default_factory=RayKwargsConfig)

    def __post_init__(self) -> None:
        self._check_batch_sizes()
        self._check_lengths()
        self._check_token_limits()
        self._check_roles()
        self._check_algorithm()
        self._check_tools()
        self._check_distill()
        self._check_vocabulary_settings()
        self._check_best_metric()
        self.check_extension()
        self._check_synthetic_prompts()

    def resolve_schedule(self, total_steps: int) -> None:
        """Give a learning-rate schedule without a length of its own that of the run."""
        actor = self.actor_rollout_ref.actor
        if actor.optim.total_training_steps < 0:
            updates = self.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
            actor.optim.total_training_steps = total_steps * updates

    def _check_batch_sizes(self) -> None:
        actor, rollout = self.actor_rollout_ref.actor, self.actor_rollout_ref.rollout
        batch, mini, ranks = self.data.train_batch_size, actor.ppo_mini_batch_size, self.trainer.world_size
        if batch % mini:
            raise ValueError(
                f"data.train_batch_size={batch} is no multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini}; "
                "every optimizer step needs a whole mini-batch, so make it one"
            )
        if mini * rollout.n % ranks:
            raise ValueError(
                f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} x actor_rollout_ref.rollout.n={rollout.n} rows "
                f"do not divide over trainer.nnodes={self.trainer.nnodes} x "
                f"trainer.n_gpus_per_node={self.trainer.n_gpus_per_node} = {ranks} ranks; change one of them"
            )

    def _check_distill(self) -> None:
        """Settings that an objective or a teacher has no use for."""
        distill = self.algorithm.distill
        key = f"algorithm.distill.objective={distill.objective}"
        estimator = self.algorithm.adv_estimator
        if distill.coef and estimator == ON_POLICY_DISTILL:
            raise ValueError(
                f"algorithm.distill.coef={distill.coef} weighs distillation against a task reward, and "
                f"algorithm.adv_estimator={estimator} has none; leave it out, or set the estimator of the task reward "
                "(grpo, rloo, reinforce_plus_plus)"
            )
        if (distill.is_exact or distill.teachers) and not self.algorithm.distils:
            what = key if distill.is_exact else f"algorithm.distill.teachers={list(distill.teachers)}"
            raise ValueError(
                f"{what} belongs to algorithm.adv_estimator={ON_POLICY_DISTILL}, not {estimator}; to distil beside the "
                "task reward, set algorithm.distill.coef above 0"
            )
        if distill.is_exact and not distill.coef:
            self._check_divergence_alone(key)

    def _check_divergence_alone(self, key: str) -> None:
        """Settings of the policy loss, where there is none."""
        actor, correction = self.actor_rollout_ref.actor, self.algorithm.rollout_correction
        if correction.rollout_is is not None:
            raise ValueError(
                f"algorithm.rollout_correction.rollout_is={correction.rollout_is} has no effect "
                f"with {key}, whose loss is no estimate from drawn tokens; set it to null"
            )
        for name, value in (("entropy_coeff", actor.entropy_coeff), ("use_kl_loss", actor.use_kl_loss)):
            if value:
                raise ValueError(
                    f"actor_rollout_ref.actor.{name}={value} has no effect with {key}, whose loss is the divergence "
                    "alone; leave it out"
                )

    def _check_lengths(self) -> None:
        data, rollout = self.data, self.actor_rollout_ref.rollout
        pairs = (
            ("max_prompt_length", data.max_prompt_length, "prompt_length", rollout.prompt_length),
            ("max_response_length", data.max_response_length, "response_length", rollout.response_length),
        )
        for data_name, wanted, rollout_name, room in pairs:
            if wanted != room:
                raise ValueError(
                    f"data.{data_name}={wanted} differs from actor_rollout_ref.rollout.{rollout_name}={room}; "
                    f"set data.{data_name} only, which the other follows"
                )

    def _check_token_limits(self) -> None:
        """A row is never split, so a micro-batch has to hold the longest one."""
        actor, ref, rollout = self.actor_rollout_ref.actor, self.actor_rollout_ref.ref, self.actor_rollout_ref.rollout
        longest = rollout.prompt_length + rollout.response_length
        limits = (
            (actor.use_dynamic_bsz, "actor.ppo_max_token_len_per_gpu", actor.ppo_max_token_len_per_gpu),
            (ref.log_prob_use_dynamic_bsz, "ref.log_prob_max_token_len_per_gpu", ref.log_prob_max_token_len_per_gpu),
            (
                rollout.log_prob_use_dynamic_bsz,
                "rollout.log_prob_max_token_len_per_gpu",
                rollout.log_prob_max_token_len_per_gpu,
            ),
        )
        for used, name, limit in limits:
            if used and limit < longest:
                raise ValueError(
                    f"actor_rollout_ref.{name}={limit} is below actor_rollout_ref.rollout.prompt_length="
                    f"{rollout.prompt_length} + actor_rollout_ref.rollout.response_length={rollout.response_length} = "
                    f"{longest}; raise it to {longest} at least, or shorten the sequences"
                )

    def _check_roles(self) -> None:
        actor, ref, rollout = self.actor_rollout_ref.actor, self.actor_rollout_ref.ref, self.actor_rollout_ref.rollout
        if actor.ref_log_prob_replace_val != ref.ref_log_prob_replace_val:
            raise ValueError(
                f"actor_rollout_ref.actor.ref_log_prob_replace_val={actor.ref_log_prob_replace_val} differs from "
                f"actor_rollout_ref.ref.ref_log_prob_replace_val={ref.ref_log_prob_replace_val}; set both to one value"
            )
        if self.trainer.n_gpus_per_node % rollout.tensor_model_parallel_size:
            raise ValueError(
                f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size} does not "
                f"divide trainer.n_gpus_per_node={self.trainer.n_gpus_per_node}; an engine replica takes whole GPUs of "
                "one machine, so change one of them"
            )

    def _check_algorithm(self) -> None:
        algorithm, rollout = self.algorithm, self.actor_rollout_ref.rollout
        if algorithm.use_kl_in_reward and algorithm.adv_estimator == ON_POLICY_DISTILL:
            raise ValueError(
                f"algorithm.use_kl_in_reward=True has no effect with algorithm.adv_estimator={ON_POLICY_DISTILL}, "
                "whose advantage comes from the teacher and not from rewards; set it to False, and "
                "actor_rollout_ref.actor.use_kl_loss=True for a KL term in the loss"
            )
        rollout_is = algorithm.rollout_correction.rollout_is
        if rollout_is is not None and not rollout.calculate_log_probs:
            raise ValueError(
                f"algorithm.rollout_correction.rollout_is={rollout_is} needs the sampler's log-probs, but "
                "actor_rollout_ref.rollout.calculate_log_probs=False; set it to True"
            )

    def _check_vocabulary_settings(self) -> None:
        start = self.actor_rollout_ref.rollout.extend_vocab_start_token
        if start == "auto" and self.trainer.vocab_check == "off":
            raise ValueError(
                f"actor_rollout_ref.rollout.extend_vocab_start_token={start} is found by comparing the tokenizers, and "
                "trainer.vocab_check=off compares nothing; give the number, or set trainer.vocab_check=warn"
            )

    def _check_best_metric(self) -> None:
        contents = self.actor_rollout_ref.actor.checkpoint.save_contents
        if self.trainer.best_metric and "hf_model" not in contents:
            raise ValueError(
                f"trainer.best_metric={self.trainer.best_metric!r} hands out the best model, and "
                f"actor_rollout_ref.actor.checkpoint.save_contents={contents} does not write it; add hf_model"
            )

    def check_extension(self) -> None:
        """Settings that speak of extended ids, of which there have to be some.

        To be asked again once an ``extend_vocab_start_token`` that is ``auto`` has become what it stands for.

        Raises:
            ValueError: such a setting, and no extension.
        """
        if self.actor_rollout_ref.rollout.extend_vocab_start_token is not None:
            return
        if self.actor_rollout_ref.actor.freeze_extended_rows:
            raise ValueError(
                "actor_rollout_ref.actor.freeze_extended_rows=True has no effect without extended ids; set "
                "actor_rollout_ref.rollout.extend_vocab_start_token, or leave it at False"
            )
        distill = self.algorithm.distill
        for key, value, default in (("leak_coef", distill.leak_coef, 0.0), ("support", distill.support, "full")):
            if value != default:
                raise ValueError(
                    f"algorithm.distill.{key}={value} has no effect without extended ids; set "
                    f"actor_rollout_ref.rollout.extend_vocab_start_token, or leave it at {default}"
                )
        for name, teacher in distill.teachers.items():
            if teacher.is_stitched:
                raise ValueError(
                    f"algorithm.distill.teachers.{name}.vocabulary={teacher.vocabulary} gives extended ids a teacher "
                    "of their own, and there are none; set actor_rollout_ref.rollout.extend_vocab_start_token"
                )
            if teacher.prompts != ANY:
                raise ValueError(
                    f"algorithm.distill.teachers.{name}.prompts={teacher.prompts} has no effect without extended ids; "
                    f"set actor_rollout_ref.rollout.extend_vocab_start_token, or leave it at {ANY}"
                )

    def _check_synthetic_prompts(self) -> None:
        """Prompts with item tokens need a teacher that reads them."""
        wanted, distill = self.data.synthetic_item_prompts, self.algorithm.distill
        if not wanted.count or self.actor_rollout_ref.rollout.extend_vocab_start_token is None:
            return
        if distill.coef:
            raise ValueError(
                f"data.synthetic_item_prompts.count={wanted.count} makes rows that have no answer to reward, and "
                f"algorithm.adv_estimator={self.algorithm.adv_estimator} learns from a reward; write the prompts with "
                "recipe.onpolicy_distill.synthetic_item_prompts and reward their source yourself, or leave them out"
            )
        unread = [source for source in wanted.sources if not distill.teacher_knows_extended(source, has_extended=True)]
        if unread:
            raise ValueError(
                f"data.synthetic_item_prompts.count={wanted.count} makes rows of the sources {unread}, and no teacher "
                "that reads item tokens judges them; set ++algorithm.distill.teachers.self="
                f"'{{vocabulary: full, sources: [\"{wanted.source}_*\"]}}'"
            )

    def _check_tools(self) -> None:
        """A prompt that is cut loses tool schemas, which the chat template puts into it, or parts of them."""
        data, tools = self.data, self.actor_rollout_ref.rollout.multi_turn.tool_config_path
        if tools and data.truncation != "error" and not data.filter_overlong_prompts:
            raise ValueError(
                f"data.truncation={data.truncation} would cut the tools of "
                f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tools} out of long prompts; set "
                "data.filter_overlong_prompts=True to leave such prompts out, or data.truncation=error"
            )
