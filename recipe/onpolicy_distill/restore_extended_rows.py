"""Put the rows of item tokens back as they were before a run: a free repair of the recommender, at no training.

::

    python -m recipe.onpolicy_distill.restore_extended_rows --before M0 --after M1 --out M2 \\
        --extend-vocab-start-token 151669

In:  a student before and after distillation, in Hugging Face format. Out: M1 with the embedding's rows from the first
extended id on, and those of the lm head where it is a matrix of its own, taken from M0. Nothing else changes. It helps
where the two are tied, and little where they are not; with rehearsal (``algorithm.distill.teachers``) it is not needed.
"""

import sys
from pathlib import Path

from recipe.onpolicy_distill.combine_models import add_threshold, combine_models, read_threshold
from verl.utils.console import command_parser


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("recipe.onpolicy_distill.restore_extended_rows", __doc__)
    for name, meaning in (("before", "student before distillation"), ("after", "student after it"), ("out", "result")):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"folder of the {meaning}")
    add_threshold(parser)
    args = parser.parse_args(argv)
    try:
        start = read_threshold(args, args.before)
        combine_models({args.after: 1.0}, args.out, start, rows_from=args.before)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"rows from {start} on put back: {args.out}")


if __name__ == "__main__":
    main()
