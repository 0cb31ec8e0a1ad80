"""Write rehearsal prompts of random items to a file, to look at or to name in ``data.train_files``.

::

    python -m recipe.onpolicy_distill.synthetic_item_prompts --tokenizer STUDENT --count 1000 --out F.parquet \\
        --templates '{"next": {"user": "history: {history}"}, "caption": {"user": "caption: {item}"}}' \\
        [--catalogue ITEMS.parquet]

A run makes them of itself where ``data.synthetic_item_prompts`` is set (``verl.utils.dataset.synthetic_items``).
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from verl.config import PromptTemplateConfig, SyntheticItemPromptsConfig


def write_file(tokenizer: str, out: Path, templates: dict[str, Any], **settings: Any) -> Counter[str]:
    """Write the file; returns the number of rows of each source.

    Args:
        tokenizer: folder or hub name.
        templates: texts by template, as ``PromptTemplateConfig`` has them.
        settings: further fields of ``SyntheticItemPromptsConfig``.

    Raises:
        ValueError: settings that make no prompts, a catalogue that cannot be read, or item tokens that the tokenizer
            lacks.
    """
    from verl.utils.dataset.synthetic_items import draw_chats, item_source, write_prompts
    from verl.utils.tokenizer import hf_tokenizer

    try:
        made = {name: PromptTemplateConfig(**texts) for name, texts in templates.items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(f'--templates {templates} is not {{"NAME": {{"user": "TEXT"}}}} ({error})') from error
    config = SyntheticItemPromptsConfig(templates=made, **settings)
    if not config.count:
        raise ValueError(f"--count {config.count} must be at least 1")
    draw_item = item_source(hf_tokenizer(tokenizer), config.catalogue)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_prompts(out, config, draw_item)
    return Counter(source for source, _ in draw_chats(config, draw_item))


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    defaults = SyntheticItemPromptsConfig()
    parser = argparse.ArgumentParser(
        prog="python -m recipe.onpolicy_distill.synthetic_item_prompts", description=str(__doc__).splitlines()[0]
    )
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
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    arguments = vars(_parse_arguments(argv))
    try:
        rows = write_file(**arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(
        f"{rows.total():,} prompts in {arguments['out']}: " + ", ".join(f"{n:,} {source}" for source, n in rows.items())
    )


if __name__ == "__main__":
    main()
