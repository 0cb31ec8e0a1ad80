"""General prompts that a chat model writes itself, so that a run needs no data set.

::

    python -m recipe.onpolicy_distill.prompts_from_teacher --model TEACHER --count 10000 --out general.parquet

A chat model that reads its template up to where a user's text begins writes a user's text (published as Magpie).

In:  a chat model. Out: a parquet file of chats with an empty answer, in OneRec's layout, and a table of the samples:
how many are kept, and how many dropped for each reason. The first that holds counts:

    cut             did not end within --max-new-tokens
    empty           no word in it
    special_tokens  tokens of the chat template, typed out
    not_encodable   another text once encoded and decoded, or half a character
    overlong        above --max-prompt-length
    repetitive      above --max-repetition
    language        too many letters of other scripts than --languages
    duplicate       an earlier prompt again
    near_duplicate  above --max-similarity with an earlier prompt

Samples are numbered and looked at in order: which are kept depends on the model and the options, and not on how many
are wanted or what was computed together, but for an engine's rounding.
"""

import argparse
import asyncio
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from recipe.onpolicy_distill.options import add_options, option
from recipe.onpolicy_distill.synthetic_item_prompts import write_chats
from verl.config import DataConfig, HFModelConfig, RolloutConfig
from verl.utils.console import command_parser, escape_unknown_characters
from verl.utils.tokenizer import hf_tokenizer, types_special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verl.workers.rollout.replica import TokenOutput

PROBES = tuple(f"{start} k5v1 probe" for start in ("What", "7", "写", "Что"))
"""Texts to find the user's turn with; they begin with letters and digits, which join no sign before them."""
SCRIPTS = ("latin", "cjk", "hiragana", "katakana", "hangul", "cyrillic", "arabic", "hebrew", "devanagari", "thai")
"""What the Unicode names of letters begin with; ``cjk`` are Chinese characters, in Japanese too."""
SCRIPT_SHARE = 0.8
"""Least share of a text's letters in the wanted scripts: a word or formula of another one may be quoted."""
CHARACTERS, WORDS, MOST_TEXTS = 8, 4, 100
"""Lengths of the sequences that are looked for again, in the same text and in earlier ones; and how many texts are
remembered for a sequence of words: one that is everywhere shows no likeness and would cost time."""
BATCH = 64, 4096
"""Fewest and most samples between two looks at how many prompts are missing."""
LIMITS = {"count": (1, 10**9), "temperature": (0.01, 100), "top_p": (0.01, 1), "max_new_tokens": (1, 10**6)}
LIMITS |= {"max_repetition": (0, 1), "max_similarity": (0, 1), "seed": (0, 2**31 - 1)}
_WORD = re.compile(r"[\u3040-\u9fff\uac00-\ud7af]|[^\W\u3040-\u9fff\uac00-\ud7af]+")


@dataclass(frozen=True)
class PromptsConfig:
    """What is sampled, and what is kept."""

    model: str = option(help="folder of the chat model: the teacher")
    count: int = option(type=int, help="prompts wanted")
    out: str = option(help="parquet file to write, in OneRec's layout")
    max_samples: int | None = option(None, type=int, help="samples to end after with fewer prompts; none: 10 x count")
    engine: str = option("vllm", choices=("vllm", "hf"), help="what generates")
    system: str | None = option(None, help="system message to sample under, not written; none: the template's own")
    temperature: float = option(1.0, help="of the samples")
    top_p: float = option(0.9, help="of the samples")
    max_new_tokens: int = option(512, help="most tokens of a sample")
    max_prompt_length: int = option(1024, help="most tokens of a prompt with its template, as data.max_prompt_length")
    max_repetition: float = option(0.4, help=f"largest share of its sequences of {CHARACTERS} characters that repeat")
    max_similarity: float = option(0.8, help=f"largest share of its sequences of {WORDS} words in one other prompt")
    languages: Sequence[str] | None = option(None, nargs="+", choices=SCRIPTS, help="scripts of the letters; none: all")
    seed: int = option(0, help="of the samples")
    source: str = option("synthetic_general", help="source of the rows")
    rollout: Mapping[str, Any] | None = option(None, type=json.loads, help="JSON, more of actor_rollout_ref.rollout")

    def __post_init__(self) -> None:
        for name, (low, high) in {**LIMITS, "max_samples": (self.count, 10**9)}.items():
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be from {low:,} to {high:,}")


class UserTurn(NamedTuple):
    """What stands around a user's text in a conversation of one question."""

    prefix: str
    suffix: str
    """From the end of the text up to where the assistant begins to write."""
    prompt_ids: list[int]
    """Tokens of the prefix; a space at its end is left to the first word, as tokenizers have it."""
    end_ids: list[int]
    """Added tokens of prefix and suffix: the text ends at the first one."""
    end_text: str
    """What ends the text where the suffix does not begin with an added token; else empty."""


def find_user_turn(tokenizer: "PreTrainedTokenizerBase", system: str | None = None) -> UserTurn:
    """Where the template puts a user's text.

    Args:
        system: content of a system message; None: there is none, and the template may put its own.

    Raises:
        ValueError: there is no template, it refuses the question, or it does not write it once, as it is, after tokens
            of its own.
    """
    from verl.utils.dataset.prompt_tokens import PromptEncoder

    encoder = PromptEncoder(tokenizer, DataConfig())
    system_turn = [] if system is None else [{"role": "system", "content": system}]
    texts = [encoder.render([*system_turn, {"role": "user", "content": probe}]) for probe in PROBES]
    frames = {tuple(text.split(probe)) for text, probe in zip(texts, PROBES, strict=True)}
    prefix, suffix = frame if len(frame := frames.pop()) == 2 and not frames else ("", "")
    prompt_ids = list(os.path.commonprefix(encoder.tokenize(texts)))  # noqa: RUF071 (of lists, not of paths)
    # Not compared by white space: some tokenizers write more of it than they read.
    if not prompt_ids or "".join(_decode(tokenizer, prompt_ids).split()) != "".join(prefix.split()):
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} does not write the user's text once, as it is and after "
            f"tokens of its own, so its place cannot be found: {texts[0]!r} for {PROBES[0]!r}; use another chat model"
        )
    # Some tokenizers have spaces and new lines among the added tokens.
    added = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items() if str(token).strip()}
    end_ids = sorted({*prompt_ids, *tokenizer.encode(suffix, add_special_tokens=False)} & added.keys())
    head = re.split("|".join(re.escape(added[token_id]) for token_id in end_ids) or "$", suffix)[0]
    return UserTurn(prefix, suffix, prompt_ids, end_ids, head.strip() and head.strip(" "))


def text_of(output: "TokenOutput", turn: UserTurn, tokenizer: "PreTrainedTokenizerBase") -> tuple[str, bool]:
    """The user's text that a model wrote, and whether it came to an end."""
    ended = output.stop_reason == "stop"
    text = _decode(tokenizer, output.token_ids[: len(output.token_ids) - ended])
    text, mark, _ = text.partition(turn.end_text) if turn.end_text else (text, "", "")
    return text.strip(), ended or bool(mark)


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


class PromptFilter:
    """Keeps texts that are prompts, and counts the others by reason."""

    def __init__(self, config: PromptsConfig, turn: UserTurn, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._config, self._turn, self._tokenizer = config, turn, tokenizer
        self.kept: dict[str, str] = {}
        """Texts, each with a uuid."""
        self.dropped: Counter[str] = Counter()
        self._texts_with: dict[str, list[str]] = {}
        """Uuids of the kept texts that have a sequence of words."""

    def add(self, uuid: str, text: str, ended: bool) -> None:
        """Keep a text, or count the first reason against it (see the module)."""
        words, config = _WORD.findall(text.casefold()), self._config
        sequences = {" ".join(words[n : n + WORDS]) for n in range(max(1, len(words) - WORDS + 1))}
        shared = Counter(other for sequence in sequences for other in self._texts_with.get(sequence, ()))
        ids, prompt_ids = self._tokenizer([text, text.join(self._turn[:2])], add_special_tokens=False)["input_ids"]
        holds = {
            "cut": not ended,
            "empty": not words,
            "special_tokens": types_special_tokens(self._tokenizer, text),
            "not_encodable": "\ufffd" in text or _decode(self._tokenizer, ids) != text,
            "overlong": len(prompt_ids) > config.max_prompt_length,
            "repetitive": repeated_share(text) > config.max_repetition,
            "language": config.languages is not None and script_share(text, config.languages) < SCRIPT_SHARE,
            "duplicate": text in self.kept,
            "near_duplicate": max(shared.values(), default=0) > config.max_similarity * len(sequences),
        }
        if reason := next((name for name, is_so in holds.items() if is_so), None):
            self.dropped[reason] += 1
            return
        self.kept[text] = uuid
        for sequence in sequences:
            if len(others := self._texts_with.setdefault(sequence, [])) < MOST_TEXTS:
                others.append(uuid)


def repeated_share(text: str) -> float:
    """Which share of the sequences of `CHARACTERS` characters stood in the text before; any white space is one."""
    text = " ".join(text.split())
    starts = range(len(text) - CHARACTERS + 1)
    return 1 - len({text[start : start + CHARACTERS] for start in starts}) / len(starts) if starts else 0.0


def script_share(text: str, languages: Sequence[str]) -> float:
    """Which share of the letters belongs to the scripts of ``languages``; 1 without letters."""
    scripts = tuple(language.upper() for language in languages)
    letters = [unicodedata.name(letter, "") for letter in text if letter.isalpha()]
    return sum(name.startswith(scripts) for name in letters) / len(letters) if letters else 1.0


async def sample_prompts(
    config: PromptsConfig, turn: UserTurn, tokenizer: "PreTrainedTokenizerBase", prompts: PromptFilter
) -> None:
    """Sample until as many prompts are kept as wanted, or the samples are used up."""
    from recipe.onpolicy_distill.scoreboard.answers import SEED_STEP, with_progress
    from verl.utils.device import get_device_name
    from verl.workers.rollout.replica import get_replica_class

    sizes = {"prompt_length": len(turn.prompt_ids), "response_length": config.max_new_tokens}
    settings: dict[str, Any] = {"name": config.engine, "gpu_memory_utilization": 0.8, **sizes, **(config.rollout or {})}
    rollout = RolloutConfig(**settings)
    replica = get_replica_class(rollout.name)(rollout, HFModelConfig(path=config.model), 0, get_device_name())
    sampling: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p, "top_k": -1}
    sampling |= {"max_tokens": config.max_new_tokens, "stop_token_ids": turn.end_ids}
    seed, start, end = config.seed * SEED_STEP, 0, config.max_samples or 10 * config.count
    try:
        await replica.launch()
        while start < end and (missing := config.count - len(prompts.kept)):
            numbers = range(start, start := min(start + min(max(missing, BATCH[0]), BATCH[1]), end))
            calls = [replica.generate(turn.prompt_ids, sampling | {"seed": seed + n}, str(n)) for n in numbers]
            outputs = await with_progress(f"samples ({len(prompts.kept):,} of {config.count:,} prompts)", calls)
            for number, output in zip(numbers, outputs, strict=True):
                if len(prompts.kept) < config.count:
                    prompts.add(f"{config.source}-{config.seed}-{number}", *text_of(output, turn, tokenizer))
    finally:
        await replica.shutdown()


def write_prompts(config: PromptsConfig) -> PromptFilter:
    """Sample and write the file; returns what is in it, and what is not.

    Raises:
        ValueError: a model that cannot be used, or no prompt to keep.
        OSError: the file cannot be written.
        RuntimeError: the engine failed.
    """
    out, tokenizer = Path(config.out), hf_tokenizer(config.model)
    turn = find_user_turn(tokenizer, config.system)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise ValueError(f"--out {out}: no file can be written there; name another")
    prompts = PromptFilter(config, turn, tokenizer)
    try:
        asyncio.run(sample_prompts(config, turn, tokenizer, prompts))
    finally:  # what there is, where the engine failed or the user stopped it
        if prompts.kept:
            rows = ((config.source, uuid, [{"role": "user", "content": text}]) for text, uuid in prompts.kept.items())
            write_chats(out, rows)
            print(f"{len(prompts.kept):,} of the {config.count:,} prompts wanted in {out}: {config.source}")
    if not prompts.kept:
        raise ValueError(f"none of {prompts.dropped.total():,} samples is a prompt to keep: {dict(prompts.dropped)}")
    return prompts


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    escape_unknown_characters()
    parser = command_parser(
        "recipe.onpolicy_distill.prompts_from_teacher", __doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, PromptsConfig)
    try:
        prompts = write_prompts(PromptsConfig(**vars(parser.parse_args(argv))))
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    rows, dropped = len(prompts.kept), prompts.dropped
    for name, number in [("samples", rows + dropped.total()), *dropped.most_common(), ("prompts", rows)]:
        print(f"{name:16}{number:>10,}{number / (rows + dropped.total()):>8.1%}")


if __name__ == "__main__":
    main()
