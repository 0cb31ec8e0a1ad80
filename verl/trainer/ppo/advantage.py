"""From a batch to its advantages: fetches the inputs of an estimator of ``core_algos`` and stores its result.

In:  a `DataProto` with log-probs or rewards, which stays as it is. Out: a new one with the result.
Not here: the formulas (``core_algos``), and where log-probs and rewards come from.

Letters: B sequences, R response tokens.
"""

import inspect
from typing import Any

import torch

from verl.config.algorithm import AlgoConfig, RolloutCorrectionConfig
from verl.ops.policy_loss import LOG_RATIO_LIMIT, zero_outside_mask
from verl.protocol import DataProto
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import AdvantageEstimator, KLController, get_adv_estimator_fn
from verl.utils.torch_functional import knows_extended, masked_mean


def _with_tensors(data: DataProto, tensors: dict[str, torch.Tensor]) -> DataProto:
    """A new batch with these tensors added or replaced, the others shared."""
    return DataProto.from_dict({**dict(data.batch.items()), **tensors}, data.non_tensor_batch, dict(data.meta_info))


def compute_advantage(
    data: DataProto,
    adv_estimator: str | AdvantageEstimator,
    gamma: float = 1.0,
    lam: float = 1.0,
    num_repeat: int = 1,
    norm_adv_by_std_in_grpo: bool = True,
    config: AlgoConfig | None = None,
) -> DataProto:
    """Give every trained token its advantage.

    An estimator gets the inputs that its parameters name: any tensor of the batch by its key (``response_mask``,
    ``old_log_probs``, ``token_level_rewards``, ...), ``index`` (the rows' ``uid``), and the settings below.

    Args:
        data: the batch; ``token_level_scores`` stand in for ``token_level_rewards`` where these are absent and
            ``config.use_kl_in_reward`` is not set.
        adv_estimator: a name in ``ADV_ESTIMATOR_REGISTRY``.
        gamma: discount per token; the built-in estimators take ``config.gamma`` where there is a config.
        lam: for estimators with a value function.
        num_repeat: answers per prompt.
        norm_adv_by_std_in_grpo: divide GRPO advantages by the group's standard deviation.
        config: ``algorithm.*``; holds the bounds of the distillation advantage.

    Returns:
        a new batch with ``advantages`` and ``returns`` (B, R), and ``token_level_rewards`` where they were used.

    Raises:
        ValueError: unknown estimator.
        KeyError: the batch lacks an input; the message names the key and the stage that produces it.
    """
    estimator = get_adv_estimator_fn(adv_estimator)
    settings = {
        "gamma": gamma,
        "lam": lam,
        "num_repeat": num_repeat,
        "norm_adv_by_std_in_grpo": norm_adv_by_std_in_grpo,
        "config": config,
    }
    inputs: dict[str, Any] = {}
    for name, parameter in inspect.signature(estimator).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        optional = parameter.default is not parameter.empty
        if name in settings:
            inputs[name] = settings[name]
        elif name == "token_level_rewards":
            # The task's scores stand in where no KL penalty has to come off them (`apply_kl_penalty`).
            needs_penalty = config is not None and config.use_kl_in_reward
            inputs[name] = data.tensor(name if needs_penalty or name in data.batch else "token_level_scores")
        elif name == "index":
            inputs[name] = data.array("uid")
        elif name in data.batch or not optional:
            inputs[name] = data.tensor(name)
    advantages, returns = estimator(**inputs)
    used = {key: inputs[key] for key in ("token_level_rewards",) if key in inputs}
    return _with_tensors(data, {**used, "advantages": advantages, "returns": returns})


def distillation_advantage(data: DataProto, config: AlgoConfig) -> torch.Tensor:
    """What distillation adds to the advantage of a task reward, or the advantage where there is none.

    ``coef x weight of the row's teacher x clip(log p_teacher - log p_student)`` at trained tokens, 0 elsewhere; see
    ``core_algos.compute_on_policy_distill_reverse_kl``.

    Args:
        data: with ``old_log_probs``, ``ref_log_prob``, ``response_mask``, and ``teacher`` where there are several; on
            any device.
        config: the bounds, ``distill.coef`` (alone distillation weighs 1) and the teachers.

    Returns:
        (B, R) float32.
    """
    distill = config.distill
    advantages, _ = core_algos.compute_on_policy_distill_reverse_kl(
        data.tensor("old_log_probs"), data.tensor("ref_log_prob"), data.tensor("response_mask"), config
    )
    if "teacher" in data.batch:
        of_teacher = torch.tensor([distill.weight_of(role) for role in distill.roles], device=advantages.device)
        advantages = advantages * of_teacher[data.tensor("teacher")][:, None]
    return (distill.coef or 0.0) * advantages if config.learns_from_reward else advantages


def apply_kl_penalty(
    data: DataProto, kl_ctrl: KLController, kl_penalty: str = "kl"
) -> tuple[DataProto, dict[str, float]]:
    """Subtract a KL penalty to the reference from the task's scores, token by token, and move its weight.

    ``token_level_rewards = token_level_scores - kl_ctrl.value * kl`` at trained tokens that the row's reference knows:
    those with ``distill_special_token_mask`` 0, and all where ``teacher_knows_extended``. Elsewhere ``ref_log_prob`` is
    a stand-in.

    Args:
        data: with ``token_level_scores``, ``old_log_probs``, ``ref_log_prob``, ``response_mask``.
        kl_ctrl: weight of the penalty; updated with the KL measured here.
        kl_penalty: estimator, see ``core_algos.kl_penalty``.

    Returns:
        a new batch with ``token_level_rewards`` (B, R); metrics ``actor/reward_kl_penalty`` (mean over sequences of
        the mean KL of their tokens, nats) and ``actor/reward_kl_penalty_coeff`` (the weight that was used).
    """
    mask = torch.where(knows_extended(data)[:, None], data.tensor("response_mask").bool(), known_token_mask(data))
    kl = core_algos.kl_penalty(data.tensor("old_log_probs"), data.tensor("ref_log_prob"), kl_penalty)
    kl = zero_outside_mask(kl, mask)
    weight = kl_ctrl.value
    rewards = data.tensor("token_level_scores") - weight * kl
    # Rows that train nothing are left out of the mean, where they would count as a KL of 0.
    current = masked_mean(masked_mean(kl, mask, axis=-1), mask.any(dim=-1)).item()
    kl_ctrl.update(current_kl=current, n_steps=len(data))
    metrics = {"actor/reward_kl_penalty": current, "actor/reward_kl_penalty_coeff": weight}
    return _with_tensors(data, {"token_level_rewards": rewards}), metrics


def known_token_mask(data: DataProto) -> torch.Tensor:
    """(B, R) bool: trained tokens that student and teacher share."""
    mask = data.tensor("response_mask").bool()
    if "distill_special_token_mask" in data.batch:
        mask = mask & ~data.tensor("distill_special_token_mask").bool()
    return mask


def compute_rollout_is_weights(data: DataProto, config: RolloutCorrectionConfig) -> DataProto:
    """Importance weights from the distribution that was sampled to the policy whose gradient is taken.

    Top-p, top-k or an engine's rounding make the sampler another distribution than the policy. Truncated importance
    sampling: ``min(p_policy(y) / p_sampler(y), rollout_is_threshold)`` per trained token, 0 elsewhere.

    Args:
        data: with ``old_log_probs`` (policy), ``rollout_log_probs`` (sampler), ``response_mask``, all (B, R).
        config: gives the threshold.

    Returns:
        a batch of the new key alone, ``rollout_is_weights`` (B, R) float32.
    """
    mask = data.tensor("response_mask")
    log_ratio = data.tensor("old_log_probs").float() - data.tensor("rollout_log_probs").float()
    weights = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp().clamp(max=config.rollout_is_threshold)
    return DataProto.from_dict({"rollout_is_weights": zero_outside_mask(weights, mask)})


def new_keys(after: DataProto, before: DataProto) -> DataProto:
    """What ``after`` holds and ``before`` lacks."""
    # A TensorDict iterates over rows, so its keys have to be named.
    return after.select(batch_keys=[key for key in after.batch.keys() if key not in before.batch])  # noqa: SIM118
