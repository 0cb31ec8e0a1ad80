"""The whole configuration of a run, and the checks that need more than one section."""

from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Any

from pydantic import AfterValidator

from verl.config.actor import FSDPActorConfig, HFModelConfig, RefConfig
from verl.config.algorithm import ANY, ON_POLICY_DISTILL, AlgoConfig
from verl.config.data import CustomClassConfig, DataConfig
from verl.config.rollout import RolloutConfig
from verl.config.trainer import TrainerConfig
from verl.config.types import Options, section


def _env_vars_to_text(ray_init: dict[str, Any]) -> dict[str, Any]:
    """Ray takes environment variables as texts only; a YAML file may hold numbers and booleans."""
    runtime_env = ray_init.get("runtime_env")
    if isinstance(runtime_env, dict) and "env_vars" in runtime_env:
        env_vars = {name: str(value) for name, value in (runtime_env["env_vars"] or {}).items()}
        ray_init = {**ray_init, "runtime_env": {**runtime_env, "env_vars": env_vars}}
    return ray_init


@section("actor_rollout_ref")
class ActorRolloutRefConfig:
    """Student, teacher and generation."""

    model: HFModelConfig = field(default_factory=HFModelConfig)
    actor: FSDPActorConfig = field(default_factory=FSDPActorConfig)
    ref: RefConfig = field(default_factory=RefConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)


@section("ray_kwargs")
class RayKwargsConfig:
    """How the driver connects to Ray."""

    ray_init: Annotated[Options, AfterValidator(_env_vars_to_text)] = field(default_factory=dict)
    """Arguments of ``ray.init``, such as ``num_cpus``, ``address`` or ``runtime_env``."""


@section()
class PPOConfig:
    """Everything a trainer is built from."""

    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    algorithm: AlgoConfig = field(default_factory=AlgoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    custom_reward_function: CustomClassConfig = field(default_factory=CustomClassConfig)
    ray_kwargs: RayKwargsConfig = field(default_factory=RayKwargsConfig)

    def __post_init__(self) -> None:
        errors = [
            *self._size_errors(),
            *self._micro_batch_errors(),
            *self._algorithm_errors(),
            *self._divergence_errors(),
            *self._prompt_errors(),
            *self._vocabulary_errors(),
        ]
        if errors:
            raise ValueError("\n".join(errors))

    def resolve_schedule(self, total_steps: int) -> None:
        """Set the length of the learning-rate schedule, where it has none of its own, to that of the run."""
        actor = self.actor_rollout_ref.actor
        if actor.optim.total_training_steps < 0:
            updates = self.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
            actor.optim.total_training_steps = total_steps * updates

    def resolve_extend_start(self, start: int | None) -> None:
        """Put the first extended id in the place of ``extend_vocab_start_token=auto``; None: there is no extension.

        Raises:
            ValueError: settings need an extension, and there is none.
        """
        self.actor_rollout_ref.rollout.extend_vocab_start_token = start
        if errors := [*self._vocabulary_errors()]:
            raise ValueError("\n".join(errors))

    def _size_errors(self) -> Iterator[str]:
        data, trainer, rollout = self.data, self.trainer, self.actor_rollout_ref.rollout
        batch, mini, ranks = data.train_batch_size, self.actor_rollout_ref.actor.ppo_mini_batch_size, trainer.world_size
        ranks_text = f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}"
        if batch % mini:
            yield (
                f"data.train_batch_size={batch} is no multiple of actor_rollout_ref.actor.ppo_mini_batch_size={mini}; "
                "every optimizer step needs a whole mini-batch, so make it one"
            )
        if mini * rollout.n % ranks:
            yield (
                f"actor_rollout_ref.actor.ppo_mini_batch_size={mini} x actor_rollout_ref.rollout.n={rollout.n} rows do "
                f"not divide over trainer.nnodes={trainer.nnodes} x {ranks_text} = {ranks} ranks; change one of them"
            )
        if trainer.n_gpus_per_node % rollout.tensor_model_parallel_size:
            yield (
                f"actor_rollout_ref.rollout.tensor_model_parallel_size={rollout.tensor_model_parallel_size} does not "
                f"divide {ranks_text}; an engine replica takes whole GPUs of one machine, so change one of them"
            )
        for name in ("prompt_length", "response_length"):
            wanted, found = getattr(data, f"max_{name}"), getattr(rollout, name)
            if wanted != found:
                yield (
                    f"data.max_{name}={wanted} differs from actor_rollout_ref.rollout.{name}={found}; "
                    f"set data.max_{name} only, which the other follows"
                )

    def _micro_batch_errors(self) -> Iterator[str]:
        """A row is never split, so a micro-batch has to hold the longest one."""
        models = self.actor_rollout_ref
        longest = models.rollout.prompt_length + models.rollout.response_length
        for role, switch, prefix in (
            ("actor", "use_dynamic_bsz", "ppo"),
            ("ref", "log_prob_use_dynamic_bsz", "log_prob"),
            ("rollout", "log_prob_use_dynamic_bsz", "log_prob"),
        ):
            settings, key = getattr(models, role), f"actor_rollout_ref.{role}"
            tokens = getattr(settings, f"{prefix}_max_token_len_per_gpu")
            by_tokens, rows = getattr(settings, switch), getattr(settings, f"{prefix}_micro_batch_size_per_gpu")
            if not by_tokens and rows is None:
                yield f"{key}.{switch}=False needs {key}.{prefix}_micro_batch_size_per_gpu; set it, or {switch}=True"
            if by_tokens and tokens < longest:
                yield (
                    f"{key}.{prefix}_max_token_len_per_gpu={tokens} is below actor_rollout_ref.rollout.prompt_length="
                    f"{models.rollout.prompt_length} + actor_rollout_ref.rollout.response_length="
                    f"{models.rollout.response_length} = {longest}; raise it to {longest} at least, or shorten the "
                    "sequences"
                )

    def _algorithm_errors(self) -> Iterator[str]:
        algorithm, distill, models = self.algorithm, self.algorithm.distill, self.actor_rollout_ref
        estimator = f"algorithm.adv_estimator={algorithm.adv_estimator}"
        if models.actor.ref_log_prob_replace_val != models.ref.ref_log_prob_replace_val:
            yield (
                f"actor_rollout_ref.actor.ref_log_prob_replace_val={models.actor.ref_log_prob_replace_val} differs "
                f"from actor_rollout_ref.ref.ref_log_prob_replace_val={models.ref.ref_log_prob_replace_val}; set both "
                "to one value"
            )
        if algorithm.use_kl_in_reward and not algorithm.learns_from_reward:
            yield (
                f"algorithm.use_kl_in_reward=True has no effect with {estimator}, whose advantage comes from the "
                "teacher and not from rewards; set it to False, and actor_rollout_ref.actor.use_kl_loss=True for a KL "
                "term in the loss"
            )
        if distill.coef and not algorithm.learns_from_reward:
            yield (
                f"algorithm.distill.coef={distill.coef} weighs distillation against a task reward, and {estimator} has "
                "none; leave it out, or set the estimator of the task reward (grpo, rloo, reinforce_plus_plus)"
            )
        rollout_is = algorithm.rollout_correction.rollout_is
        if rollout_is is not None and not models.rollout.calculate_log_probs:
            yield (
                f"algorithm.rollout_correction.rollout_is={rollout_is} needs the sampler's log-probs, but "
                "actor_rollout_ref.rollout.calculate_log_probs=False; set it to True"
            )
        contents = models.actor.checkpoint.save_contents
        if self.trainer.best_metric and "hf_model" not in contents:
            yield (
                f"trainer.best_metric={self.trainer.best_metric!r} exports the best model, and "
                f"actor_rollout_ref.actor.checkpoint.save_contents={contents} does not write it; add hf_model"
            )

    def _divergence_errors(self) -> Iterator[str]:
        """Settings of distillation without distillation, and those of the policy loss without one."""
        distill, actor = self.algorithm.distill, self.actor_rollout_ref.actor
        objective = f"algorithm.distill.objective={distill.objective}"
        if (distill.is_exact or distill.teachers) and not self.algorithm.distils:
            what = objective if distill.is_exact else f"algorithm.distill.teachers={list(distill.teachers)}"
            yield (
                f"{what} belongs to algorithm.adv_estimator={ON_POLICY_DISTILL}, not {self.algorithm.adv_estimator}; "
                "to distil beside the task reward, set algorithm.distill.coef above 0"
            )
        elif not distill.has_policy_loss:
            for key, value in {
                "algorithm.rollout_correction.rollout_is": self.algorithm.rollout_correction.rollout_is,
                "actor_rollout_ref.actor.entropy_coeff": actor.entropy_coeff,
                "actor_rollout_ref.actor.use_kl_loss": actor.use_kl_loss,
            }.items():
                if value:
                    yield f"{key}={value} has no effect with {objective}, a loss without advantages; leave it out"

    def _prompt_errors(self) -> Iterator[str]:
        data, tools = self.data, self.actor_rollout_ref.rollout.multi_turn.tool_config_path
        if tools and data.truncation != "error" and not data.filter_overlong_prompts:
            # The chat template puts the tools into the prompt.
            yield (
                f"data.truncation={data.truncation} would cut the tools of "
                f"actor_rollout_ref.rollout.multi_turn.tool_config_path={tools} out of long prompts; set "
                "data.filter_overlong_prompts=True to leave such prompts out, or data.truncation=error"
            )
        synthetic, distill = data.synthetic_item_prompts, self.algorithm.distill
        if not synthetic.count or self.actor_rollout_ref.rollout.extend_vocab_start_token is None:
            return
        key = f"data.synthetic_item_prompts.count={synthetic.count}"
        if distill.coef:
            yield (
                f"{key} makes rows that have no answer to reward, and "
                f"algorithm.adv_estimator={self.algorithm.adv_estimator} learns from a reward; write the prompts with "
                "recipe.onpolicy_distill.synthetic_item_prompts and reward their source yourself, or leave them out"
            )
        unread = [s for s in synthetic.sources if not distill.teacher_knows_extended(s, has_extended=True)]
        if unread:
            yield (
                f"{key} makes rows of the sources {unread}, and no teacher that knows item tokens scores them; set "
                f"++algorithm.distill.teachers.self='{{vocabulary: full, sources: [\"{synthetic.source}_*\"]}}'"
            )

    def _vocabulary_errors(self) -> Iterator[str]:
        """Settings that need extended ids."""
        start, distill = self.actor_rollout_ref.rollout.extend_vocab_start_token, self.algorithm.distill
        if start == "auto" and self.trainer.vocab_check == "off":
            yield (
                f"actor_rollout_ref.rollout.extend_vocab_start_token={start} is found by comparing the tokenizers, and "
                "trainer.vocab_check=off compares nothing; give the number, or set trainer.vocab_check=warn"
            )
        if start is not None:  # auto counts as an extension until it is resolved
            return
        settings: dict[str, tuple[object, object]] = {
            "actor_rollout_ref.actor.freeze_extended_rows": (self.actor_rollout_ref.actor.freeze_extended_rows, False),
            "algorithm.distill.leak_coef": (distill.leak_coef, 0.0),
            "algorithm.distill.support": (distill.support, "full"),
        }
        for name, teacher in distill.teachers.items():
            settings[f"algorithm.distill.teachers.{name}.prompts"] = (teacher.prompts, ANY)
            if teacher.is_stitched:
                settings[f"algorithm.distill.teachers.{name}.vocabulary"] = (teacher.vocabulary, "full")
        for key, (value, default) in settings.items():
            if value != default:
                yield (
                    f"{key}={value} has no effect without extended ids; set "
                    f"actor_rollout_ref.rollout.extend_vocab_start_token, or leave it at {default}"
                )
