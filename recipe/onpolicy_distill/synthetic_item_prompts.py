"""Write rehearsal prompts of random items to a file, to look at or to name in ``data.train_files``.

::

    python -m recipe.onpolicy_distill.synthetic_item_prompts --tokenizer STUDENT --count 1000 --out F.parquet \\
        --templates '{"next": {"user": "history: {history}"}, "caption": {"user": "caption: {item}"}}' \\
        [--catalogue ITEMS.parquet]

A run makes the same file itself where ``data.synthetic_item_prompts`` is set.
"""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from verl.config import PromptTemplateConfig, SyntheticItemPromptsConfig


def write_file(arguments: argparse.Namespace) -> Counter[str]:
    """Write the file; returns the number of rows of each source.

    Raises:
        ValueError: settings that make no prompts, a catalogue that cannot be read, or item tokens that the tokenizer
            lacks.
    """
    from verl.utils.dataset.items import write_item_prompts
    from verl.utils.tokenizer import hf_tokenizer

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
    arguments = parser.parse_args(argv)
    try:
        rows = write_file(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{rows.total():,} prompts in {arguments.out}: " + ", ".join(f"{n:,} {source}" for source, n in rows.items()))


if __name__ == "__main__":
    main()
