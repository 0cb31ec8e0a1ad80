"""What one model can do: IFEval, distance to the teacher, recommendations, titles; prompt by prompt.

In: a model, the teacher, data and prompts. Out: a folder with

    outcomes.json   by metric, a pair of numbers per prompt, the same prompts in the same order for every model: what
                    counts (1 or 0; hits; summed nats), and of how much (1; targets; tokens). A mean is sum over sum
    answers.jsonl   greedy answers beside what was asked and how they were judged, to read

    ifeval_{prompt,instruction}_{strict,loose}   greedy answers; all of a prompt's instructions, or each
    reverse_kl, reverse_kl_ifeval   log p_model - log p_teacher, both over the ids that both know, of the model's own
                                    tokens up to its first item token; on held-out general prompts, and on IFEval's
    leak, leak_ifeval               of the same answers, those with an item token
    recall_{1,5,10,20}              items ranked under the catalogue's trie; popular_* is the most purchased ones
    free_hit, free_item             unconstrained answers that are the item wanted, any item of the catalogue
    title_of_item, item_of_title    exact answers
"""

import asyncio
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from experiments.real_model import ifeval
from experiments.real_model.data import ITEM, NEXT, TITLE
from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.scoreboard import scoring
from recipe.onpolicy_distill.scoreboard.answers import Answerer
from recipe.onpolicy_distill.scoreboard.items import ItemTrie, listed_items
from recipe.onpolicy_distill.scoreboard.measures import recall_at
from recipe.onpolicy_distill.scoreboard.questions import Question, read_questions
from recipe.onpolicy_distill.scoreboard.ranking import Ranking
from verl.config import AlgoConfig, DataConfig, RolloutConfig
from verl.trainer.ppo.advantage import known_token_mask
from verl.utils.dataset.items import ITEM_BEGIN, read_catalogue
from verl.utils.dataset.prompt_tokens import PromptEncoder
from verl.utils.device import get_device_name
from verl.utils.tokenizer import answer_text, hf_tokenizer

KS = (1, 5, 10, 20)
MAX_PROMPT_TOKENS = 1024
REC_TOKENS = 24
"""Of an item, or a title."""
Outcomes = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class JudgeConfig:
    """How much is asked."""

    seed: int = 0
    ifeval_prompts: int | None = None
    """The first ones; None: all."""
    ifeval_tokens: int = 400
    chat_tokens: int = 96
    """Of the sampled answers that the distance is measured on."""
    rollout: tuple[tuple[str, Any], ...] = ()
    """Settings of the engine."""


class _Answers(NamedTuple):
    greedy: list[list[int]]
    sampled: list[list[int]]
    rankings: list[Ranking]


def judge(model: Path, teacher: Path, files: Sequence[Path], shared: Path, folder: Path, config: JudgeConfig) -> Path:
    """Measure into a folder of its own below ``folder``, or find it there.

    Args:
        files: folders of data and of prompts.
        shared: holds IFEval's prompts, or not; then it is left out.

    Raises:
        RuntimeError: IFEval's verifier is not installed, or the engine failed.
    """
    data, prompts = files
    documents = ifeval.read_prompts(shared, config.ifeval_prompts)
    key = {
        "code": file_digest(__file__, str(ifeval.__file__)),
        "model": file_digest(model / "model.safetensors"),
        "of": [teacher.name, data.name, prompts.name],
        "ifeval": len(documents),
        **asdict(config),
    }

    def make(target: Path) -> None:
        outcomes, answers = _measure(model, teacher, data, prompts / "general_test.parquet", documents, config)
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        (target / "answers.jsonl").write_text(lines, encoding="utf-8")
        (target / "outcomes.json").write_text(json.dumps(outcomes) + "\n", encoding="utf-8")

    return cached_folder(folder, "judged", key, make)


def _measure(
    model: Path, teacher: Path, data: Path, general: Path, documents: list[dict[str, Any]], config: JudgeConfig
) -> tuple[Outcomes, list[dict[str, Any]]]:
    tokenizer = hf_tokenizer(model)
    vocabulary = tokenizer.get_vocab()
    chat = _read(general, tokenizer)
    instructed = _ifeval_questions(documents, tokenizer)
    asked = {"chat": chat, "ifeval": instructed[: len(chat)]}
    catalogue, trie = read_catalogue(data / "catalogue.parquet"), None
    by_source = defaultdict[str, list[Question]](list)
    if ITEM_BEGIN in vocabulary:
        trie = ItemTrie(catalogue, tokenizer)
        for question in _read(data / "rec_test.parquet", tokenizer):
            by_source[question.source].append(question)
    rec = [question for source in (NEXT, TITLE, ITEM) for question in by_source[source]]
    sampled = [question for questions in asked.values() for question in questions]
    answers = asyncio.run(_ask(model, config, instructed, rec, sampled, by_source[NEXT], trie))
    texts = [answer_text(tokenizer, ids) for ids in answers.greedy]
    split = len(instructed)
    outcomes, verdicts = _ifeval_outcomes(documents, texts[:split])
    outcomes |= _distances(model, teacher, asked, answers.sampled, tokenizer)
    outcomes |= _rec_outcomes(rec, texts[split:], answers.rankings, set(catalogue))
    if trie is not None:
        outcomes |= _popularity(data, by_source[NEXT])
    rows = [
        {"source": q.source, "prompt": q.prompt, "wanted": q.wanted, "answer": text, "followed": followed}
        for q, text, followed in zip([*instructed, *rec], texts, [*verdicts, *[None] * len(rec)], strict=True)
    ]
    return outcomes, rows


def _read(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    return read_questions(path, tokenizer, max_prompt_length=MAX_PROMPT_TOKENS, extend_vocab_start_token=None)


def _ifeval_questions(documents: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Question]:
    encoder = PromptEncoder(tokenizer, DataConfig(max_prompt_length=MAX_PROMPT_TOKENS))
    encoded = encoder.encode([[{"role": "user", "content": document["prompt"]}] for document in documents])
    return [
        Question(str(document["key"]), "ifeval", document["prompt"], ids, "")
        for document, ids in zip(documents, encoded, strict=True)
    ]


async def _ask(
    model: Path,
    config: JudgeConfig,
    instructed: list[Question],
    rec: list[Question],
    sampled: list[Question],
    ranked: list[Question],
    trie: ItemTrie | None,
) -> _Answers:
    """Everything that is generated, by one engine: greedy answers to ``instructed`` and then to ``rec``."""
    settings: dict[str, Any] = {"prompt_length": MAX_PROMPT_TOKENS, "gpu_memory_utilization": 0.8}
    settings["response_length"] = max(config.ifeval_tokens, config.chat_tokens, REC_TOKENS)
    answerer = Answerer(str(model), RolloutConfig(**settings | dict(config.rollout)), get_device_name())
    try:
        await answerer.launch()
        greedy = await answerer.greedy(instructed, config.ifeval_tokens)
        greedy += await answerer.greedy(rec, REC_TOKENS)
        drawn = await answerer.sampled(sampled, config.chat_tokens, 1.0, config.seed)
        rankings = [] if trie is None else await answerer.ranked(ranked, trie, max(KS))
    finally:
        await answerer.shutdown()
    return _Answers(greedy, drawn, rankings)


def _ifeval_outcomes(documents: list[dict[str, Any]], texts: list[str]) -> tuple[Outcomes, list[dict[str, list[bool]]]]:
    verdicts = [ifeval.verdicts(document, text) for document, text in zip(documents, texts, strict=True)]
    outcomes: Outcomes = {}
    for mode in ifeval.MODES if documents else ():
        followed = [verdict[mode] for verdict in verdicts]
        outcomes[f"ifeval_prompt_{mode}"] = [(float(all(each)), 1.0) for each in followed]
        outcomes[f"ifeval_instruction_{mode}"] = [(float(sum(each)), float(len(each))) for each in followed]
    return outcomes, verdicts


def _distances(
    model: Path,
    teacher: Path,
    asked: dict[str, list[Question]],
    sampled: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
) -> Outcomes:
    """The reverse KL and leaks of the sampled answers; the teacher is at no distance of itself."""
    extend_start = len(hf_tokenizer(teacher))
    settings = scoring.ScoringConfig(
        model=str(model),
        teacher=str(teacher),
        extend_vocab_start_token=extend_start,
        temperature=1.0,
        device=get_device_name(),
        algorithm=AlgoConfig(),
    )
    questions = [question for group in asked.values() for question in group]
    batch = scoring.sampled_batch(questions, sampled, settings, tokenizer.pad_token_id)
    known = known_token_mask(batch)
    gap = known * 0.0
    if model != teacher:
        scored = scoring.score(batch, settings)
        # Of tokens that are no items: what the model gives to items must not make it look near.
        shared_mass = (1 - scored.tensor("extend_mass")).clamp(min=1e-7)
        gap = scored.tensor("old_log_probs") - shared_mass.log() - scored.tensor("ref_log_prob")
        gap = gap.where(known, 0.0)
    nats = list(zip(gap.sum(-1).tolist(), known.sum(-1).float().tolist(), strict=True))
    leaks = [(float(any(token >= extend_start for token in answer)), 1.0) for answer in sampled]
    cut = len(asked["chat"])
    outcomes = {"reverse_kl": nats[:cut], "leak": leaks[:cut]}
    return outcomes | {"reverse_kl_ifeval": nats[cut:], "leak_ifeval": leaks[cut:]} if asked["ifeval"] else outcomes


def _rec_outcomes(
    questions: list[Question], texts: list[str], rankings: list[Ranking], catalogue: set[tuple[int, ...]]
) -> Outcomes:
    outcomes = defaultdict[str, list[tuple[float, float]]](list)
    for question, text in zip(questions, texts, strict=True):
        if question.source != NEXT:
            name = {TITLE: "title_of_item", ITEM: "item_of_title"}[question.source]
            outcomes[name].append((float(text.strip() == question.wanted), 1.0))
            continue
        first = next(iter(listed_items(text)), None)
        outcomes["free_hit"].append((float(first in question.targets), 1.0))
        outcomes["free_item"].append((float(first in catalogue), 1.0))
    for question, ranking in zip(questions, rankings, strict=False):  # those with a ranking come first
        items = [item for item, _ in ranking.items]
        for k in KS:
            outcomes[f"recall_{k}"].append((recall_at(items, question.targets, k), 1.0))
    return dict(outcomes)


def _popularity(data: Path, questions: list[Question]) -> Outcomes:
    """Recall of the items that training has most often, the same ones for every user."""
    rows = pq.read_table(data / "catalogue.parquet", columns=["sid", "popularity"]).to_pylist()
    items = [tuple(row["sid"]) for row in sorted(rows, key=lambda row: -row["popularity"])]
    return {f"popular_{k}": [(recall_at(items, question.targets, k), 1.0) for question in questions] for k in KS}
