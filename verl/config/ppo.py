"""The whole configuration of a run, and the checks that need more than one section."""

import re
from collections.abc import Iterator
from dataclasses import field
from typing import Annotated, Any

from pydantic import AfterValidator

from verl.config.actor_rollout_ref import ActorRolloutRefConfig, RefConfig
from verl.config.algorithm import BASE_TEACHER, AdvantageEstimator, AlgoConfig, TeacherConfig
from verl.config.data import CustomClassConfig, DataConfig
from verl.config.schema import Options, changed, section
from verl.config.trainer import TrainerConfig

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_SPLIT, _PARALLEL = "ulysses_sequence_parallel_size", "tensor_parallel_size"
_DISTILS = f"algorithm.adv_estimator={AdvantageEstimator.ON_POLICY_DISTILL}"


def _env_vars_to_text(ray_init: dict[str, Any]) -> dict[str, Any]:
    """Ray takes environment variables as texts only; a YAML file may hold numbers and booleans."""
    runtime_env = ray_init.get("runtime_env")
    if isinstance(runtime_env, dict) and "env_vars" in runtime_env:
        env_vars = {name: str(value) for name, value in (runtime_env["env_vars"] or {}).items()}
        ray_init = {**ray_init, "runtime_env": {**runtime_env, "env_vars": env_vars}}
    return ray_init


@section("ray_kwargs")
class RayKwargsConfig:
    """How the driver connects to Ray."""

    ray_init: Annotated[Options, AfterValidator(_env_vars_to_text)] = field(default_factory=dict)
    """Arguments of ``ray.init``, such as ``num_cpus``, ``address`` or ``runtime_env``."""


@section("custom_reward_function")
class RewardFunctionConfig(CustomClassConfig):
    """A reward function of the user's own; ``name`` is ``compute_score`` by default."""

    reward_kwargs: Options = field(default_factory=dict)
    """Arguments that every call of the function gets in addition to the row's."""


@section()
class PPOConfig:
    """Everything a trainer is built from."""

    actor_rollout_ref: ActorRolloutRefConfig = field(default_factory=ActorRolloutRefConfig)
    algorithm: AlgoConfig = field(default_factory=AlgoConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    custom_reward_function: RewardFunctionConfig = field(default_factory=RewardFunctionConfig)
    ray_kwargs: RayKwargsConfig = field(default_factory=RayKwargsConfig)

    def __post_init__(self) -> None:
        _raise_all(
            self._size_errors(),
            self._sharding_errors(),
            self._micro_batch_errors(),
            self._algorithm_errors(),
            self._divergence_errors(),
            self._server_errors(),
            self._own_prompt_errors(),
            self._average_errors(),
            self._keep_errors(),
            self._prompt_errors(),
            self._vocabulary_errors(),
        )

    def resolve_schedule(self, total_steps: int) -> None:
        """Set the length of the learning-rate schedule, where it has none of its own, to that of the run."""
        actor = self.actor_rollout_ref.actor
        if actor.optim.total_training_steps < 0:
            updates = self.data.train_batch_size // actor.ppo_mini_batch_size * actor.ppo_epochs
            actor.optim.total_training_steps = total_steps * updates

    @property
    def takes_one_step(self) -> bool:
        """Whether a batch is one optimizer step, whose pass is then over the weights that wrote the answers."""
        actor = self.actor_rollout_ref.actor
        return actor.ppo_epochs == 1 and actor.ppo_mini_batch_size == self.data.train_batch_size

    @property
    def data_parallel_size(self) -> int:
        """Shares into which the student's rows are divided: a sequence group has one."""
        return self.trainer.world_size // self.actor_rollout_ref.actor.ulysses_sequence_parallel_size

    def resolve_extend_start(self, start: int | None) -> None:
        """Put the first extended id in the place of ``extend_vocab_start_token=auto``; None: there is no extension.

        Raises:
            ValueError: settings need an extension, and there is none.
        """
        self.actor_rollout_ref.rollout.extend_vocab_start_token = start
        _raise_all(self._vocabulary_errors())

    def knows_extended(self, role: str) -> bool:
        """Whether a frozen model knows the extended ids: the student's own starting weights do, whatever their role."""
        ref = self.actor_rollout_ref.ref
        is_start = role == BASE_TEACHER and ref.model.path is None and role not in self.served_roles
        return is_start or self.algorithm.distill.knows_extended(role)

    @property
    def teachers(self) -> dict[str, RefConfig | TeacherConfig]:
        """By role, the sections that say where a teacher is and what it reads."""
        return {BASE_TEACHER: self.actor_rollout_ref.ref, **self.algorithm.distill.teachers}

    @property
    def hint_columns(self) -> list[str]:
        """Columns of the data that teachers alone read."""
        return [teacher.system_prompt_column for teacher in self.teachers.values() if teacher.system_prompt_column]

    @property
    def served_roles(self) -> list[str]:
        """Teachers behind a URL, which have no workers."""
        return [role for role, teacher in self.teachers.items() if teacher.url or teacher.engine]

    @property
    def engine_roles(self) -> list[str]:
        """Those whose servers the run starts."""
        return [role for role, teacher in self.teachers.items() if teacher.engine]

    @property
    def teacher_ranks_on_nodes(self) -> list[int]:
        """Ranks of the teachers' models with GPUs of their own, machine by machine; none where servers have these."""
        return [] if self.engine_roles else self.trainer.teacher_ranks_on_nodes

    @property
    def gpus_per_server(self) -> int:
        """Of the servers that the run starts, the most that one wants."""
        return max([int(self.teachers[role].engine_kwargs.get(_PARALLEL, 1)) for role in self.engine_roles], default=1)

    @property
    def scores_without_extended(self) -> bool:
        """Whether a model that lacks the extended ids scores rows, so that scores after one of them mean nothing."""
        return self.algorithm.distils or (self.has_kl_term and not self.knows_extended(BASE_TEACHER))

    @property
    def has_kl_term(self) -> bool:
        """Whether a KL to the reference is in the reward or in the loss."""
        return self.algorithm.use_kl_in_reward or self.actor_rollout_ref.actor.use_kl_loss

    @property
    def stops_at_extended(self) -> bool:
        """Whether an answer to train on ends at its first extended token where its teacher lacks these: nothing after
        it is trained, and no task reward reads it."""
        rollout = self.actor_rollout_ref.rollout
        masks = rollout.stop_at_extended_token and rollout.mask_after_extend_token
        return masks and not self.algorithm.learns_from_reward

    def _size_errors(self) -> Iterator[str]:
        data, trainer, rollout = self.data, self.trainer, self.actor_rollout_ref.rollout
        batch, rows = data.train_batch_size, self.actor_rollout_ref.actor.ppo_mini_batch_size
        mini, gpus = f"{_ACTOR}.ppo_mini_batch_size={rows}", f"trainer.n_gpus_per_node={trainer.n_gpus_per_node}"
        if batch % rows:
            yield f"data.train_batch_size={batch} is no multiple of {mini}; make it one"
        if rows * rollout.n % max(1, self.data_parallel_size):  # 0: an error of `_sharding_errors`
            ranks = f"trainer.nnodes={trainer.nnodes} x {gpus} ranks"
            if (size := self.actor_rollout_ref.actor.ulysses_sequence_parallel_size) > 1:
                ranks += f" in groups of {_ACTOR}.{_SPLIT}={size}"
            # The mini-batch follows the batch, which is then what the user has set.
            mini = f"data.train_batch_size={batch}, and with it {mini}" if rows == batch else mini
            yield f"{mini} x {_ROLLOUT}.n={rollout.n} rows do not divide over {ranks}; change one of them"
        of_engines = f"trainer.rollout_n_gpus_per_node={trainer.rollout_n_gpus_per_node}"
        count, where = next(((n, of_engines) for n in trainer.rollout_gpus_on_nodes), (trainer.n_gpus_per_node, gpus))
        if count % (size := rollout.tensor_model_parallel_size):
            yield f"{_ROLLOUT}.tensor_model_parallel_size={size} does not divide {where}; change one of them"
        if rollout.name == "hf" and size > 1:
            yield f"{_ROLLOUT}.tensor_model_parallel_size={size} needs {_ROLLOUT}.name=vllm: hf runs on one device"
        for name in ("prompt_length", "response_length"):
            wanted, found = getattr(data, f"max_{name}"), getattr(rollout, name)
            if wanted != found:
                yield f"data.max_{name}={wanted} differs from {_ROLLOUT}.{name}={found}; set the first alone"

    def _sharding_errors(self) -> Iterator[str]:
        """Groups of ranks have to be whole, and what splits rows has to work on packed ones of this process."""
        models, trainer, key = self.actor_rollout_ref, self.trainer, f"{_ACTOR}.{_SPLIT}"
        split = models.actor.ulysses_sequence_parallel_size
        ranks = {"actor": trainer.world_size, "ref": sum(self.teacher_ranks_on_nodes) or trainer.world_size}
        for role, count in ranks.items():
            size, name = getattr(models, role).fsdp_config.fsdp_size, f"actor_rollout_ref.{role}.fsdp_config.fsdp_size"
            if size != -1 and (size < 1 or count % size):
                yield f"{name}={size} does not divide the {count} ranks of its model; change it, or set it to -1"
            if count % split:
                yield f"{key}={split} does not divide the {count} ranks of actor_rollout_ref.{role}; change one of them"
        if (other := models.ref.ulysses_sequence_parallel_size) != split:
            yield f"{key}={split} differs from actor_rollout_ref.ref.{_SPLIT}={other}; set the first alone"
        if split > 1 and not models.model.use_remove_padding:
            yield f"{key}={split} splits packed rows; leave actor_rollout_ref.model.use_remove_padding at True"
        if split > 1 and trainer.teacher_ranks_on_nodes and self.algorithm.distill.needs_full_distribution:
            objective = f"algorithm.distill.objective={self.algorithm.distill.objective}"
            fix = "set trainer.teacher_nnodes and teacher_n_gpus_per_node to null, or the objective to topk or sampled"
            yield f"{key}={split} with {objective} needs the teachers on the student's ranks; {fix}"

    def _micro_batch_errors(self) -> Iterator[str]:
        """A row is never split over micro-batches, so one has to hold the longest."""
        models = self.actor_rollout_ref
        split = models.actor.ulysses_sequence_parallel_size
        longest = models.rollout.prompt_length + models.rollout.response_length
        for settings, key, infix, prefix in (
            (models.actor, _ACTOR, "", "ppo"),
            (models.ref, "actor_rollout_ref.ref", "log_prob_", "log_prob"),
            (models.rollout, _ROLLOUT, "log_prob_", "log_prob"),
        ):
            switch, tokens_key = f"{infix}use_dynamic_bsz", f"{prefix}_max_token_len_per_gpu"
            rows_key, tokens = f"{prefix}_micro_batch_size_per_gpu", getattr(settings, tokens_key)
            by_tokens, rows = getattr(settings, switch), getattr(settings, rows_key)
            if by_tokens is False and rows is None:
                yield f"{key}.{switch}=False needs {key}.{rows_key}; set it, or {switch}=True"
            elif (by_tokens or rows is None) and tokens * split < longest:
                row = f"{_ROLLOUT}.prompt_length + response_length = {longest}"
                times = f" on each of {split} ranks ({_SPLIT})" if split > 1 else ""
                yield f"{key}.{tokens_key}={tokens}{times} is below {row}; raise it to {-(-longest // split)} at least"

    def _algorithm_errors(self) -> Iterator[str]:
        algorithm, models, best = self.algorithm, self.actor_rollout_ref, self.trainer.best_metric
        estimator, coef = f"algorithm.adv_estimator={algorithm.adv_estimator}", algorithm.distill.coef
        mine, theirs = models.actor.ref_log_prob_replace_val, models.ref.ref_log_prob_replace_val
        weights, contents = algorithm.rollout_correction.rollout_is, models.actor.checkpoint.save_contents
        if mine != theirs:
            key = "ref_log_prob_replace_val"
            yield f"{_ACTOR}.{key}={mine} differs from actor_rollout_ref.ref.{key}={theirs}; set both to one value"
        if algorithm.use_kl_in_reward and not algorithm.learns_from_reward:
            fix = f"set it to False, and {_ACTOR}.use_kl_loss=True for a KL term in the loss"
            yield f"algorithm.use_kl_in_reward=True has no effect with {estimator}, which reads no reward; {fix}"
        if coef and not algorithm.learns_from_reward:
            fix = "leave it out, or set the estimator of the task reward, such as grpo"
            yield f"algorithm.distill.coef={coef} weighs a task reward, and {estimator} has none; {fix}"
        if weights and not models.rollout.calculate_log_probs:
            key = f"algorithm.rollout_correction.rollout_is={weights}"
            yield f"{key} needs the sampler's log-probs; set {_ROLLOUT}.calculate_log_probs=True"
        if not weights and (most := algorithm.rollout_correction.rollout_is_threshold) != 2.0:
            key = f"algorithm.rollout_correction.rollout_is_threshold={most}"
            yield f"{key} has no effect without rollout_is=token; set it, or leave this at 2.0"
        if best and "hf_model" not in contents:
            key = f"{_ACTOR}.checkpoint.save_contents={contents}"
            yield f"trainer.best_metric={best!r} exports a model that {key} does not write; add hf_model"

    def _divergence_errors(self) -> Iterator[str]:
        """Settings of distillation without distillation, and those of the policy loss without one."""
        algorithm, distill, actor = self.algorithm, self.algorithm.distill, self.actor_rollout_ref.actor
        objective = f"algorithm.distill.objective={distill.objective}"
        if not algorithm.distils and (distill.is_divergence or distill.teachers):
            what = objective if distill.is_divergence else f"algorithm.distill.teachers={list(distill.teachers)}"
            fix = f"set algorithm.distill.coef above 0, or {_DISTILS}"
            yield f"{what} has no effect with algorithm.adv_estimator={algorithm.adv_estimator}; {fix}"
        elif not distill.has_policy_loss:
            for key, value in {
                "algorithm.rollout_correction.rollout_is": algorithm.rollout_correction.rollout_is,
                f"{_ACTOR}.entropy_coeff": actor.entropy_coeff,
                f"{_ACTOR}.use_kl_loss": actor.use_kl_loss,
            }.items():
                if value:
                    yield f"{key}={value} has no effect with {objective}, a loss without advantages; leave it out"

    def _server_errors(self) -> Iterator[str]:
        """What a served teacher cannot do."""
        for role, teacher in self.teachers.items():
            key = teacher_key(role)
            if teacher.api_key_env and not re.fullmatch("[A-Z_][A-Z0-9_]*", teacher.api_key_env):
                yield f"{key}.api_key_env must be the name of a variable, in capitals; a key itself is not shown here"
            elif teacher.api_key_env and not teacher.url:
                yield f"{key}.api_key_env={teacher.api_key_env} has no effect without {key}.url; set it"
            if teacher.engine_kwargs and not teacher.engine:
                yield f"{key}.engine_kwargs ({list(teacher.engine_kwargs)}) need {key}.engine=vllm; set it"
            for url in teacher.url:
                if not url.startswith(("http://", "https://")) or "@" in url:
                    yield f"{key}.url={url.split('@')[-1]} must begin with http:// or https:// and hold no password"
            if role in self.served_roles:
                server = f"{key}.engine={teacher.engine}" if teacher.engine else f"{key}.url"
                yield from self._served_errors(key, teacher, server)
        roles, of_nodes, size = self.engine_roles, self.trainer.teacher_ranks_on_nodes, self.gpus_per_server
        if roles and of_nodes and (of_nodes[0] % size or sum(of_nodes) < size * len(roles)):
            gpus = f"trainer.teacher_nnodes={len(of_nodes)} x trainer.teacher_n_gpus_per_node={of_nodes[0]}"
            yield f"{gpus} GPUs do not divide into servers of {_PARALLEL}={size}, one at least for each of {roles}"

    def _served_errors(self, key: str, teacher: RefConfig | TeacherConfig, server: str) -> Iterator[str]:
        distill = self.algorithm.distill
        if teacher.engine and teacher.url:
            yield f"{server} starts servers, and {key}.url names some; leave one out"
        if not self.algorithm.distils and not self.has_kl_term:
            yield f"{server} has no effect, for nothing reads a teacher's scores; leave it out, or set {_DISTILS}"
        if distill.needs_full_distribution and self.algorithm.distils:
            what = f"algorithm.distill.objective={distill.objective} needs whole distributions"
            yield f"{what}, and servers ({server}) give likeliest ids alone; set it to topk or sampled"
        if not isinstance(teacher, TeacherConfig):
            for own in [name for each in distill.teachers.values() if each.is_stitched for name in each.own_prompt]:
                yield f"{server} reads no {own} of a stitched teacher; leave it out, or let both be models"
            return
        if teacher.path and teacher.url:
            yield f"{key}.path={teacher.path} is not read beside {key}.url; leave one out"
        if teacher.is_stitched:
            why = "servers do not tell how much of what they leave unnamed is of item tokens"
            yield f"{server} with vocabulary=stitched: {why}; let it be a model of the run"

    def _own_prompt_errors(self) -> Iterator[str]:
        data, distill = self.data, self.algorithm.distill
        for role, teacher in self.teachers.items():
            own = [f"{teacher_key(role)}.{name}" for name in teacher.own_prompt]
            if teacher.system_prompt is not None and (column := teacher.system_prompt_column) is not None:
                yield f"{own[0]} is not read beside {own[0]}_column={column}; leave one out"
            if teacher.item_text and not distill.knows_extended(role) and data.prompt_extend_tokens != "replace":
                drops = f"data.prompt_extend_tokens={data.prompt_extend_tokens} leaves out its prompts with items"
                yield f"{own[-1]}={teacher.item_text}: {drops}; set it to replace"
            if own and not self.algorithm.distils:
                yield f"{own[0]} has no effect without distillation; leave it out"
            if own and data.truncation != "error" and not data.filter_overlong_prompts:
                yield f"{own[0]}: data.truncation={data.truncation} cuts prompts; set data.filter_overlong_prompts=True"

    def _average_errors(self) -> Iterator[str]:
        """What a teacher that follows the student cannot do."""
        model, trainer = self.actor_rollout_ref.model, self.trainer
        for name, teacher in self.algorithm.distill.teachers.items():
            key = f"algorithm.distill.teachers.{name}"
            if teacher.ema is None:
                continue
            if place := teacher.path or teacher.url or teacher.engine:
                yield f"{key}.ema={teacher.ema} is an average of the student, and not of {place}; leave one out"
            if self.teacher_ranks_on_nodes:
                apart = f"trainer.teacher_n_gpus_per_node={trainer.teacher_n_gpus_per_node}"
                yield f"{key}.ema={teacher.ema} follows the student on its own ranks; set {apart} to null"
            if model.lora_rank:
                what = f"actor_rollout_ref.model.lora_rank={model.lora_rank}"
                yield f"{key}.ema={teacher.ema} averages all weights, and {what} trains an adapter; set it to 0"

    def _keep_errors(self) -> Iterator[str]:
        steered, weights = {group for _, _, group in self.trainer.kept}, self.data.source_weights
        if steered and not steered < weights.keys():
            what = f"trainer.keep={self.trainer.keep} steers the shares of {sorted(steered)}"
            fix = "add what is missing, or end a bound with `by` and one of the groups"
            yield f"{what} and needs one group more for the rest of a batch in data.source_weights={weights}; {fix}"

    def _prompt_errors(self) -> Iterator[str]:
        data, rollout, distill = self.data, self.actor_rollout_ref.rollout, self.algorithm.distill
        tools, synthetic = rollout.multi_turn.tool_config_path, data.synthetic_item_prompts
        if tools and data.truncation != "error" and not data.filter_overlong_prompts:
            # The chat template puts the tools into the prompt.
            what = f"the tools of {_ROLLOUT}.multi_turn.tool_config_path={tools}"
            yield f"data.truncation={data.truncation} would cut {what}; set data.filter_overlong_prompts=True"
        if not synthetic.count or rollout.extend_vocab_start_token is None:
            return
        key = f"data.synthetic_item_prompts.count={synthetic.count}"
        if distill.coef:
            estimator = f"algorithm.adv_estimator={self.algorithm.adv_estimator}"
            yield f"{key} makes rows without an answer to reward, and {estimator} needs rewards; leave it out"
        unread = [s for s in synthetic.sources if not distill.teacher_knows_extended(s, has_extended=True)]
        if unread:
            yield (
                f"{key} makes rows of the sources {unread}, and no teacher that knows item tokens scores them; set "
                f"++algorithm.distill.teachers.self='{{vocabulary: full, sources: [\"{synthetic.source}_*\"]}}'"
            )

    def _vocabulary_errors(self) -> Iterator[str]:
        """Settings that need extended ids."""
        actor, distill = self.actor_rollout_ref.actor, self.algorithm.distill
        key, start = f"{_ROLLOUT}.extend_vocab_start_token", self.actor_rollout_ref.rollout.extend_vocab_start_token
        if start == "auto" and self.trainer.vocab_check == "off":
            yield f"{key}=auto needs the comparison that trainer.vocab_check=off leaves out; set it to warn"
        if start == "auto" and self.actor_rollout_ref.ref.url and not self.actor_rollout_ref.ref.model.path:
            fix = "give the number, or a folder with the teacher's tokenizer in actor_rollout_ref.ref.model.path"
            yield f"{key}=auto compares tokenizers, and that of actor_rollout_ref.ref.url is not here; {fix}"
        if start is not None:  # auto counts as an extension until it is resolved
            return
        settings = {
            _ACTOR: changed(actor, "freeze_extended_rows"),
            "actor_rollout_ref.model": changed(self.actor_rollout_ref.model, "lora_extended_rows"),
            "algorithm.distill": changed(distill, "leak_coef", "support"),
        }
        for name, teacher in distill.teachers.items():
            of_stitched = ["vocabulary"] if teacher.is_stitched else []
            settings[f"algorithm.distill.teachers.{name}"] = changed(teacher, "prompts", *of_stitched)
        for where, fields in settings.items():
            for name, (value, default) in fields.items():
                setting = f"{where}.{name}={value}"
                yield f"{setting} has no effect without extended ids; set {key}, or leave it at {default}"


def teacher_key(role: str) -> str:
    """The section of a teacher in ``PPOConfig.teachers``."""
    return "actor_rollout_ref.ref" if role == BASE_TEACHER else f"algorithm.distill.teachers.{role}"


def _raise_all(*groups: Iterator[str]) -> None:
    if messages := [message for group in groups for message in group]:
        raise ValueError("\n".join(messages))
