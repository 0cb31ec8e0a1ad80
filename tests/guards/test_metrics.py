"""Every metric that the code names is in docs/metrics.md, and docs/metrics.md names no others.

Metrics are found in the syntax tree: strings ``family/name`` anywhere, f-strings that begin with ``family/``, names of
timed stages, and the names that ``metric_utils`` puts a family in front of. Each gives a pattern of documented names.
"""

import ast
import re

import pytest
from support.tiny_pairs import REPO

FAMILIES = (
    "actor|distill|distill_teacher|advantage|advantage_teacher|critic|val|val-core|reward_extra|val_reward_extra|val_agent_loop"
    "|training|train|staleness|rollout_corr|agent_loop|perf|timing_s|timing_per_token_ms|response_length|prompt_length|num_turns|rollout|keep"
)
METRIC = re.compile(rf"(?:{FAMILIES})(?:/\w+)+")
BEGINNING = re.compile(rf"(?:{FAMILIES})/[\w/]*")
TIMERS, MEASURES = ("stage", "marked_timer"), ("_mean", "_summary")


def metrics_in(source: str, *, has_timers: bool = False, has_bare_names: bool = False) -> set[str]:
    """Patterns of the metrics that a module names."""
    found: set[str] = set()
    bare: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Constant(value=str(text)) if METRIC.fullmatch(text):
                found.add(f"{text}(/mean)?")  # min, mean and max of it are documented by their names
            case ast.JoinedStr(values=[ast.Constant(value=head), *_, last]) if BEGINNING.fullmatch(head):
                found.add(f"{head}.*{last.value if isinstance(last, ast.Constant) else ''}")
            case ast.Call(func=ast.Name(id=function), args=[ast.Constant(value=str(name)), *_]):
                found |= {f"timing_s/{name}"} if has_timers and function in TIMERS else set()
                bare |= {name} if function in MEASURES else set()
            case ast.Dict(keys=keys):
                bare |= {key.value for key in keys if isinstance(key, ast.Constant)}
            case ast.Subscript(slice=ast.Constant(value=str(name)), ctx=ast.Store()):
                bare.add(name)
    return found | {f"(.*/)?{name}(/.*)?" for name in bare if has_bare_names and name.isidentifier()}


def documented() -> set[str]:
    """Names in the first column of the tables; ``{a,b}`` in one stands for each."""
    names: set[str] = set()
    for row in (REPO / "docs" / "metrics.md").read_text("utf-8").splitlines():
        for name in re.findall(r"`([^`]+)`", row.split("|")[1]) if row.startswith("| `") else []:
            before, _, rest = name.partition("{")
            choices, _, after = rest.partition("}")
            names |= {before + choice + after for choice in choices.split(",")}
    return names


def undocumented(patterns: set[str]) -> set[str]:
    names = documented()
    return {pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)}


def test_every_metric_of_the_code_is_documented() -> None:
    found: set[str] = set()
    for path in [*(REPO / "verl").rglob("*.py"), *(REPO / "recipe" / "onpolicy_distill").glob("*.py")]:
        in_trainer = path.is_relative_to(REPO / "verl" / "trainer" / "ppo")
        text = path.read_text("utf-8")
        found |= metrics_in(text, has_timers=in_trainer, has_bare_names=path.name == "metric_utils.py")
    # One that is found by each of the four ways.
    assert {"actor/kl_loss(/mean)?", "agent_loop/.*", "timing_s/old_log_prob", "(.*/)?extend_mass(/.*)?"} <= found
    assert not undocumented(found), "add them to docs/metrics.md"


@pytest.mark.parametrize(
    "source",
    [
        'metrics["actor/not_documented"] = 1.0',
        'f"nowhere/{x}", {f"distill/{source}/not_documented": 1.0}',
        'with marked_timer("not_documented", timing): pass',
        '_mean("not_documented", values)',
        'metrics["not_documented"] = 1.0',
    ],
)
def test_a_metric_that_is_not_documented_is_found(source: str) -> None:
    assert undocumented(metrics_in(source, has_timers=True, has_bare_names=True))


def test_every_documented_metric_is_still_in_the_code() -> None:
    words = set(re.findall(r"\w+", "\n".join(path.read_text("utf-8") for path in (REPO / "verl").rglob("*.py"))))
    last = {name.rsplit("/", 1)[-1] for name in documented()}
    assert last and not [word for word in last if "<" not in word and word not in words]
