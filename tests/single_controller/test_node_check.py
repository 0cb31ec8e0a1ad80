"""What is missing on a node or differs there, from reports made by hand and from folders."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from verl.single_controller.ray import node_check
from verl.single_controller.ray.node_check import check_nodes_hold, find_problems, read_node

KEY = "actor_rollout_ref.model.path"
STUDENT = {KEY: "/models/student"}
FILES = {"config.json": 10, "model.safetensors": 1000}
DRIVER = {
    "files": {"/models/student": FILES},
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "sources": {"verl/protocol.py": "aa", "verl/utils/device.py": "bb"},
}
MANY = {f"verl/{number}.py": "x" for number in range(9)}


@pytest.mark.parametrize(
    ("part", "there", "problem"),
    [
        ("files", {"/models/student": {**FILES, "notes.txt": 3}}, None),
        (
            "files",
            {"/models/student": None},
            f"{KEY}=/models/student does not exist; copy it there, or name a place that all nodes see",
        ),
        (
            "files",
            {"/models/student": {"model.safetensors": 512}},
            "is not the driver's: config.json is missing, model.safetensors has 512 bytes instead of 1000; copy",
        ),
        (
            "versions",
            {"python": "3.12.0", "torch": "missing"},
            "python 3.12.0 instead of 3.11.7, torch missing instead of 2.13.0; deploy one environment on all nodes "
            "(deploy_env.sh --all-nodes)",
        ),
        (
            "sources",
            {"verl/protocol.py": "xx", "verl/old.py": "cc", "verl/utils/device.py": "bb"},
            "the source differs from the driver's: verl/old.py, verl/protocol.py; deploy it again",
        ),
        ("sources", {}, "the packages verl and recipe are not found"),
        ("sources", {**DRIVER["sources"], **MANY}, "and 6 more"),
    ],
)
def test_what_differs_is_named_with_its_fix(part: str, there: dict, problem: str | None) -> None:
    found = list(find_problems(DRIVER, {**DRIVER, part: there}, STUDENT))
    assert len(found) == (problem is not None)
    assert problem is None or problem in found[0]


def test_a_relative_path_says_so() -> None:
    driver, node = ({**DRIVER, "files": {"student": files}} for files in ({"config.json": 1}, None))
    (problem,) = find_problems(driver, node, {KEY: "student"})
    assert "student does not exist (a relative path; give it from the root)" in problem


def test_nodes_with_the_same_problem_share_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a path that the driver has not is a name on a hub, which no node is asked for."""
    (tmp_path / "config.json").write_text("{}")
    paths = {KEY: str(tmp_path), "actor_rollout_ref.ref.model.path": "owner/name"}

    def ask(wanted: dict[str, list[str]], packages: list[str]) -> dict[str, object]:
        assert wanted["1"] == [str(tmp_path)]
        report = read_node(wanted["1"], packages)
        bare = {**report, "sources": {}}
        return {"1": report, "2": bare, "3": bare, "4": "it could not be asked"}

    monkeypatch.setattr(node_check, "_ask", ask)
    with pytest.raises(ValueError, match="the cluster is not ready for this run") as caught:
        check_nodes_hold(dict.fromkeys("1234", paths), {node: f"10.0.0.{node}" for node in "1234"}, [])
    first, second = str(caught.value).splitlines()[1:]
    assert first.startswith("  nodes 10.0.0.2, 10.0.0.3: the packages verl and recipe are not found")
    assert second == "  node 10.0.0.4: it could not be asked"


def test_a_report_reads_files_versions_and_source(tmp_path: Path) -> None:
    (tmp_path / "model" / "deeper").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "tools.yaml").write_text("tools: []")
    report = read_node([str(tmp_path / name) for name in ("model", "tools.yaml", "nowhere")], ["torch"])
    assert list(report["files"].values()) == [{"config.json": 2}, {"tools.yaml": 9}, None]
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"].startswith("2.")
    sources = {"verl/protocol.py", "recipe/onpolicy_distill/main_onpolicy_distill.py"}
    assert sources | {"verl/trainer/config/ppo_trainer.yaml"} <= set(report["sources"])


def test_the_report_needs_nothing_of_this_project(tmp_path: Path) -> None:
    """It runs where the project is missing: the module alone, in a folder of its own, without site-packages."""
    (tmp_path / "node_check.py").write_text(Path(node_check.__file__).read_text())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import node_check; "
    code += "print(node_check.read_node(['/'], ['torch'])['sources'])"
    assert subprocess.check_output([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, text=True) == "{}\n"
