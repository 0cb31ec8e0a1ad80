"""Rehearsal prompts made of random items, in the words of real prompts: they need no recommendation data.

In: ``data.synthetic_item_prompts``, the student's tokenizer. Out: a parquet file of chats, which a run reads with its
training files; as a command, to look at or to name in ``data.train_files``::

    python -m recipe.onpolicy_distill.synthetic_item_prompts --tokenizer STUDENT --count 1000 --out F.parquet \\
        --templates '{"next": {"user": "history: {history}"}, "caption": {"user": "caption: {item}"}}' \\
        [--catalogue ITEMS.parquet]

The file depends on nothing but its settings, the catalogue's content and the tokenizer's item tokens. Which teacher
scores the prompts is decided by their sources (``algorithm.distill.teachers``), how many of them a batch holds by
``data.source_weights``.
"""

import argparse
import dataclasses
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from verl.config import DataConfig, PromptTemplateConfig, SyntheticItemPromptsConfig
from verl.utils.console import command_parser, escape_unknown_characters
from verl.utils.dataset.items import CODE_TOKEN, ITEM_BEGIN, ITEM_END, LEVELS, Item, item_tokens, read_catalogue
from verl.utils.dataset.parquet_files import cached_file, code_digest, expand_data_files, file_digest
from verl.utils.durable_files import write_durably
from verl.utils.tokenizer import hf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Chat = list[dict[str, str]]
DrawItem = Callable[[Random], Item]

KEY = "data.synthetic_item_prompts"
_PLACEHOLDER = re.compile(r"\{(history|item)\}")


def item_sampler(tokenizer: "PreTrainedTokenizerBase", catalogue: str | None) -> DrawItem:
    """A function that draws items from a catalogue, or without one any codes that the tokenizer has tokens for.

    Raises:
        ValueError: a catalogue that cannot be read, or item tokens that the tokenizer lacks.
    """
    vocabulary = tokenizer.get_vocab()
    if catalogue is None:
        levels = _codes_by_level(vocabulary)
        if not levels or "".join(levels) != LEVELS[: len(levels)] or not {ITEM_BEGIN, ITEM_END} <= vocabulary.keys():
            raise ValueError(
                f"{KEY}.catalogue is null, and the student's tokenizer has no whole set of item tokens ({ITEM_BEGIN}, "
                f"<s_a_0>, ..., {ITEM_END}; levels found: {', '.join(levels) or 'none'}); use a recommender's"
            )
        return lambda random: tuple(random.choice(codes) for codes in levels.values())
    items = read_catalogue(catalogue)
    unknown = sorted({token for item in items for token in item_tokens(item)} - vocabulary.keys())
    if unknown:
        raise ValueError(
            f"{KEY}.catalogue={catalogue} needs {len(unknown):,} tokens that the student's tokenizer lacks, such as "
            f"{unknown[0]}; give the catalogue that the student was trained on"
        )
    return lambda random: random.choice(items)


def _codes_by_level(vocabulary: dict[str, int]) -> dict[str, list[int]]:
    """The codes that have a token, by the letter of their level."""
    found: dict[str, list[int]] = {}
    for token in vocabulary:
        if match := CODE_TOKEN.fullmatch(token):
            found.setdefault(match[1], []).append(int(match[2]))
    return {level: sorted(codes) for level, codes in sorted(found.items())}


def draw_chats(config: SyntheticItemPromptsConfig, draw_item: DrawItem) -> Iterator[tuple[str, Chat]]:
    """Source and messages of each prompt; one depends on the seed and its own number, not on how many there are."""
    names = list(config.templates)
    for number in range(config.count):
        name = names[number % len(names)]
        # A generator for each prompt: a larger count changes none of those before.
        random = Random(f"{config.seed} {number}")

        def items(match: re.Match[str], random: Random = random) -> str:
            length = random.randint(config.min_history, config.max_history) if match[1] == "history" else 1
            return "".join(token for _ in range(length) for token in item_tokens(draw_item(random)))

        template = config.templates[name]
        messages = [] if template.system is None else [{"role": "system", "content": template.system}]
        messages.append({"role": "user", "content": _PLACEHOLDER.sub(items, template.user)})
        yield config.source_of(name), messages


def write_item_prompts(
    path: Path,
    config: SyntheticItemPromptsConfig,
    tokenizer: "PreTrainedTokenizerBase",
    prompt_column: str | None = None,
) -> None:
    """Write the prompts with ``write_chats``; errors as ``item_sampler``."""
    chats = draw_chats(config, item_sampler(tokenizer, config.catalogue))
    rows = ((source, f"{config.source}-{config.seed}-{n}", messages) for n, (source, messages) in enumerate(chats))
    write_chats(path, rows, prompt_column)


def write_chats(path: Path, prompts: Iterable[tuple[str, str, Chat]], prompt_column: str | None = None) -> None:
    """Write prompts, each its source, uuid and messages, with the messages as JSON text: the whole file or none.

    Args:
        prompt_column: where prompts stand in verl's layout; None: OneRec's, whose chats end with an answer, which is
            empty here: nobody knows it.

    Raises:
        OSError: the file cannot be written.
    """
    answer = [{"role": "assistant", "content": ""}] if prompt_column is None else []
    sources, uuids, chats = zip(*prompts, strict=True)
    texts = [json.dumps([*chat, *answer], ensure_ascii=False) for chat in chats]
    content = pa.BufferOutputStream()
    pq.write_table(pa.table({"source": sources, "uuid": uuids, prompt_column or "messages": texts}), content)
    write_durably(path, content.getvalue().to_pybytes())


def make_prompt_file(config: DataConfig, tokenizer: "PreTrainedTokenizerBase") -> Path:
    """The file of ``data.synthetic_item_prompts`` in ``data.cache_dir``, in the layout of ``data.train_files``; errors
    as ``item_sampler``."""
    from verl.utils.dataset.onerec_dataset import get_dataset_class
    from verl.utils.dataset.rl_dataset import RLHFDataset

    wanted, is_verls = config.synthetic_item_prompts, get_dataset_class(config.train_files or "", config) is RLHFDataset
    prompt_column = config.prompt_key if is_verls else None
    catalogue = [] if wanted.catalogue is None else expand_data_files(wanted.catalogue)
    path = cached_file(
        config.cache_dir,
        "synthetic-items",
        ".parquet",
        lambda path: write_item_prompts(path, wanted, tokenizer, prompt_column),
        # The catalogue by its content: moved, it makes the same file; changed, another.
        settings=dataclasses.asdict(wanted) | {"catalogue": [file_digest(file) for file in catalogue]},
        templates=list(wanted.templates),  # in the order in which they take turns, which the key of a map does not hold
        codes=_codes_by_level(tokenizer.get_vocab()),
        prompt_column=prompt_column,
        code=[code_digest(), file_digest(Path(__file__))],
    )
    what = f"items of {wanted.catalogue}" if wanted.catalogue else "random codes"
    logger.info("%s prompts of %s join the training data: %s", f"{wanted.count:,}", what, path)
    return path


def write_file(arguments: argparse.Namespace) -> Counter[str]:
    """Write the file; returns the number of rows of each source.

    Raises:
        ValueError: settings that make no prompts, a catalogue that cannot be read, or item tokens that the tokenizer
            lacks.
    """
    settings = {**vars(arguments)}
    tokenizer, out, templates = (settings.pop(name) for name in ("tokenizer", "out", "templates"))
    try:
        settings["templates"] = {name: PromptTemplateConfig(**texts) for name, texts in templates.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f'--templates {templates} is not {{"NAME": {{"user": "TEXT"}}}} ({error})') from error
    config = SyntheticItemPromptsConfig(**settings)
    if not config.count:
        raise ValueError(f"--count {config.count} must be at least 1")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_item_prompts(out, config, hf_tokenizer(tokenizer))
    return Counter(config.sources[number % len(config.sources)] for number in range(config.count))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    escape_unknown_characters()
    defaults = SyntheticItemPromptsConfig()
    parser = command_parser("recipe.onpolicy_distill.synthetic_item_prompts", __doc__)
    parser.add_argument("--tokenizer", required=True, help="the student's tokenizer: folder or hub name")
    parser.add_argument("--count", type=int, required=True, help="prompts")
    parser.add_argument("--out", type=Path, required=True, help="parquet file to write, in OneRec's layout")
    parser.add_argument(
        "--templates",
        type=json.loads,
        required=True,
        metavar="JSON",
        help="user turns (and system turns) by name; {history} and {item} stand for items",
    )
    parser.add_argument("--catalogue", help="parquet with a `sid` column, a list of codes per item; default: any codes")
    for name in ("min_history", "max_history", "seed"):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--source", default=defaults.source, help="what sources begin with; default: %(default)s")
    arguments = parser.parse_args(argv)
    try:
        rows = write_file(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{rows.total():,} prompts in {arguments.out}: " + ", ".join(f"{n:,} {source}" for source, n in rows.items()))


if __name__ == "__main__":
    main()
