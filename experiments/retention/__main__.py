"""What each objective gives back, and what it costs the recommender: the study, in one command.

::

    python -m experiments.retention [--variants exact,exact-self] [--seeds 0,1,2] [--steps 120] [--seconds 40]

Makes every run that OUT/results.jsonl does not have yet, then writes OUT/table.md and OUT/retention.svg. A study that
was killed or interrupted goes on where it was.
"""

import argparse
import fcntl
import itertools
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from experiments.retention.results import DONE, Extras, read_results, runs_to_do
from experiments.retention.study import Budget, Worker, run_study, stages_of
from experiments.retention.variants import VARIANTS

STEPS = 150
LEDGER_EVERY = 10
WORLDS = ("quickstart", "online_retail")


def listed(of: Callable[[str], Any], text: str) -> list[Any]:
    """A comma-separated option."""
    return [of(part) for part in text.split(",") if part]


def _variant(name: str) -> str:
    if name not in VARIANTS:
        raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(VARIANTS)}")
    return name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m experiments.retention", description=str(__doc__).splitlines()[0])
    numbers = partial(listed, int)
    parser.add_argument("--world", choices=WORLDS, default=WORLDS[0], help="default: %(default)s")
    parser.add_argument("--variants", type=partial(listed, _variant), default=list(VARIANTS), help="default: all")
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2], help="of the distillation; default: 0,1,2")
    parser.add_argument("--student-seeds", type=numbers, default=[0], help="of world and models; default: 0")
    parser.add_argument("--steps", type=int, help=f"of each run; default, without --seconds: {STEPS}")
    parser.add_argument("--seconds", type=float, help="of training of each run; with --steps: both kinds of runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("outputs/retention"), help="default: %(default)s")
    every = f"take gradients of general rows and of items apart, every N steps; without N: {LEDGER_EVERY}"
    parser.add_argument("--ledger", type=int, nargs="?", const=LEDGER_EVERY, default=0, metavar="N", help=every)
    longer = "Recall@K to measure besides; the table has 20 and 64; needs an --out without results that lack it"
    parser.add_argument("--ks", type=numbers, default=[], metavar="K,...", help=longer)
    parser.add_argument("--report-only", action="store_true", help="write table and plot of what there is")
    args = parser.parse_args(argv)
    args.budgets = [Budget(steps=args.steps)] if args.steps else []
    args.budgets += [Budget(seconds=args.seconds)] if args.seconds else []
    args.budgets = args.budgets or [Budget(steps=STEPS)]
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs} must be at least 1")
    if args.ledger < 0 or (args.ledger and args.seconds):
        parser.error(f"--ledger {args.ledger} must be at least 1, and not with --seconds, of which it would take some")
    if any(k < 1 for k in args.ks):
        parser.error(f"--ks {args.ks} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Make the runs, then table and plot."""
    args = parse_args(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    if not args.report_only:
        signal.signal(signal.SIGTERM, _interrupt)
        stages = stages_of(args.world, args.variants, args.seeds, args.student_seeds, args.budgets)
        if args.ledger and not runs_to_do(itertools.chain(*stages), read_results(results)):
            sys.exit(f"error: --ledger is taken while runs are made, and {out} has them all; take another --out")
        with open(out / "lock", "w", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"error: another study writes to {out}; wait for it, or choose another --out")
            try:
                extras = Extras(args.ledger, args.ks)
                run_study(stages, results, args.jobs, lambda number: Worker(number, out, args.jobs, extras))
            except KeyboardInterrupt:
                have = sum(record["status"] == DONE for record in read_results(results))
                print(f"interrupted: {have} runs are in {results}; the same command goes on", file=sys.stderr)
                raise SystemExit(130) from None
    report(out)


def report(out: Path) -> None:
    """Write table and plot of the results, and show the table; with ledgers a table of these too."""
    from experiments.retention.ledger import ledger_text
    from experiments.retention.plot import plot
    from experiments.retention.table import summarise, table_text

    summaries = summarise(read_results(out / "results.jsonl"))
    text = table_text(summaries)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "retention.svg").write_text(plot(summaries) + "\n", encoding="utf-8")
    if ledger := ledger_text(out / "runs"):
        (out / "ledger.md").write_text(ledger + "\n", encoding="utf-8")
        text = f"{text}\n\n{ledger}"
    print(f"{text}\n\ntable: {out / 'table.md'}\nplot: {out / 'retention.svg'}")


def _interrupt(number: int, frame: Any) -> NoReturn:
    """End as on Ctrl-C: processes are stopped, results are whole."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
