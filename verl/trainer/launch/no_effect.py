"""Keys of verl that launch lines carry and that change nothing here.

Where any value is harmless the key is accepted with a notice. Where only some values mean what this project does
anyway, any other is an error: nothing is silently left out of a run.
"""

from dataclasses import dataclass

_MODEL = "actor_rollout_ref.model"
_ACTOR = "actor_rollout_ref.actor"
_REF = "actor_rollout_ref.ref"
_ROLLOUT = "actor_rollout_ref.rollout"
_OFF = ("false", "null")


@dataclass(frozen=True)
class NoEffect:
    """Why a key does nothing here."""

    reason: str
    only: tuple[str, ...] = ()
    """The values that are accepted, in lower case; empty: all."""


NO_EFFECT: dict[str, NoEffect] = {
    # data
    "data.image_key": NoEffect("prompts are text"),
    "data.video_key": NoEffect("prompts are text"),
    "data.return_multi_modal_inputs": NoEffect("prompts are text"),
    "data.return_raw_input_ids": NoEffect("agent loops read the messages"),
    "data.return_full_prompt": NoEffect("agent loops read the messages"),
    "data.filter_overlong_prompts_workers": NoEffect("one process counts the tokens of all prompts"),
    "data.return_raw_chat": NoEffect("agent loops read the messages", ("true",)),
    "data.use_shm": NoEffect("files are read where they are"),
    # trainer
    "trainer.default_hdfs_dir": NoEffect("checkpoints are written to trainer.default_local_dir alone"),
    "trainer.del_local_ckpt_after_load": NoEffect("checkpoints stay; see trainer.max_actor_ckpt_to_keep", _OFF),
    "trainer.max_critic_ckpt_to_keep": NoEffect("there is no critic"),
    "trainer.critic_warmup": NoEffect("there is no critic"),
    "trainer.ray_wait_register_center_timeout": NoEffect("worker groups need no register center"),
    "trainer.max_restarts": NoEffect("restarts are the launch script's: MAX_RESTARTS=N"),
    "trainer.use_legacy_worker_impl": NoEffect("there is one implementation of the workers"),
    "ray_kwargs.timeline_json_file": NoEffect("Ray's timeline goes to trainer.ray_timeline_dir", ("null",)),
    # roles that are not built
    "critic.*": NoEffect("there is no critic"),
    "reward_model.enable": NoEffect("rewards come from custom_reward_function", _OFF),
    "reward_model.*": NoEffect("rewards come from custom_reward_function"),
    # model and sharding
    "actor_rollout_ref.hybrid_engine": NoEffect("engine and training workers always share their machines", ("true",)),
    "actor_rollout_ref.nccl_timeout": NoEffect("the process group keeps torch's timeout"),
    f"{_MODEL}.use_shm": NoEffect("weights are read where they are"),
    f"{_MODEL}.external_lib": NoEffect("models come from transformers", ("null",)),
    f"{_MODEL}.use_liger": NoEffect("log-probs come from the hidden states in chunks, without logits in memory"),
    f"{_MODEL}.use_fused_kernels": NoEffect(
        "log-probs come from the hidden states in chunks, without logits in memory"
    ),
    f"{_MODEL}.fused_kernel_options.*": NoEffect("log-probs come from the hidden states in chunks"),
    f"{_MODEL}.lora_rank": NoEffect("all weights are trained", ("0",)),
    f"{_MODEL}.lora_alpha": NoEffect("all weights are trained"),
    f"{_MODEL}.target_modules": NoEffect("all weights are trained"),
    **{
        key: effect
        for role in (_ACTOR, _REF)
        for key, effect in {
            f"{role}.strategy": NoEffect("models are sharded with FSDP2", ("fsdp", "fsdp2")),
            f"{role}.ulysses_sequence_parallel_size": NoEffect("sequences are not split over ranks", ("1",)),
            f"{role}.use_torch_compile": NoEffect("nothing is compiled"),
            f"{role}.entropy_from_logits_with_chunking": NoEffect("entropy is always computed in chunks"),
            f"{role}.entropy_checkpointing": NoEffect("entropy keeps no logits to checkpoint"),
            f"{role}.fsdp_config.fsdp_size": NoEffect("a model is sharded over all ranks", ("-1",)),
            f"{role}.fsdp_config.offload_policy": NoEffect("offload is param_offload and optimizer_offload", _OFF),
            f"{role}.fsdp_config.forward_prefetch": NoEffect("FSDP2 prefetches by itself"),
            f"{role}.fsdp_config.wrap_policy.*": NoEffect("every decoder layer is a sharding unit"),
        }.items()
    },
    # policy update
    f"{_ACTOR}.ppo_micro_batch_size": NoEffect("write ppo_micro_batch_size_per_gpu", ("null",)),
    f"{_ACTOR}.shuffle": NoEffect("mini-batches keep the order of the batch", _OFF),
    f"{_ACTOR}.checkpoint.async_save": NoEffect("write trainer.async_save"),
    f"{_ACTOR}.data_loader_seed": NoEffect("mini-batches keep the order of the batch"),
    f"{_ACTOR}.policy_loss.loss_mode": NoEffect("the loss is PPO's clipped one", ("vanilla",)),
    f"{_ACTOR}.optim.warmup_style": NoEffect("write lr_scheduler_type", ("null", "constant")),
    # generation
    f"{_ROLLOUT}.load_format": NoEffect("the engine's weights come from the student at the first sync"),
    f"{_ROLLOUT}.layered_summon": NoEffect("weights are gathered one tensor at a time"),
    f"{_ROLLOUT}.disable_log_stats": NoEffect("engine statistics are not logged"),
    f"{_ROLLOUT}.update_weights_bucket_megabytes": NoEffect(f"write {_ROLLOUT}.weight_sync_bucket_mb"),
    f"{_ROLLOUT}.do_sample": NoEffect("training always samples", ("true",)),
    f"{_ROLLOUT}.use_fire_sampling": NoEffect("sampling is plain", _OFF),
    f"{_ROLLOUT}.data_parallel_size": NoEffect("replicas follow from the GPUs", ("1",)),
    f"{_ROLLOUT}.expert_parallel_size": NoEffect("experts are not split over GPUs", ("1",)),
    f"{_ROLLOUT}.log_prob_micro_batch_size": NoEffect("write log_prob_micro_batch_size_per_gpu", ("null",)),
    f"{_REF}.log_prob_micro_batch_size": NoEffect("write log_prob_micro_batch_size_per_gpu", ("null",)),
    f"{_ROLLOUT}.mode": NoEffect("every request is served on its own, as it comes", ("async",)),
    f"{_ROLLOUT}.multi_turn.format": NoEffect("tool calls are written as Qwen writes them", ("hermes",)),
    f"{_ROLLOUT}.multi_turn.enable": NoEffect("the agent loop decides; see rollout.agent.default_agent_loop"),
    f"{_ROLLOUT}.multi_turn.use_inference_chat_template": NoEffect("tokens of the model are never tokenised again"),
    f"{_ROLLOUT}.multi_turn.tokenization_sanity_check_mode": NoEffect("tokens of the model are never tokenised again"),
}


def find_no_effect(key: str) -> NoEffect | None:
    """The entry of a key, or of the closest group above it (``critic.*``)."""
    if key in NO_EFFECT:
        return NO_EFFECT[key]
    parts = key.split(".")
    groups = [".".join(parts[:end]) + ".*" for end in range(len(parts), 0, -1)]
    return next((NO_EFFECT[group] for group in groups if group in NO_EFFECT), None)


def no_effect_notice(key: str, effect: NoEffect, value: str) -> str:
    """The line that says a key does nothing.

    Raises:
        ValueError: ``value`` asks for something that is not built here.
    """
    plain = value.strip().strip("'\"").lower()
    plain = {"": "null", "none": "null"}.get(plain, plain)
    if effect.only and plain not in effect.only:
        raise ValueError(
            f"{key}={value} is not built here ({effect.reason}); leave it out or set it to {' or '.join(effect.only)}"
        )
    return f"{key} is accepted and has no effect here: {effect.reason}"
