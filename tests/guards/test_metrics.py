"""Every metric that the code names stands in docs/metrics.md, and nothing stands there that the code does not name.

Found in the syntax tree, outside docstrings: strings ``family/name`` anywhere, f-strings that begin with ``family/``,
names of stages that are timed, and the bare names that ``metric_utils`` puts a family in front of.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[2]
FAMILIES = (
    "actor",
    "distill",
    "distill_teacher",
    "advantage",
    "advantage_teacher",
    "critic",
    "val",
    "reward_extra",
    "val_reward_extra",
    "val_agent_loop",
    "training",
    "rollout_corr",
    "agent_loop",
    "perf",
    "timing_s",
    "timing_per_token_ms",
    "response_length",
    "prompt_length",
    "num_turns",
)
METRIC = re.compile(rf"(?:{'|'.join(FAMILIES)})(?:/\w+)+")
BEGINNING = re.compile(rf"(?:{'|'.join(FAMILIES)})/[\w/]*")
TIMERS, MEASURES = ("stage", "marked_timer"), ("_mean", "_summary")


class Metric(NamedTuple):
    """A name as far as the source spells it: it begins with ``head`` and ends with ``tail``; without a head it is
    one of the parts between slashes.
    """

    head: str
    tail: str
    is_whole: bool

    def is_among(self, names: set[str]) -> bool:
        """Whether the names hold it, as far as it is known."""
        if self.is_whole:
            return self.head in names or f"{self.head}/mean" in names  # a spread stands there by its parts
        if not self.head:
            return any(self.tail in name.split("/") for name in names)
        begins = any(name.startswith(self.head) for name in names)
        return begins and any(name.endswith(self.tail) for name in names)


def figures_in(source: str, *, times: bool = False, has_bare_names: bool = False) -> set[Metric]:
    """Metrics that a module names; ``times``: as stages of a step too, ``has_bare_names``: without family too."""
    found: set[Metric] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
            found.add(Metric(node.value, "", True))
        elif isinstance(node, ast.JoinedStr):
            first, last = _text(node.values[0]), _text(node.values[-1])
            if BEGINNING.fullmatch(first):
                found.add(Metric(first, last if len(node.values) > 1 else "", False))
        if times:
            found |= {Metric(f"timing_s/{name}", "", True) for name in _first_arguments(node, TIMERS)}
        if has_bare_names:
            names = {*_first_arguments(node, MEASURES), *_keys(node)}
            found |= {Metric("", name, False) for name in names if name.isidentifier()}
    return found


def _text(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _first_arguments(node: ast.AST, functions: tuple[str, ...]) -> Iterator[str]:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in functions and node.args:
        yield from filter(None, [_text(node.args[0])])


def _keys(node: ast.AST) -> Iterator[str]:
    """Keys of dict displays, and of entries that are set."""
    if isinstance(node, ast.Dict):
        yield from (_text(key) for key in node.keys if key is not None)
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store) and isinstance(node.slice, ast.Constant):
        yield _text(node.slice)


def named_by_the_code() -> dict[Metric, str]:
    """Metrics, and a file that names each."""
    named: dict[Metric, str] = {}
    modules = [*(REPO / "verl").rglob("*.py"), *(REPO / "recipe" / "onpolicy_distill").glob("*.py")]
    for path in modules:
        place = str(path.relative_to(REPO))
        is_trainer = place.startswith("verl/trainer/ppo/")
        found = figures_in(path.read_text("utf-8"), times=is_trainer, has_bare_names=path.name == "metric_utils.py")
        named |= dict.fromkeys(found, place)
    return named


def documented() -> set[str]:
    """Names in the first column of the tables; ``{a,b}`` in one stands for each."""
    rows = [line for line in (REPO / "docs" / "metrics.md").read_text("utf-8").splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    return {expanded for name in names for expanded in _expanded(name)}


def _expanded(name: str) -> list[str]:
    before, brace, rest = name.partition("{")
    if not brace:
        return [name]
    choices, _, after = rest.partition("}")
    return [before + choice + after for choice in choices.split(",")]


def test_every_figure_that_the_code_names_is_documented() -> None:
    named, names = named_by_the_code(), documented()
    # All ways of naming one are found: as it is, by its beginning, as a stage, and without its family.
    assert Metric("actor/kl_loss", "", True) in named and Metric("reward_extra/", "", False) in named
    assert Metric("timing_s/old_log_prob", "", True) in named and Metric("", "extend_mass", False) in named
    missing = {f"{metric.head}...{metric.tail}": place for metric, place in named.items() if not metric.is_among(names)}
    assert not missing, "add them to docs/metrics.md"


@pytest.mark.parametrize(
    "source",
    [
        'metrics["actor/nobody_wrote_of_me"] = 1.0',
        'f"nowhere/{x}", {f"distill/{source}/nobody_wrote_of_me": 1.0}',
        'with marked_timer("nobody_wrote_of_me", timing): pass',
        '_mean("nobody_wrote_of_me", values)',
        'metrics["nobody_wrote_of_me"] = 1.0',
    ],
)
def test_a_figure_that_is_not_documented_is_found(source: str) -> None:
    names = documented()
    assert any(not metric.is_among(names) for metric in figures_in(source, times=True, has_bare_names=True))


def test_every_documented_figure_is_still_in_the_code() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (REPO / "verl").rglob("*.py"))
    words = set(re.findall(r"\w+", source))
    last = {name: name.rsplit("/", 1)[-1] for name in documented()}
    stale = [name for name, word in last.items() if "<" not in word and word not in words]
    assert last and not stale
