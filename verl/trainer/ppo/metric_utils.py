"""Metrics of a batch: advantages, lengths, speed, distillation over an extended vocabulary.

In:  a `DataProto` after the update, or stage timings. Out: flat dicts of floats.
Not here: ``actor/*``, which the workers measure, ``distill/engine_gap*`` and ``distill/teacher_canary``
(``guards``), rewards of validation (``validation_metrics``), and where metrics are logged (``utils.tracking``).

A mean over nothing, such as that of a source without a trained token, is left out.

Letters: B sequences, R response tokens. "Trained" is ``response_mask`` 1; "shared" is trained and known to the
teacher (``distill_special_token_mask`` 0); E is the extended vocabulary.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from verl.config.algorithm import AlgoConfig
from verl.ops.policy_loss import zero_outside_mask
from verl.protocol import DataProto
from verl.trainer.ppo.advantage import distillation_advantage, known_token_mask
from verl.utils.torch_functional import knows_extended, real_response_tokens

Metrics = dict[str, float]


def reduce_metrics(metrics: Mapping[str, Any]) -> Metrics:
    """Lists of metrics as one each: the largest if a key's last part holds ``max``, smallest if ``min``, else mean."""

    def reduce(key: str, values: Any) -> float:
        last = key.rsplit("/", 1)[-1]
        return float(np.max(values) if "max" in last else np.min(values) if "min" in last else np.mean(values))

    return {key: reduce(key, values) for key, values in metrics.items()}


def _summary(prefix: str, values: torch.Tensor) -> Metrics:
    """``<prefix>/mean``, ``max`` and ``min`` of the values; nothing where there are none."""
    values = values.float()
    return {f"{prefix}/{name}": getattr(values, name)().item() for name in ("mean", "max", "min") if values.numel()}


def _mean(name: str, values: torch.Tensor) -> Metrics:
    return {name: values.float().mean().item()} if values.numel() else {}


def compute_data_metrics(batch: DataProto) -> Metrics:
    """Rewards, advantages, lengths and turns under verl's names, and how far the sampler is from the policy.

    - ``critic/score``, ``critic/rewards``: sums over a row of ``token_level_scores``, ``token_level_rewards``.
    - ``reward_extra/<key>`` and ``reward_extra/<source>/<key>``: see `reported_means`.
    - ``critic/advantages``, ``critic/returns``: trained tokens. ``actor/entropy``: mean over them, nats.
    - ``response_length``, ``prompt_length``: tokens; ``clip_ratio``: share of rows that reach the limit, which for
      responses is ``rollout/horizon`` where training answers are cut there (``meta_info["horizon"]``).
    - ``num_turns``: turns of the conversation.
    - ``training/rollout_probs_diff_*`` and ``rollout_corr/*``: see `_sampler_metrics`.
    """
    trained = batch.tensor("response_mask").bool()
    responses = real_response_tokens(batch)
    prompts = batch.tensor("attention_mask")[:, : -responses.shape[1]].bool()
    metrics: Metrics = {}
    for name, key in (("score", "token_level_scores"), ("rewards", "token_level_rewards")):
        if key in batch.batch:
            metrics |= _summary(f"critic/{name}", batch.tensor(key).sum(dim=-1))
    for name in ("advantages", "returns"):
        if name in batch.batch:
            metrics |= _summary(f"critic/{name}", batch.tensor(name)[trained])
    if "entropys" in batch.batch:
        metrics |= _mean("actor/entropy", batch.tensor("entropys")[trained])
    horizon = batch.meta_info.get("horizon")
    metrics |= {} if horizon is None else {"rollout/horizon": float(horizon)}
    for name, tokens, limit in (("response_length", responses, horizon), ("prompt_length", prompts, None)):
        lengths = tokens.sum(dim=-1)
        metrics |= _summary(name, lengths) | _mean(f"{name}/clip_ratio", lengths == (limit or tokens.shape[1]))
    if "__num_turns__" in batch.non_tensor_batch:
        metrics |= _summary("num_turns", torch.tensor(batch.array("__num_turns__").astype(np.int64)))
    metrics |= overall_and_per_source("reward_extra", batch, reported_means)
    return metrics | _sampler_metrics(batch, trained)


def _sampler_metrics(batch: DataProto, trained: torch.Tensor) -> Metrics:
    """Distance of the sampler's distribution from the policy's, over trained tokens.

    - ``training/rollout_probs_diff_{mean,max,std}``: ``|p_sampler(y) - p_policy(y)|``; large where an engine lags
      behind or rounds differently. ``training/rollout_log_probs_diff_{mean,max}``: the same of the log-probs; a sampler
      that cuts its tail (top-p, top-k) adds to both. ``distill/engine_gap`` (``guards``) is the mean where none does.
    - ``rollout_corr/kl``: estimate of KL(sampler || policy), nats.
    - ``rollout_corr/rollout_is_{mean,max}``: importance weights; ``..._eff_sample_size``: (sum w)^2 / (n sum w^2).
    """
    if "rollout_log_probs" not in batch.batch or "old_log_probs" not in batch.batch or not trained.any():
        return {}
    # In float64: the KL is a small mean of differences between nearly equal numbers.
    sampler = batch.tensor("rollout_log_probs")[trained].double()
    policy = batch.tensor("old_log_probs")[trained].double()
    probs, log_probs = (sampler.exp() - policy.exp()).abs(), (sampler - policy).abs()
    measured = {
        "training/rollout_probs_diff_mean": probs.mean(),
        "training/rollout_probs_diff_max": probs.max(),
        "training/rollout_probs_diff_std": probs.std(correction=0),
        "training/rollout_log_probs_diff_mean": log_probs.mean(),
        "training/rollout_log_probs_diff_max": log_probs.max(),
        "rollout_corr/kl": (sampler - policy).mean(),
    }
    if "rollout_is_weights" in batch.batch:
        weights = batch.tensor("rollout_is_weights")[trained].double()
        squares = (len(weights) * weights.square().sum()).clamp(min=1e-12)
        measured["rollout_corr/rollout_is_mean"] = weights.mean()
        measured["rollout_corr/rollout_is_max"] = weights.max()
        measured["rollout_corr/rollout_is_eff_sample_size"] = weights.sum().square() / squares
    return {name: value.item() for name, value in measured.items()}


def compute_timing_metrics(batch: DataProto, timing_raw: Mapping[str, float]) -> Metrics:
    """``timing_s/<stage>`` in seconds, and ``timing_per_token_ms/<stage>`` in milliseconds per token it worked on."""
    response_tokens = int(real_response_tokens(batch).sum())
    all_tokens = int(batch.tensor("attention_mask").sum())
    metrics = {f"timing_s/{stage}": seconds for stage, seconds in timing_raw.items()}
    for stage, seconds in timing_raw.items():
        tokens = response_tokens if stage == "gen" else all_tokens
        if stage != "step" and tokens:
            metrics[f"timing_per_token_ms/{stage}"] = seconds * 1000 / tokens
    return metrics


def compute_throughout_metrics(batch: DataProto, timing_raw: Mapping[str, float], n_gpus: int) -> Metrics:
    """Speed of a step: tokens (prompt and response), seconds, and tokens per second and rank of the student.

    ``perf/generated_tokens_per_s`` is response tokens over the time of the ``gen`` stage, over all engines.
    """
    tokens, seconds = int(batch.tensor("attention_mask").sum()), timing_raw["step"]
    metrics = {
        "perf/total_num_tokens": float(tokens),
        "perf/time_per_step": seconds,
        "perf/throughput": tokens / (seconds * n_gpus),
    }
    if timing_raw.get("gen"):
        metrics["perf/generated_tokens_per_s"] = int(real_response_tokens(batch).sum()) / timing_raw["gen"]
    return metrics


def compute_pace_metrics(batch: DataProto, timing_raw: Mapping[str, float], n_gpus: int, step: int) -> Metrics:
    """Timings, speed, and where a run is: step, epoch, and how often the launch script has started it again."""
    metrics = compute_timing_metrics(batch, timing_raw) | compute_throughout_metrics(batch, timing_raw, n_gpus)
    restarts = int(os.environ.get("RESTART_COUNT", "0"))
    place = {"training/global_step": step, "training/epoch": batch.meta_info["epoch"]}
    return metrics | place | {"training/restarts": restarts}


def rows_by_source(batch: DataProto) -> dict[str, np.ndarray]:
    """Row numbers by data source, in the order of their names; empty where rows name none."""
    # data.data_source_key fills the first; the reward function gets the second.
    for key in ("source", "data_source"):
        if key in batch.non_tensor_batch:
            names = batch.array(key).astype(str)
            return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
    return {}


def overall_and_per_source(
    prefix: str, batch: DataProto, measure: Callable[[DataProto], Metrics], roles: Sequence[str] = ()
) -> Metrics:
    """``<prefix>/<name>`` over all rows and ``<prefix>/<source>/<name>`` over those of each source.

    Args:
        roles: of the teachers; where there are several, ``<prefix>_teacher/<role>/<name>`` is over the rows of each: a
            family of its own, for data sources may have any name.
    """
    places: dict[str, Any] = {prefix: slice(None)}
    places |= {f"{prefix}/{source}": rows for source, rows in rows_by_source(batch).items()}
    if roles and "teacher" in batch.batch:
        teacher = batch.tensor("teacher")
        places |= {f"{prefix}_teacher/{roles[place]}": teacher == place for place in teacher.unique().tolist()}
    return {f"{family}/{name}": v for family, rows in places.items() for name, v in measure(batch[rows]).items()}


def _gap(batch: DataProto) -> torch.Tensor:
    """(B, R) log p_student - log p_teacher of the tokens that were drawn, nats."""
    return batch.tensor("old_log_probs").float() - batch.tensor("ref_log_prob").float()


def _reverse_kl(batch: DataProto) -> Metrics:
    """Mean of log p_student - log p_teacher over shared tokens, nats a token, both over the ids that both know."""
    gap = _gap(batch)
    if "extend_mass" in batch.batch:
        # Without this the estimate falls, even below 0, the more mass a student gives to ids that its teacher lacks.
        inside = torch.log1p(-batch.tensor("extend_mass").float().clamp(max=1 - 1e-6))
        gap = torch.where(knows_extended(batch)[:, None], gap, gap - inside)
    return _mean("reverse_kl", gap[known_token_mask(batch)])


def _trained_extended(batch: DataProto) -> torch.Tensor:
    """(B, R) bool: trained tokens of E."""
    return batch.tensor("response_mask").bool() & batch.tensor("distill_special_token_mask").bool()


def _extended_reverse_kl(batch: DataProto) -> Metrics:
    """The reverse KL at tokens of E, over rows whose teacher knows them (elsewhere its log-prob is a stand-in)."""
    return _mean("extend_reverse_kl", _gap(batch)[_trained_extended(batch) & knows_extended(batch)[:, None]])


def _extended_share(batch: DataProto, bounds: tuple[float, float], weights: Sequence[float]) -> Metrics:
    """Share of distillation's |advantage| that lies on tokens of E; ``weights``: of each teacher's rows."""
    strength = zero_outside_mask(_gap(batch).neg().clamp(*bounds).abs(), batch.tensor("response_mask")).double()
    if "teacher" in batch.batch:
        strength *= torch.tensor(weights)[batch.tensor("teacher")][:, None]
    total = strength.sum().item()
    return {"extend_adv_share": strength[_trained_extended(batch)].sum().item() / total} if total else {}


def _extension_metrics(batch: DataProto) -> Metrics:
    """How often, how much and how early the student leaves the shared vocabulary."""
    extended = batch.tensor("distill_special_token_mask").bool()
    leaks = extended.any(dim=-1)
    metrics = _mean("extend_seq_ratio", leaks) | _mean("extend_token_ratio", extended[real_response_tokens(batch)])
    # As ints: torch has no argmax of bools. Of equal values it gives the first.
    metrics |= _mean("first_leak_position", extended[leaks].int().argmax(dim=-1))
    if "extend_mass" in batch.batch:
        metrics |= _mean("extend_mass", batch.tensor("extend_mass")[batch.tensor("response_mask").bool()])
    return metrics


def _clip_metrics(batch: DataProto, bounds: tuple[float, float]) -> Metrics:
    """Shares of trained tokens whose advantage lies beyond a bound; 0 for a bound that is infinite."""
    advantages = -_gap(batch)[batch.tensor("response_mask").bool()]
    return _mean("adv_clipfrac_low", advantages < bounds[0]) | _mean("adv_clipfrac_high", advantages > bounds[1])


def _coverage_metrics(batch: DataProto) -> Metrics:
    """How much of the batch is trained on."""
    trained, responses = batch.tensor("response_mask").bool(), real_response_tokens(batch)
    metrics = {"num_sequences": float(len(batch)), "trained_tokens": float(trained.sum())}
    metrics |= _mean("trained_token_ratio", trained[responses])
    metrics |= _mean("masked_seq_ratio", ~trained.any(dim=-1))
    if "entropys" in batch.batch:
        metrics |= _mean("entropy", batch.tensor("entropys")[trained])
    return metrics


def compute_on_policy_distill_data_metrics(batch: DataProto, config: AlgoConfig | None = None) -> Metrics:
    """The ``distill/*`` family, over all rows, as ``distill/<source>/*`` per data source, and where there are several
    teachers as ``distill_teacher/<role>/*`` over the rows of each.

    - ``reverse_kl``: mean log p_student - log p_teacher over shared tokens, nats; where the teacher lacks E, p_student
      is normalised over the shared ids too, so that mass on E does not count.
    - ``extend_reverse_kl``: mean log p_student - log p_teacher over tokens of E, of rows whose teacher knows them.
    - ``extend_adv_share``: share of the summed |advantage| of distillation, after clipping, that lies on tokens of E.
    - ``extend_seq_ratio``, ``extend_token_ratio``: share of sequences, of response tokens, with an id in E.
    - ``extend_mass``: the student's mean probability of E at trained positions.
    - ``first_leak_position``: mean index in the response (from 0) of the first id in E, over sequences that have one.
    - ``adv_clipfrac_low``, ``adv_clipfrac_high``: shares of trained tokens that a bound clips.
    - ``num_sequences``, ``trained_tokens``, ``trained_token_ratio`` (of response tokens), ``masked_seq_ratio``
      (sequences that train nothing), ``entropy`` (nats, trained tokens).

    Without ``extend_adv_share`` and ``adv_clipfrac_*`` where the objective follows no advantage.

    Args:
        batch: with ``old_log_probs``, ``ref_log_prob``, ``response_mask``, ``distill_special_token_mask``,
            ``attention_mask``, ``responses``; ``extend_mass`` and ``entropys`` where they were computed.
        config: gives the objective, the bounds of the advantage and the teachers; None: drawn tokens, no bounds.
    """
    config = config or AlgoConfig()
    distill, low, high = config.distill, config.distill_adv_min_clip, config.distill_adv_max_clip
    bounds = -math.inf if low is None else low, math.inf if high is None else high
    weights = [distill.weight_of(role) for role in distill.roles]

    def measure(rows: DataProto) -> Metrics:
        metrics = _reverse_kl(rows) | _extended_reverse_kl(rows) | _extension_metrics(rows) | _coverage_metrics(rows)
        if not distill.is_divergence:
            metrics |= _extended_share(rows, bounds, weights) | _clip_metrics(rows, bounds)
        return metrics

    return overall_and_per_source("distill", batch, measure, distill.roles)


def compute_advantage_part_metrics(batch: DataProto, config: AlgoConfig) -> Metrics:
    """What reward and distillation each put into the advantage, where it is the sum of both.

    ``advantage/*`` over all rows, ``advantage/<source>/*``, ``advantage_teacher/<role>/*``; means over trained tokens:

    - ``task_abs``, ``distill_abs``: |advantage| of the reward's part and of distillation's, ``coef`` included.
    - ``distill_share``: the second as a share of both.
    """

    def measure(rows: DataProto) -> Metrics:
        trained, part = rows.tensor("response_mask").bool(), distillation_advantage(rows, config)
        # The batch holds the sum alone, so the task's part is what distillation's leaves of it.
        task, distill = (rows.tensor("advantages") - part)[trained].abs(), part[trained].abs()
        metrics = _mean("task_abs", task) | _mean("distill_abs", distill)
        if total := (task.double().sum() + distill.double().sum()).item():
            metrics["distill_share"] = distill.double().sum().item() / total
        return metrics

    return overall_and_per_source("advantage", batch, measure, config.distill.roles)


def compute_validation_distill_metrics(batch: DataProto) -> Metrics:
    """``val/reverse_kl``, ``val/extend_seq_ratio`` and ``val/response_length``, and ``val/<source>/*``.

    As in training, but on held-out prompts: the reverse KL is over shared tokens of the student's own answers, of those
    that are trained. With ``mask_response_if_have_extend_token`` answers that leak are not among them.
    """

    def measure(rows: DataProto) -> Metrics:
        leaks = rows.tensor("distill_special_token_mask").bool().any(dim=-1)
        length = _mean("response_length", real_response_tokens(rows).sum(dim=-1))
        return _reverse_kl(rows) | _mean("extend_seq_ratio", leaks) | length

    return overall_and_per_source("val", batch, measure)


def reported_means(batch: DataProto) -> Metrics:
    """Mean of each number that the reward function returned with the score, by key, over the rows that have it."""
    if "reward_extra" not in batch.non_tensor_batch:
        return {}
    numbers: dict[str, list[float]] = {}
    for reported in batch.array("reward_extra"):
        for key, value in reported.items():
            if (number := as_number(value)) is not None:
                numbers.setdefault(key, []).append(number)
    return {key: sum(values) / len(values) for key, values in numbers.items()}


def as_number(value: Any) -> float | None:
    """A bool, a number or a scalar of NumPy or torch as a float; None for all else."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor) and math.prod(value.shape) == 1:
        value = value.item()
    return float(value) if isinstance(value, int | float) else None
