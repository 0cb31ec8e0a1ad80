"""Files and models of strangers run no code here, read from the source.

Every loader of ``transformers`` leaves ``trust_remote_code`` off or takes it from the settings, ``torch.load`` reads
weights only, and only the two files below unpickle.
"""

import ast
import re
from collections.abc import Iterator

import pytest
from support.tiny_pairs import REPO

from verl.trainer.launch.typed import load_config

SOURCES = sorted(path for top in ("verl", "recipe", "scripts", "benchmarks") for path in (REPO / top).rglob("*.py"))
UNPICKLERS = {
    "verl/protocol.py": "DataProto.load_from_disk, of a file that this user named",
    "benchmarks/driver_scale.py": "what the same process pickled",
}
"""Files that may contain ``pickle.load``, ``loads`` or ``Unpickler``, and what they read."""
NEVER = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "marshal.load", "marshal.loads", "shelve.open"}
NEVER |= {"joblib.load", "dill.load", "dill.loads", "torch.hub.load", "pandas.read_pickle", "eval", "exec", "os.system"}


def calls(text: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the dotted name that it is made with."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    """The named arguments of a call, as text."""
    return {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg}


def faults(text: str, unpickles: bool = False) -> list[str]:
    """What in a source could run code that a file contains; ``unpickles``: it is one of `UNPICKLERS`."""
    found = []
    for name, call in calls(text):
        given = keywords(call)
        wrong = {
            "trust_remote_code is on, whatever the settings": given.get("trust_remote_code") == "True",
            "without weights_only=True": name == "torch.load" and given.get("weights_only") != "True",
            "allow_pickle": given.get("allow_pickle", "False") != "False",
            "runs what it reads": name in NEVER,
        }
        found += [f"line {call.lineno}: {name}: {what}" for what, is_wrong in wrong.items() if is_wrong]
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Attribute(attr="load" | "loads" | "Unpickler", value=ast.Name(id="pickle")) if not unpickles:
                found.append(f"line {node.lineno}: a pickle")
            case ast.ImportFrom(module="pickle"):
                found.append(f"line {node.lineno}: import pickle as a whole, so that its calls are found here")
            case ast.arguments() if re.search(r"trust_remote_code(: bool)?=True", ast.unparse(node)):
                found.append("trust_remote_code is on by default")
    return found


def test_no_code_that_a_file_contains_is_run() -> None:
    texts = {str(path.relative_to(REPO)): path.read_text(encoding="utf-8") for path in SOURCES}
    found = {name: faults(text, unpickles=name in UNPICKLERS) for name, text in texts.items()}
    assert not {name: wrong for name, wrong in found.items() if wrong}
    assert not [name for name in UNPICKLERS if not faults(texts[name])], "they no longer unpickle"


@pytest.mark.parametrize(
    "line",
    [
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "torch.load(path, weights_only=False)",
        "pickle.load(stream)",
        "from pickle import load",
        "class Reader(pickle.Unpickler): ...",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(stream, yaml.Loader)",
        "def read(path, trust_remote_code=True): ...",
    ],
)
def test_the_guard_finds(line: str) -> None:
    assert len(faults(line)) == 1


def test_loaders_of_models_pass_the_setting_on() -> None:
    """Without it, or ``**options``, they would fail on a model whose code the user does trust."""
    without = {
        str(path.relative_to(REPO))
        for path in SOURCES
        for name, call in calls(path.read_text(encoding="utf-8"))
        if name.startswith("Auto") and name.endswith(("from_pretrained", "from_config"))
        if "trust_remote_code" not in keywords(call) and all(keyword.arg for keyword in call.keywords)
    }
    # Models that these load have classes of transformers' own.
    own = {f"recipe/onpolicy_distill/{name}.py" for name in ("quickstart/models", "scoreboard/scoring")}
    assert without == own | {"benchmarks/step_time.py"}
    assert load_config([]).actor_rollout_ref.model.trust_remote_code is False
