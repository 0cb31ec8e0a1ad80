"""What student and teacher make of the student's own sampled answers.

In:  questions with the token ids of sampled answers, model folders. Out: the batch that distillation would be trained
on, with the log-probs, masks and advantages of training, computed by the same code in this one process.

Letters: B answers, R response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from recipe.onpolicy_distill.scoreboard.questions import Question
from verl.config import AlgoConfig, HFModelConfig, RefConfig
from verl.experimental.agent_loop.base import AgentLoopMetrics, AgentLoopOutput
from verl.experimental.agent_loop.masks import extended_token_mask, trainable_mask
from verl.experimental.agent_loop.worker import pad_outputs
from verl.protocol import DataProto
from verl.trainer.ppo.advantage import compute_advantage
from verl.trainer.ppo.core_algos import AdvantageEstimator
from verl.trainer.ppo.metric_utils import compute_on_policy_distill_data_metrics
from verl.utils.device import release_cached_memory, resolve_dtype, select_device
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.torch_functional import real_response_tokens
from verl.vocabulary import Vocabulary, choose_replacement
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.fsdp.build import choose_attention, load_config
from verl.workers.fsdp.token_stats_model import BatchSizes, TokenStatsModel

MICRO_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class ScoringConfig:
    """Who scores, and how."""

    model: str
    """The student that wrote the answers."""
    teacher: str | None
    """None: no reverse KL and no advantages."""
    extend_vocab_start_token: int | None
    """First extended id."""
    temperature: float
    """At which the answers were sampled, and at which both models score them."""
    device: str
    """``cpu`` or ``cuda``."""
    algorithm: AlgoConfig
    """Bounds of the advantage."""


def sampled_batch(
    questions: Sequence[Question], answers: Sequence[list[int]], config: ScoringConfig, pad_token_id: int
) -> DataProto:
    """The rollout's tensors of ``verl/protocol.py`` for one sampled answer per question."""
    outputs = [_output(q.prompt_ids, ids, config) for q, ids in zip(questions, answers, strict=True)]
    prompt_length = max(len(output.prompt_ids) for output in outputs)
    response_length = max(1, *(len(output.response_ids) for output in outputs))
    tensors = pad_outputs(outputs, prompt_length, response_length, pad_token_id)
    return DataProto.from_dict(tensors, None, {"temperature": config.temperature})


def _output(prompt: list[int], response: list[int], config: ScoringConfig) -> AgentLoopOutput:
    extended = extended_token_mask(response, config.extend_vocab_start_token)
    return AgentLoopOutput(
        prompt_ids=prompt,
        response_ids=response,
        response_mask=trainable_mask([1] * len(response), extended),
        distill_special_token_mask=extended,
        response_logprobs=None,
        num_turns=2,
        metrics=AgentLoopMetrics(),
        weight_version=0,
    )


def score(batch: DataProto, config: ScoringConfig) -> DataProto:
    """The batch with the student's ``old_log_probs``, ``entropys`` and ``extend_mass`` (B, R), and, with a teacher,
    its ``ref_log_prob`` and the ``advantages``.
    """
    sizes = BatchSizes(max(MICRO_BATCH_TOKENS, batch.tensor("input_ids").shape[1]), None)
    batch = batch.union(
        DataProto.from_dict(_load_actor(config.model, config, sizes, is_teacher=False).compute_token_stats(batch))
    )
    # Nothing holds the student by now: the two models need not fit side by side.
    release_cached_memory(config.device)
    if config.teacher is None:
        return batch
    log_probs, _ = _load_actor(config.teacher, config, sizes, is_teacher=True).compute_log_prob(
        batch, mask_special_token=True
    )
    release_cached_memory(config.device)
    batch = batch.union(DataProto.from_dict({"ref_log_prob": log_probs}))
    return compute_advantage(batch, AdvantageEstimator.ON_POLICY_DISTILL, config=config.algorithm)


def distillation_metrics(batch: DataProto, extended: bool) -> dict[str, float]:
    """Metrics of a scored batch, as training measures them (``distill/*``).

    ``leak_rate`` (share of answers with an extended token), ``extend_mass`` (mean probability of extended tokens at
    trained positions), where there are any, ``entropy`` (nats a token), and, with a teacher, ``reverse_kl`` (mean over
    the shared tokens, nats).
    """
    has_teacher = "ref_log_prob" in batch.batch
    if not has_teacher:  # the model as its own teacher: all but the reverse KL is as it would be
        batch = batch.union(DataProto.from_dict({"ref_log_prob": batch.tensor("old_log_probs")}))
    measured = compute_on_policy_distill_data_metrics(batch)
    names = {"entropy": "entropy"}
    names |= {"leak_rate": "extend_seq_ratio", "extend_mass": "extend_mass"} if extended else {}
    names |= {"reverse_kl": "reverse_kl"} if has_teacher else {}
    return {name: measured[f"distill/{key}"] for name, key in names.items() if f"distill/{key}" in measured}


def describe_tokens(batch: DataProto, row: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Each token of an answer for a person to look at: text, advantage, log-probs, and how training treats it."""
    written = int(real_response_tokens(batch)[row].sum())
    metrics = {"student_log_prob": "old_log_probs", "teacher_log_prob": "ref_log_prob", "advantage": "advantages"}
    return [
        {
            "text": tokenizer.decode([int(batch.tensor("responses")[row, position])]),
            "extended": bool(batch.tensor("distill_special_token_mask")[row, position]),
            "masked": not bool(batch.tensor("response_mask")[row, position]),
            **{
                name: round(float(batch.tensor(key)[row, position]), 4)
                for name, key in metrics.items()
                if key in batch.batch
            },
        }
        for position in range(written)
    ]


def _load_actor(path: str, config: ScoringConfig, sizes: BatchSizes, *, is_teacher: bool) -> DataParallelPPOActor:
    """A frozen model, whole, on one device."""
    model, tokenizer, dtype = HFModelConfig(path=path), hf_tokenizer(path), resolve_dtype("auto", config.device)
    hf_config = load_config(path, model)
    attention, packed = choose_attention(hf_config, model, config.device, dtype)
    disable_progress_bar()
    causal_lm = AutoModelForCausalLM.from_pretrained(path, config=hf_config, dtype=dtype, attn_implementation=attention)
    module = TokenStatsModel(causal_lm.to(select_device(config.device, 0)), packed)
    vocabulary = Vocabulary(len(tokenizer), config.extend_vocab_start_token)
    replacement = None
    if is_teacher:
        vocabulary = vocabulary._replace(ids=vocabulary.shared_ids())
        replacement = choose_replacement(None, tokenizer, vocabulary.ids)
    vocabulary.check_head(module.num_rows, path)
    return DataParallelPPOActor(
        RefConfig(),
        module.requires_grad_(False),
        vocabulary=vocabulary,
        scoring_sizes=sizes,
        replace_token_id=replacement,
    )
