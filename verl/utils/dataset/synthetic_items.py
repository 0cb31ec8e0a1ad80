"""Rehearsal prompts with no recommendation data: histories of random items, in the words of real prompts.

In:  ``data.synthetic_item_prompts`` and the student's tokenizer. Out: a parquet file of chats, which the reader of the
training files reads as it reads these: one length filter, one cache, one report. Items come from a catalogue, or are
any codes that the tokenizer has tokens for. The file depends on nothing but its settings, the catalogue's content and
the tokenizer's item tokens, and is found again by these in ``data.cache_dir``.

Who judges the prompts is a matter of their sources (``algorithm.distill.teachers``), how many of them a batch holds of
``data.source_weights``.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from verl.utils.dataset.data_cache import DEFAULT_CACHE_DIR, DataCache, code_digest, file_digest
from verl.utils.dataset.items import ITEM_BEGIN, ITEM_END, LEVELS, Item, item_tokens, read_catalogue
from verl.utils.dataset.parquet_files import expand_data_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from verl.config import DataConfig, PromptTemplateConfig, SyntheticItemPromptsConfig

logger = logging.getLogger(__name__)

KEY = "data.synthetic_item_prompts"
ROWS_PER_WRITE = 4096
DrawItem = Callable[[Random], Item]
_PLACEHOLDER = re.compile(r"\{(history|item)\}")
_CODE = re.compile(rf"<s_([{LEVELS}])_(\d+)>")


def item_source(
    tokenizer: "PreTrainedTokenizerBase", catalogue: str | None, cache_dir: str | Path = DEFAULT_CACHE_DIR
) -> DrawItem:
    """What draws items.

    Args:
        tokenizer: names the item tokens.
        catalogue: file of the items; None: any codes that the tokenizer names, level by level.
        cache_dir: where the catalogue's rows are kept.

    Raises:
        ValueError: a catalogue that cannot be read, or item tokens that the tokenizer does not name.
    """
    vocabulary = tokenizer.get_vocab()
    if catalogue is None:
        levels = _levels_of(vocabulary)
        return lambda random: tuple(random.choice(codes) for codes in levels)
    items = read_catalogue(catalogue, cache_dir)
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


def _levels_of(vocabulary: dict[str, int]) -> list[list[int]]:
    """The codes of each level; raises ValueError where the item tokens are no whole set."""
    found = _codes_by_level(vocabulary)
    if not found or "".join(found) != LEVELS[: len(found)] or not {ITEM_BEGIN, ITEM_END} <= vocabulary.keys():
        raise ValueError(
            f"{KEY}.catalogue is null, so items are random codes, and the student's tokenizer has no whole set of item "
            f"tokens ({ITEM_BEGIN}, {ITEM_END}, <s_a_0>, <s_b_0>, ...; levels found: {', '.join(found) or 'none'}); "
            "use the tokenizer of a recommender"
        )
    return list(found.values())


def draw_chats(config: "SyntheticItemPromptsConfig", draw_item: DrawItem) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Source and messages of each prompt; one depends on the seed and its own number, not on how many there are."""
    names = list(config.templates)
    for number in range(config.count):
        name = names[number % len(names)]
        random = Random(f"{config.seed} {number}")
        yield config.source_of(name), _fill(config.templates[name], config, draw_item, random)


def _fill(
    template: "PromptTemplateConfig", config: "SyntheticItemPromptsConfig", draw_item: DrawItem, random: Random
) -> list[dict[str, str]]:
    def items(match: re.Match[str]) -> str:
        several = match[1] == "history"
        length = random.randint(config.min_history, config.max_history) if several else 1
        return "".join(token for _ in range(length) for token in item_tokens(draw_item(random)))

    user = {"role": "user", "content": _PLACEHOLDER.sub(items, template.user)}
    return [user] if template.system is None else [{"role": "system", "content": template.system}, user]


def write_prompts(
    path: Path, config: "SyntheticItemPromptsConfig", draw_item: DrawItem, prompt_column: str | None = None
) -> None:
    """Write the prompts as rows of ``source``, ``uuid`` and messages as JSON text.

    Args:
        prompt_column: where prompts stand in verl's layout; None: OneRec's, whose chats end with an answer, which is
            empty here: nobody knows it.
    """
    column = prompt_column or "messages"
    answer = [{"role": "assistant", "content": ""}] if prompt_column is None else []
    schema = pa.schema([("source", pa.string()), ("uuid", pa.string()), (column, pa.string())])
    rows = (
        {
            "source": source,
            "uuid": f"{config.source}-{config.seed}-{number}",
            column: json.dumps([*messages, *answer], ensure_ascii=False),
        }
        for number, (source, messages) in enumerate(draw_chats(config, draw_item))
    )
    with pq.ParquetWriter(path, schema) as writer:
        while block := list(islice(rows, ROWS_PER_WRITE)):
            writer.write_table(pa.Table.from_pylist(block, schema))


def make_prompt_file(config: "DataConfig", tokenizer: "PreTrainedTokenizerBase", prompt_column: str | None) -> Path:
    """The file of ``data.synthetic_item_prompts``, written where it is not in the cache yet.

    Args:
        prompt_column: as in ``write_prompts``.

    Raises:
        ValueError: as ``item_source``, or the cache cannot be written.
    """
    wanted, cache = config.synthetic_item_prompts, DataCache(config.cache_dir)
    catalogue = [] if wanted.catalogue is None else expand_data_files(wanted.catalogue)
    depends_on = {
        "settings": {**dataclasses.asdict(wanted), "catalogue": [file_digest(file) for file in catalogue]},
        "codes": _codes_by_level(tokenizer.get_vocab()),
        "prompt_column": prompt_column,
        "code": code_digest(),
    }
    path = cache.path("synthetic-items", ".parquet", **depends_on)
    if not path.is_file():
        draw_item = item_source(tokenizer, wanted.catalogue, config.cache_dir)
        with cache.writing(path) as beside:
            write_prompts(beside, wanted, draw_item, prompt_column)
    what = "random codes" if wanted.catalogue is None else f"items of {wanted.catalogue}"
    logger.info("%s prompts of %s join the training data: %s", f"{wanted.count:,}", what, path)
    return path
