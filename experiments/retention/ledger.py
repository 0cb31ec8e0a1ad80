"""Do general rows and rows of items pull apart? Gradients of both parts of a batch, on the same weights.

In: a student that runs in this process, before it trains. Out: ``ledger.jsonl`` in the run's folder, a line for every
N-th step; a table of all ledgers of a study. The loss is linear in its tokens, so the gradient of a part is that of the
loss with the weights of all other rows 0, and both add up to that of the batch. A batch that is measured is trained on
as it would be otherwise. At the first step rows of items have no gradient: the student still is their teacher.

A line has ``run`` (the fields of `Run`), ``step``, ``general`` and ``items`` (L2 norms over all parameters, before
clipping, of the gradient of each part's terms in the loss of the batch), ``cosine`` between the two, null where one is
0, and ``item_tokens``, the share of trained tokens that are in rows of items.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from experiments.retention.results import Record, Run, read_lines, run_of
from experiments.retention.tweaks import copied
from experiments.retention.variants import VARIANTS
from verl.protocol import DataProto
from verl.workers.actor.dp_actor import DataParallelPPOActor
from verl.workers.actor.losses import MiniBatchLoss, PolicyLoss

LEDGER = "ledger.jsonl"
COLUMNS = ("general", "items", "cosine", "item_tokens")


def keep_ledger(actor: DataParallelPPOActor, step: Callable[[], int], run: Run, path: Path, every: int) -> None:
    """Have an actor write a line before its update of every ``every``-th step; ``step`` tells which one it is."""
    accumulate = actor._accumulate_gradient

    def noted(mini: DataProto, mini_loss: MiniBatchLoss, config: Any) -> Any:
        if step() % every == 0:

            def gradient_of(rows: torch.Tensor) -> torch.Tensor:
                accumulate(mini, restricted(mini_loss, rows), config)
                return take_gradient(actor)

            line = {"run": asdict(run), "step": step(), **measure(mini, gradient_of)}
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return accumulate(mini, mini_loss, config)

    actor._accumulate_gradient = noted  # type: ignore[method-assign]


def measure(mini: DataProto, gradient_of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, float | None]:
    """A line's metrics; ``gradient_of`` gives that of the rows (M,) bool."""
    trained = mini.tensor("response_mask").bool()
    items = mini.batch.get("teacher", torch.zeros(len(mini), dtype=torch.int64)) != 0  # the base teacher's place is 0
    of_general, of_items = gradient_of(~items), gradient_of(items)
    norms = float(of_general.norm()), float(of_items.norm())
    cosine = float(of_general @ of_items) / (norms[0] * norms[1]) if all(norms) else None
    share = float(trained[items].sum() / trained.sum())
    return dict(zip(COLUMNS, (*norms, cosine, share), strict=True))


def restricted(mini_loss: MiniBatchLoss, rows: torch.Tensor) -> MiniBatchLoss:
    """The part of a loss that is of some rows (M,) bool, divided as the whole is."""
    mini_loss = copied(mini_loss)
    for _, part in mini_loss._parts:
        if isinstance(part, PolicyLoss):
            part._trained, part._known = part._trained & rows[:, None], part._known & rows[:, None]
        else:
            part._token_weights = part._token_weights * rows[:, None]
    return mini_loss


def take_gradient(actor: DataParallelPPOActor) -> torch.Tensor:
    """The accumulated gradient, all parameters in one float64 vector; it is dropped from the model."""
    if actor.extended_rows is not None:
        actor.extended_rows.drop_gradient()
    parts = []
    for parameter in actor.actor_module.parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            parts.append(grad.full_tensor().double().flatten())
            parameter.grad = None
    return torch.cat(parts)


# ------------------------------------------------------------------ the table


def ledger_text(runs: Path) -> str:
    """A table of all ledgers below the folders of runs, in Markdown: means over runs and steps; empty without any."""
    lines = [line for path in sorted(runs.glob(f"*/{LEDGER}")) for line in read_lines(path)]
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for line in lines:
        run = run_of(line)
        groups.setdefault((run.world, run.budget, run.variant), []).append(line)
    tables = [
        _table(
            world, budget, {name: groups[world, budget, name] for name in VARIANTS if (world, budget, name) in groups}
        )
        for world, budget in dict.fromkeys(key[:2] for key in groups)
    ]
    return "\n\n".join(tables)


def _table(world: str, budget: str, by_variant: dict[str, list[Record]]) -> str:
    head = ["objective", "steps", "runs", "general", "items", "cosine", "tokens of items"]
    rows = [head, ["---"] * len(head)]
    for variant, lines in by_variant.items():
        runs = len({json.dumps(line["run"], sort_keys=True) for line in lines})
        for stretch, some in _stretches(lines).items():
            cells = [_mean([line[name] for line in some]) for name in COLUMNS]
            rows.append([VARIANTS[variant].label, stretch, str(runs), *cells])
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"### Gradients: {world}, {budget}\n\nNorms of both parts of a batch, and the cosine between them.\n\n{table}"
    )


def _stretches(lines: Sequence[Record]) -> dict[str, list[Record]]:
    """The first line's step, and those after it in two halves; by the steps they hold."""
    first, last = min(line["step"] for line in lines), max(line["step"] for line in lines)
    bounds = sorted({0, first, max(first, last // 2), last})
    found = {}
    for low, high in pairwise(bounds):
        if some := [line for line in lines if low < line["step"] <= high]:
            steps = sorted({line["step"] for line in some})
            found["–".join(map(str, dict.fromkeys((steps[0], steps[-1]))))] = some
    return found


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.3g}" if known else "–"
