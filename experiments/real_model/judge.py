"""What one model can do: IFEval, distance to the teacher, recommendations, titles; prompt by prompt.

In: a model, the teacher, data and prompts. Out: a folder with

    outcomes.json   by metric, a pair of numbers per prompt, the same prompts in the same order for every model: what
                    counts (1 or 0; hits; summed nats), and of how much (1; targets; tokens). A mean is sum over sum
    answers.jsonl   greedy answers beside what was asked, to read

    ifeval_{prompt,instruction}_{strict,loose}   greedy answers; all of a prompt's instructions, or each
    reverse_kl           log p_model - log p_teacher, both over the ids that both know, of the model's own answers to
                         held-out general prompts, up to the first item token
    leak, leak_mass      share of more such answers that hold an item token; what the model gives to one, summed over an
                         answer up to the first: the same share in the mean, even where it is too rare to count
    recall_{1,5,10,20}   items ranked under the catalogue's trie. Beside them, without a model: popular_*, the most
                         purchased ones for everyone, and next_*, what followed a user's last item most often
    constant_*           what IFEval gives to one title as the answer to everything: no model should be below that
    free_hit, free_item  unconstrained answers that are the item wanted, any item of the catalogue
    rec_title, rec_item  exact titles of items, items of titles
"""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from experiments.real_model import ifeval
from experiments.real_model.data import NEXT
from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest, key_digest
from recipe.onpolicy_distill.scoreboard import scoring
from recipe.onpolicy_distill.scoreboard.answers import Answerer
from recipe.onpolicy_distill.scoreboard.items import ItemTrie, items_in, listed_items
from recipe.onpolicy_distill.scoreboard.measures import recall_at
from recipe.onpolicy_distill.scoreboard.questions import Question, read_questions
from verl.config import AlgoConfig, DataConfig, RolloutConfig
from verl.trainer.ppo.advantage import known_token_mask
from verl.utils.dataset.items import ITEM_BEGIN, Item, read_catalogue
from verl.utils.dataset.prompt_tokens import PromptEncoder
from verl.utils.device import get_device_name
from verl.utils.tokenizer import answer_text, hf_tokenizer

KS = (1, 5, 10, 20)
MAX_PROMPT_TOKENS = 1024
REC_TOKENS = 24
"""Of an item, or a title."""
Outcomes = dict[str, list[tuple[float, float]]]
CODE = file_digest(__file__, str(ifeval.__file__), *sorted(Path(str(scoring.__file__)).parent.glob("*.py")))
"""Of this start: the files may change while the study runs."""


@dataclass(frozen=True)
class JudgeConfig:
    """How much is asked."""

    seed: int = 0
    bf16: bool = False
    """Answers are written in bf16."""
    ifeval_prompts: int | None = None
    """The first ones; None: all."""
    ifeval_tokens: int = 400
    chat_tokens: int = 96
    """Of the sampled answers that the distance is measured on."""
    chat_answers: int = 8
    """To each of these prompts, in which leaks are counted; the distance is of the first."""
    engine: str = "vllm"


def judge(model: Path, teacher: Path, files: Sequence[Path], shared: Path, folder: Path, config: JudgeConfig) -> Path:
    """Measure into a folder of its own below ``folder``, or find it there.

    Args:
        files: folders of data and of prompts.
        shared: holds IFEval's prompts, or not; then it is left out.

    Raises:
        RuntimeError: IFEval's verifier is not installed, or the engine failed.
    """
    documents = ifeval.read_prompts(shared, config.ifeval_prompts)
    key = {"of": [path.name for path in (teacher, *files)], "ifeval": key_digest(documents), **asdict(config)}
    key |= {"code": CODE, "model": file_digest(model / "model.safetensors")}

    def make(target: Path) -> None:
        outcomes, answers = asyncio.run(_measure(model, teacher, files, documents, config))
        lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        (target / "answers.jsonl").write_text(lines, encoding="utf-8")
        (target / "outcomes.json").write_text(json.dumps(outcomes) + "\n", encoding="utf-8")

    return cached_folder(folder, "judged", key, make)


async def _measure(
    model: Path, teacher: Path, files: Sequence[Path], documents: list[dict[str, Any]], config: JudgeConfig
) -> tuple[Outcomes, list[dict[str, str]]]:
    tokenizer, (data, prompts) = hf_tokenizer(model), files

    def read(path: Path) -> list[Question]:
        return read_questions(path, tokenizer, max_prompt_length=MAX_PROMPT_TOKENS, extend_vocab_start_token=None)

    asked = [document["prompt"] for document in documents]
    encoder = PromptEncoder(tokenizer, DataConfig(max_prompt_length=MAX_PROMPT_TOKENS))
    encoded = encoder.encode([[{"role": "user", "content": text}] for text in asked])
    instructed = [Question("", "ifeval", text, ids, "") for text, ids in zip(asked, encoded, strict=True)]
    chat, catalogue = read(prompts / "general_test.parquet"), read_catalogue(data / "catalogue.parquet")
    rec = read(data / "rec_test.parquet") if ITEM_BEGIN in tokenizer.get_vocab() else []
    ranked = [question for question in rec if question.source == NEXT]
    engine: dict[str, Any] = {"name": config.engine, "dtype": "bfloat16" if config.bf16 else "float32"}
    engine |= {"prompt_length": MAX_PROMPT_TOKENS, "response_length": max(config.ifeval_tokens, config.chat_tokens)}
    rollout = RolloutConfig(**engine, gpu_memory_utilization=0.8, cpu_kvcache_space_gb=2.0, max_num_seqs=64)
    answerer = Answerer(str(model), rollout, get_device_name())
    try:
        await answerer.launch()
        greedy = await answerer.greedy(instructed, config.ifeval_tokens) + await answerer.greedy(rec, REC_TOKENS)
        sampled = await answerer.sampled(chat * config.chat_answers, config.chat_tokens, 1.0, config.seed)
        rankings = await answerer.ranked(ranked, ItemTrie(catalogue, tokenizer), max(KS)) if ranked else []
    finally:
        await answerer.shutdown()
    texts = [answer_text(tokenizer, ids) for ids in greedy]
    outcomes = _ifeval_outcomes(documents, texts[: len(asked)]) | _distances(model, teacher, chat, sampled)
    if rec:
        outcomes |= _rec_outcomes(rec, texts[len(asked) :], set(catalogue))
        outcomes |= _recalls("recall", [[item for item, _ in ranking.items] for ranking in rankings], ranked)
        popular = _most_purchased(data)
        outcomes |= _recalls("popular", [[item for item, _ in popular]] * len(ranked), ranked)
        outcomes |= _recalls("next", _usual_next(data, ranked, [item for item, _ in popular]), ranked)
        constant = _ifeval_outcomes(documents, [popular[0][1]] * len(documents))
        outcomes |= {f"constant_{metric}": pairs for metric, pairs in constant.items()}
    every = zip([*instructed, *rec], texts, strict=True)
    return outcomes, [{"source": q.source, "prompt": q.prompt, "wanted": q.wanted, "answer": text} for q, text in every]


def _ifeval_outcomes(documents: list[dict[str, Any]], texts: list[str]) -> Outcomes:
    outcomes = defaultdict[str, list[tuple[float, float]]](list)
    for document, text in zip(documents, texts, strict=True):
        for mode, followed in ifeval.verdicts(document, text).items():
            outcomes[f"ifeval_prompt_{mode}"].append((float(all(followed)), 1.0))
            outcomes[f"ifeval_instruction_{mode}"].append((float(sum(followed)), float(len(followed))))
    return dict(outcomes)


def _distances(model: Path, teacher: Path, questions: list[Question], sampled: list[list[int]]) -> Outcomes:
    """The reverse KL of the first sampled answer to each question, and leaks of all; the teacher has neither."""
    tokenizer = hf_tokenizer(teacher)
    start, count = len(tokenizer), len(questions)
    paths = {"model": str(model), "teacher": str(teacher), "device": get_device_name()}
    settings = scoring.ScoringConfig(**paths, extend_vocab_start_token=start, temperature=1.0, algorithm=AlgoConfig())
    batch = scoring.sampled_batch(questions, sampled[:count], settings, tokenizer.pad_token_id)
    known = known_token_mask(batch)
    gap = mass = known * 0.0
    if model != teacher:
        batch = scoring.score(batch, settings)
        mass = batch.tensor("extend_mass").where(batch.tensor("response_mask").bool(), 0.0)
        # Of tokens that are no items: what the model gives to items must not make it look near.
        gap = batch.tensor("old_log_probs") - (1 - mass).clamp(min=1e-7).log() - batch.tensor("ref_log_prob")
    nats = gap.where(known, 0.0).sum(-1).tolist(), known.sum(-1).float().tolist()
    leaks = [[any(token >= start for token in answer) for answer in sampled[first::count]] for first in range(count)]
    return {
        "reverse_kl": list(zip(*nats, strict=True)),
        "leak": [(float(sum(answers)), float(len(answers))) for answers in leaks],
        "leak_mass": [(summed, 1.0) for summed in mass.sum(-1).tolist()],
    }


def _rec_outcomes(questions: list[Question], texts: list[str], catalogue: set[Item]) -> Outcomes:
    outcomes = defaultdict[str, list[tuple[float, float]]](list)
    for question, text in zip(questions, texts, strict=True):
        if question.source != NEXT:
            outcomes[question.source].append((float(text.strip() == question.wanted), 1.0))
            continue
        first = next(iter(listed_items(text)), None)
        outcomes["free_hit"].append((float(first in question.targets), 1.0))
        outcomes["free_item"].append((float(first in catalogue), 1.0))
    return dict(outcomes)


def _recalls(name: str, lists: Sequence[list[Item]], questions: list[Question]) -> Outcomes:
    pairs = list(zip(lists, questions, strict=True))
    return {f"{name}_{k}": [(recall_at(items, question.targets, k), 1.0) for items, question in pairs] for k in KS}


def _most_purchased(data: Path) -> list[tuple[Item, str]]:
    """All items with their titles, the most purchased ones first."""
    rows = pq.read_table(data / "catalogue.parquet", columns=["sid", "caption", "popularity"]).to_pylist()
    return [(tuple(row["sid"]), row["caption"]) for row in sorted(rows, key=lambda row: -row["popularity"])]


def _usual_next(data: Path, questions: list[Question], popular: list[Item]) -> list[list[Item]]:
    """For each user what followed the last item most often in the training rows, then the most purchased items."""
    after = defaultdict[Item, Counter[Item]](Counter)
    table = pq.read_table(data / "rec_train.parquet", columns=["source", "messages"])
    for source, messages in zip(*(column.to_pylist() for column in table.columns), strict=True):
        bought = items_in(messages) if source == NEXT else []
        for item, following in pairwise(bought):
            after[item][following] += 1
    ranked = ([item for item, _ in after[items_in(q.prompt)[-1]].most_common()] for q in questions)
    return [list(dict.fromkeys([*items, *popular])) for items in ranked]
