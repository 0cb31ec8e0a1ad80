"""Files and models of strangers run no code here, read from the source.

Every loader of ``transformers`` leaves ``trust_remote_code`` off or has it from the settings, ``torch.load`` reads
weights only, and nothing unpickles a file but the two places that say whose it is.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from verl.trainer.launch.typed import load_config

REPO = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("verl", "recipe", "scripts", "benchmarks") for path in (REPO / top).rglob("*.py"))
UNPICKLERS = {
    "verl/protocol.py": "DataProto.load_from_disk, of a file that this user named",
    "benchmarks/driver_scale.py": "what the same process pickled",
}
"""Where ``pickle.load``, ``loads`` or ``Unpickler`` may stand, and what they read."""
NEVER = {
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "joblib.load",
    "dill.load",
    "dill.loads",
    "torch.hub.load",
    "pandas.read_pickle",
    "eval",
    "exec",
    "os.system",
}


def calls(text: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the dotted name that it is made with."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, ast.expr]:
    return {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


def faults(text: str, unpickles: bool = False) -> list[str]:
    """What in a source could run what a file holds.

    Args:
        unpickles: it is one of `UNPICKLERS`.
    """
    found = []
    for name, call in calls(text):
        given = keywords(call)
        wrong = {
            "trust_remote_code is on, whatever the settings say": is_true(given.get("trust_remote_code")),
            "without weights_only=True": name == "torch.load" and not is_true(given.get("weights_only")),
            "allow_pickle": "allow_pickle" in given and not _is_false(given["allow_pickle"]),
            "a pickle": not unpickles and name in ("pickle.load", "pickle.loads", "pickle.Unpickler"),
            "runs what it reads": name in NEVER,
        }
        found += [f"line {call.lineno}: {name}: {what}" for what, is_wrong in wrong.items() if is_wrong]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.ClassDef(bases=bases) if not unpickles and "pickle.Unpickler" in map(ast.unparse, bases):
                found.append(f"line {node.lineno}: a pickle")
            case ast.ImportFrom(module="pickle"):
                found.append(f"line {node.lineno}: import pickle as a whole, so that its calls are seen here")
            case ast.arguments() if any(map(is_true, _defaults(node, "trust_remote_code"))):
                found.append("trust_remote_code is on by default")
    return found


def _defaults(arguments: ast.arguments, name: str) -> list[ast.expr | None]:
    """Defaults of the arguments of that name."""
    plain = [*arguments.posonlyargs, *arguments.args]
    pairs = zip(reversed(plain), reversed(arguments.defaults), strict=False)
    return [
        value
        for argument, value in [*pairs, *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
        if argument.arg == name
    ]


def _is_false(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and value.value is False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_nothing_runs_what_a_file_holds(path: Path) -> None:
    relative = str(path.relative_to(REPO))
    assert not faults(path.read_text(encoding="utf-8"), unpickles=relative in UNPICKLERS)


def test_the_places_that_unpickle_still_do() -> None:
    idle = [name for name in UNPICKLERS if not faults((REPO / name).read_text(encoding="utf-8"))]
    assert not idle


@pytest.mark.parametrize(
    "line",
    [
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.load(stream)",
        "from pickle import load",
        "class Reader(pickle.Unpickler): ...",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(stream, yaml.Loader)",
        "def read(path, trust_remote_code=True): ...",
    ],
)
def test_the_guard_sees(line: str) -> None:
    assert len(faults(line)) == 1


def test_loaders_of_models_take_the_setting_along() -> None:
    """A loader that was not told would fail on a model whose code the user does trust."""
    untold = []
    for path in SOURCES:
        for name, call in calls(path.read_text(encoding="utf-8")):
            if name.startswith("Auto") and name.endswith(("from_pretrained", "from_config")):
                named = keywords(call)
                untold += [] if "trust_remote_code" in named else [f"{path.relative_to(REPO)}:{call.lineno}"]
    # Models that the scoreboard and the benchmarks load have classes of transformers' own.
    assert {place.partition(":")[0] for place in untold} == {
        "recipe/onpolicy_distill/scoreboard/scoring.py",
        "benchmarks/step_time.py",
    }


def test_remote_code_is_off_unless_asked() -> None:
    assert load_config([]).actor_rollout_ref.model.trust_remote_code is False
