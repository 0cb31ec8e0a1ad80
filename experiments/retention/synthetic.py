"""Prompts like the recommender's that nobody wrote: of random items of the catalogue, and of random codes.

In: a world's catalogue and what its prompts look like. Out: two parquet files in OneRec's layout. Nothing learns from
their answers, which are the same random items.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import pyarrow.parquet as pq

from experiments.retention.variants import CODES, ITEMS
from recipe.onpolicy_distill.quickstart.cache import cached_folder, file_digest
from recipe.onpolicy_distill.quickstart.world import Chat, World, write_chats
from verl.utils.dataset.items import ITEM_BEGIN, ITEM_END, code_token


@dataclass(frozen=True)
class PromptShape:
    """What a recommender's prompts look like."""

    seed: int
    history: int = 6
    """Items of a history."""
    caption_share: float = 0.2
    """Share of the prompts that ask what an item is."""
    codes_per_level: int = 8
    prompts: int = 4096
    """How many to write."""
    source: str = "rec"
    """Beginning of the sources' names."""


def synthetic_prompts(world: World, shape: PromptShape, folder: Path) -> dict[str, Path]:
    """The two files, by `variants.ITEMS` and ``CODES``, below ``folder``."""
    key = {"world": world.folder.name, "code": file_digest(__file__), **asdict(shape)}

    def make(target: Path) -> None:
        items = pq.read_table(world.catalogue, columns=["text"])["text"].to_pylist()
        random = Random(f"{shape.seed} synthetic prompts")
        levels = range(shape.codes_per_level)

        def random_codes() -> str:
            return ITEM_BEGIN + "".join(code_token(level, random.choice(levels)) for level in range(3)) + ITEM_END

        for name, draw in ((ITEMS, lambda: random.choice(items)), (CODES, random_codes)):
            write_chats(target, **{name: [_prompt(draw, random, shape) for _ in range(shape.prompts)]})

    written = cached_folder(folder, "prompts", key, make)
    return {name: written / f"{name}.parquet" for name in (ITEMS, CODES)}


def _prompt(draw: Callable[[], str], random: Random, shape: PromptShape) -> Chat:
    if random.random() < shape.caption_share:
        return Chat(f"{shape.source}_caption", f"caption: {draw()}", "abc", {})
    history = "".join(draw() for _ in range(shape.history))
    return Chat(f"{shape.source}_next", f"history: {history}", draw(), {})
