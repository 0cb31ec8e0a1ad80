"""What is missing on a node or differs there, from reports made by hand and from folders."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from verl.single_controller.ray import node_check
from verl.single_controller.ray.node_check import check_nodes_hold, find_problems, read_node

KEY = "actor_rollout_ref.model.path"
STUDENT = f"{KEY}=/models/student"
FILES = {"config.json": "10 bytes", "model.safetensors": "1000 bytes"}
DRIVER = {
    STUDENT: FILES,
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "source": {"verl/protocol.py": "aa", "verl/utils/device.py": "bb"},
}


@pytest.mark.parametrize(
    ("part", "there", "problem"),
    [
        (STUDENT, {**FILES, "notes.txt": "3 bytes"}, None),
        (STUDENT, {}, ": not found; copy it there"),
        (
            STUDENT,
            {"config.json": "10 bytes", "model.safetensors": "5 bytes"},
            ": model.safetensors 5 bytes instead of 1000",
        ),
        ("versions", {"python": "3.11.7", "torch": "missing"}, ": torch missing instead of 2.13.0; deploy"),
        (
            "source",
            {"verl/protocol.py": "xx"},
            ": verl/protocol.py xx instead of aa, verl/utils/device.py missing instead",
        ),
        ("source", {}, ": not found; deploy one environment and source on all nodes (deploy_env.sh --all-nodes)"),
    ],
)
def test_what_differs_is_named_with_its_fix(part: str, there: dict[str, str], problem: str | None) -> None:
    found = list(find_problems(DRIVER, {**DRIVER, part: there}))
    assert len(found) == (problem is not None)
    assert problem is None or found[0].startswith(part + problem)


def test_nodes_with_the_same_problem_share_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a path that the driver has not is a name on a hub."""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(node_check, "DIGESTED_BYTES", 2)
    (tmp_path / "weights").write_text("{ }")
    paths = {KEY: str(tmp_path), "actor_rollout_ref.ref.model.path": "owner/name"}
    report = read_node(paths, ["torch"])
    here = report[f"{KEY}={tmp_path}"]
    assert here == {"config.json": "2 bytes, digest 44136fa355b3678a", "weights": "3 bytes"}, "SHA-256 of {}"
    assert report["versions"]["python"] == platform.python_version() and report["versions"]["torch"].startswith("2.")
    assert {"verl/protocol.py", "verl/trainer/config/ppo_trainer.yaml"} <= report["source"].keys()
    bare = {**report, "source": {}}
    answers = {"1": report, "2": bare, "3": bare, "4": "it could not be asked"}
    monkeypatch.setattr(node_check, "_ask", lambda needed, packages: answers)
    with pytest.raises(ValueError, match="the cluster is not ready for this run") as caught:
        check_nodes_hold(dict.fromkeys("1234", paths), {node: f"10.0.0.{node}" for node in "1234"}, ["torch"])
    first, second = str(caught.value).splitlines()[1:]
    assert first.startswith("  node 10.0.0.2, 10.0.0.3: source: not found")
    assert second == "  node 10.0.0.4: it could not be asked"


def test_the_report_needs_nothing_of_this_project(tmp_path: Path) -> None:
    """It runs where the project is missing: the module alone, in a folder of its own, without site-packages."""
    (tmp_path / "node_check.py").write_text(Path(node_check.__file__).read_text())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import node_check; "
    code += "print(node_check.read_node({}, ['torch'])['source'])"
    assert subprocess.check_output([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, text=True) == "{}\n"
