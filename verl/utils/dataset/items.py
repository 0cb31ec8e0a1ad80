"""Items as OneRec writes them, the catalogue of those that exist, and rehearsal prompts made of random ones.

In: a catalogue file (parquet, column ``sid``: one list of codes per item), ``data.synthetic_item_prompts``, the
student's tokenizer. Out: items as tuples of codes and as text, and a parquet file of chats in the words of real
prompts, which needs no recommendation data.

    (3, 7, 1)  ->  <|sid_begin|><s_a_3><s_b_7><s_c_1><|sid_end|>

The file depends on nothing but its settings, the catalogue's content and the tokenizer's item tokens. The reader of the
training files reads it as it reads these. Which teacher scores the prompts is decided by their sources
(``algorithm.distill.teachers``), how many of them a batch holds by ``data.source_weights``.
"""

import dataclasses
import json
import logging
import operator
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from verl.config import DataConfig, SyntheticItemPromptsConfig
from verl.utils.dataset.parquet_files import cached_file, code_digest, column_names, expand_data_files, file_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Item = tuple[int, ...]
"""Codes of an item, first level first."""
DrawItem = Callable[[Random], Item]

KEY = "data.synthetic_item_prompts"
SID_COLUMN = "sid"
ITEM_BEGIN, ITEM_END = "<|sid_begin|>", "<|sid_end|>"
LEVELS = "abcdefgh"
_PLACEHOLDER = re.compile(r"\{(history|item)\}")
_CODE = re.compile(rf"<s_([{LEVELS}])_(\d+)>")


def code_token(level: int, code: int) -> str:
    """The token of one code of an item; levels count from 0."""
    return f"<s_{LEVELS[level]}_{code}>"


def item_tokens(item: Item) -> list[str]:
    """The tokens that write an item."""
    return [ITEM_BEGIN, *(code_token(level, code) for level, code in enumerate(item)), ITEM_END]


def read_catalogue(path: str | Path) -> list[Item]:
    """The items of a catalogue, each once, in order of their codes.

    Raises:
        ValueError: no such file, no column ``sid``, or rows that are not lists of as many codes each.
    """
    files = expand_data_files(path)
    if SID_COLUMN not in (columns := column_names(files)):
        raise ValueError(f"the catalogue {path} has the columns {sorted(columns)} and no {SID_COLUMN!r} (list of ints)")
    cells = (cell for file in files for cell in pq.ParquetFile(file).read([SID_COLUMN])[SID_COLUMN].to_pylist())
    try:
        # index refuses floats and texts, which int would take.
        items = {tuple(map(operator.index, cell)) for cell in cells}
    except TypeError as error:
        raise ValueError(f"the catalogue {path}: {SID_COLUMN} must hold lists of ints ({error})") from error
    depths = sorted({len(item) for item in items})
    if len(depths) != 1 or not 0 < depths[0] <= len(LEVELS):
        raise ValueError(f"the items of {path} have {depths} codes; all must have as many, 1 to {len(LEVELS)}")
    return sorted(items)


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
        if match := _CODE.fullmatch(token):
            found.setdefault(match[1], []).append(int(match[2]))
    return {level: sorted(codes) for level, codes in sorted(found.items())}


def draw_chats(config: SyntheticItemPromptsConfig, draw_item: DrawItem) -> Iterator[tuple[str, list[dict[str, str]]]]:
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
    """Write the prompts as rows of ``source``, ``uuid`` and messages as JSON text.

    Args:
        prompt_column: where prompts stand in verl's layout; None: OneRec's, whose chats end with an answer, which is
            empty here: nobody knows it.

    Raises:
        ValueError: as ``item_sampler``.
    """
    answer = [{"role": "assistant", "content": ""}] if prompt_column is None else []
    sources, chats = zip(*draw_chats(config, item_sampler(tokenizer, config.catalogue)), strict=True)
    columns = {
        "source": sources,
        "uuid": [f"{config.source}-{config.seed}-{number}" for number in range(config.count)],
        prompt_column or "messages": [json.dumps([*chat, *answer], ensure_ascii=False) for chat in chats],
    }
    pq.write_table(pa.table(columns), path)


def make_prompt_file(config: DataConfig, tokenizer: "PreTrainedTokenizerBase", prompt_column: str | None) -> Path:
    """The file of ``data.synthetic_item_prompts`` in ``data.cache_dir``; arguments and errors of write_item_prompts."""
    wanted = config.synthetic_item_prompts
    catalogue = [] if wanted.catalogue is None else expand_data_files(wanted.catalogue)
    path = cached_file(
        config.cache_dir,
        "synthetic-items",
        ".parquet",
        lambda path: write_item_prompts(path, wanted, tokenizer, prompt_column),
        # The catalogue by its content: moved, it makes the same file; changed, another.
        settings=dataclasses.asdict(wanted) | {"catalogue": [file_digest(file) for file in catalogue]},
        codes=_codes_by_level(tokenizer.get_vocab()),
        prompt_column=prompt_column,
        code=code_digest(),
    )
    what = f"items of {wanted.catalogue}" if wanted.catalogue else "random codes"
    logger.info("%s prompts of %s join the training data: %s", f"{wanted.count:,}", what, path)
    return path
