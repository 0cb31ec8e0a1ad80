"""What a run will take of memory, stage by stage, before anything starts.

::

    python -m recipe.onpolicy_distill.plan actor_rollout_ref.model.path=STUDENT \\
        actor_rollout_ref.ref.model.path=TEACHER [--card-gib 24] [KEY=VALUE ...]
    python -m recipe.onpolicy_distill.plan --run RUN

In: the overrides of a run; of the models ``config.json`` is read, and no weights. Out: GiB by part and by stage,
against what a GPU or this machine has, changes of settings that would lower the peak, and a line of JSON. Nothing is
started, and data files are not looked at. With ``--run`` instead: seconds of a step for each way to split a run's GPUs
between engines and training, from what it has measured.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verl.utils.console import command_parser, escape_unknown_characters

if TYPE_CHECKING:
    from verl.trainer.launch.plan import MemoryPlan

GIB = 2**30


def make_plan(overrides: list[str], card_gib: float | None) -> "tuple[MemoryPlan, int | None, list[tuple[str, int]]]":
    """The plan, the bytes that there are, if known, and what would lower the peak, to what.

    Without ``card_gib`` it is for the device that a run would take here.

    Raises:
        ValueError: settings that do not fit each other, or a model that cannot be read.
    """
    # torch and transformers come with them, which --help has to do without.
    import torch

    from verl.trainer.launch.plan import plan_memory, read_shapes, what_helps
    from verl.trainer.launch.typed import load_config
    from verl.utils.device import card_bytes
    from verl.utils.import_utils import import_external_modules

    config = load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
    import_external_modules(config.actor_rollout_ref.model.external_lib or [])
    device, card = config.trainer.device, None if card_gib is None else int(card_gib * GIB)
    if device == "auto":
        device = "cuda" if card or torch.cuda.is_available() else "cpu"
    card = card or card_bytes()
    shapes = read_shapes(config)
    helps = what_helps(config, shapes, device, card, lambda plan: plan.peak(plan.highest))
    there = card if device == "cuda" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return plan_memory(config, shapes, device, card), there, helps


def report(plan: "MemoryPlan", there: int | None, helps: list[tuple[str, int]]) -> None:
    """Print the tables, and the same as JSON in the last line."""
    holders, place = list(plan.counts), "GPU" if plan.device == "cuda" else "machine"

    def row(name: str, sizes: list[int | None]) -> None:
        print(f"{name:38}" + "".join(f"{'' if size is None else f'{size / GIB:.2f}':>16}" for size in sizes))

    print(f"GiB, for micro-batches of up to {plan.micro.tokens:,} tokens, {plan.micro.scored:,} of them scored\n")
    print(f"{'':38}" + "".join(f"{name:>16}" for name in holders))
    for holder, parts in plan.parts.items():
        for part, size in parts.items():
            row(part, [size if name == holder else None for name in holders])
    print(f"\n{'at most, in the stage':38}" + "".join(f"{name:>16}" for name in (*holders, place)))
    for stage, held in plan.stages.items():
        too_much = there is not None and plan.peak(stage) > there
        row(stage + ", more than there is" * too_much, [*(held[name] for name in holders), plan.peak(stage)])
    if plan.host:
        print("\nmemory of a machine")
        for part, size in plan.host.items():
            row(part, [size])
    peak, answers = plan.peak(plan.highest), plan.engine.cache / max(1, plan.engine.row)
    print(f"\nprocesses of a machine: {', '.join(f'{number} x {name}' for name, number in plan.counts.items())}")
    print(f"room in an engine's cache for {answers:.1f} of the longest prompts with their answers")
    print(f"peak: {peak / GIB:.2f} GiB of a {place}, in {plan.highest}", end="")
    print(f"; it has {there / GIB:.2f}" if there else "")
    if helps:
        print("\nwhat would help, each alone, and the peak with it")
        for words, size in helps:
            print(f"{size / GIB:8.2f}  {words}")
    document: dict[str, Any] = {"device": plan.device, "peak_bytes": peak, "peak_stage": plan.highest}
    document |= {"available_bytes": there, "parts": plan.parts, "stages": plan.stages, "host": plan.host}
    print(json.dumps({**document, "helps": dict(helps)}))


def report_splits(folder: Path) -> None:
    """Print a table of the splits of a run's GPUs, and the best as settings.

    Raises:
        ValueError: there is nothing to split, or nothing measured.
    """
    from verl.trainer.launch.split import measure

    measured, splits = measure(folder)
    names = ("generation", "tail", "training", "sync")
    print("s, medians:", ", ".join(f"{name} {getattr(measured, name):.2f}" for name in names))
    print(f"\n{'GPUs of engines':>16}{'of training':>16}{'generation, s':>16}{'training, s':>16}{'a step, s':>16}")
    for split in splits:
        print("".join(f"{value:>16}" if isinstance(value, int) else f"{value:>16.2f}" for value in split))
    best = min(splits, key=lambda split: split.step_s)
    print(f"\nin turns on all {measured.gpus} GPUs: {measured.in_turns_s:.2f} s a step")
    where = f"{best.engines} GPUs for engines and {best.training} for training"
    print(f"side by side (trainer.max_staleness=1), {where}: {best.step_s:.2f} s")


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code, 1 where there can be no plan."""
    parser = command_parser("recipe.onpolicy_distill.plan", __doc__)
    parser.add_argument("--card-gib", type=float, help="GiB of a GPU to plan for; default: what is here")
    parser.add_argument("--run", type=Path, help="a run's folder: how to split its GPUs, by what it measured")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as of a run")
    escape_unknown_characters()
    args = parser.parse_intermixed_args(argv)
    if args.run is not None and (unread := [*args.overrides, *["--card-gib"] * (args.card_gib is not None)]):
        parser.error(f"--run={args.run} goes by that run's own settings; leave out {' '.join(unread)}")
    try:
        if args.run is not None:
            report_splits(args.run)
        else:
            report(*make_plan(args.overrides, args.card_gib))
    except (AttributeError, OSError, ValueError) as error:  # of the settings, or of a model that has no such plan
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
