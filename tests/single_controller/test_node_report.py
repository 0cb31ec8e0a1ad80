"""What is missing on a node or differs there, from reports made by hand and from folders."""

import dataclasses
import platform
import subprocess
import sys
from pathlib import Path

from verl.single_controller.ray import node_report
from verl.single_controller.ray.node_report import NeededPath, NodeReport, compare, join_problems, read_node

STUDENT = NeededPath("actor_rollout_ref.model.path", "/models/student")
DRIVER = NodeReport(
    files={"/models/student": {"config.json": 10, "model.safetensors": 1000}},
    versions={"python": "3.11.7", "torch": "2.13.0"},
    sources={"verl/protocol.py": "aa", "verl/utils/device.py": "bb"},
)


def problems(**other: object) -> list[str]:
    return compare(DRIVER, dataclasses.replace(DRIVER, **other), [STUDENT])


def test_a_node_like_the_driver_is_ready() -> None:
    assert problems() == []
    assert problems(files={"/models/student": {**DRIVER.files["/models/student"], "notes.txt": 3}}) == []


def test_a_missing_folder_is_named_with_its_setting() -> None:
    assert problems(files={"/models/student": None}) == [
        "actor_rollout_ref.model.path=/models/student does not exist; copy it there, or name a place that all nodes see"
    ]


def test_a_relative_path_says_so() -> None:
    driver = dataclasses.replace(DRIVER, files={"student": {"config.json": 1}})
    node = dataclasses.replace(DRIVER, files={"student": None})
    (problem,) = compare(driver, node, [NeededPath("actor_rollout_ref.model.path", "student")])
    assert "student does not exist (a relative path; give it from the root)" in problem


def test_a_copy_that_was_cut_off_is_seen() -> None:
    (problem,) = problems(files={"/models/student": {"model.safetensors": 512}})
    assert "is not the driver's: config.json is missing, model.safetensors has 512 bytes instead of 1000;" in problem


def test_versions_that_differ_are_named_together() -> None:
    assert problems(versions={"python": "3.12.0", "torch": "missing"}) == [
        "python 3.12.0 instead of 3.11.7, torch missing instead of 2.13.0; deploy one environment on all nodes "
        "(deploy_env.sh --all-nodes)"
    ]


def test_source_that_differs_names_files() -> None:
    (problem,) = problems(sources={"verl/protocol.py": "xx", "verl/old.py": "cc", "verl/utils/device.py": "bb"})
    assert "the source differs from the driver's: verl/old.py, verl/protocol.py; deploy it again" in problem
    (problem,) = problems(sources={})
    assert "the packages verl and recipe are not found" in problem
    many = {f"verl/{number}.py": "x" for number in range(9)}
    assert "and 6 more" in problems(sources={**DRIVER.sources, **many})[0]


def test_nodes_with_the_same_problem_share_a_line() -> None:
    assert join_problems({"10.0.0.1": [], "10.0.0.2": ["a", "b"], "10.0.0.3": ["a"]}) == (
        "  nodes 10.0.0.2, 10.0.0.3: a\n  node 10.0.0.2: b"
    )
    assert join_problems({"10.0.0.1": []}) == ""


def test_a_report_reads_files_versions_and_source(tmp_path: Path) -> None:
    (tmp_path / "model" / "deeper").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "tools.yaml").write_text("tools: []")
    paths = [str(tmp_path / name) for name in ("model", "tools.yaml", "nowhere")]
    report = NodeReport(**read_node(paths, ["torch"]))
    assert list(report.files.values()) == [{"config.json": 2}, {"tools.yaml": 9}, None]
    assert report.versions["python"] == platform.python_version()
    assert report.versions["torch"].startswith("2.")
    assert {"verl/protocol.py", "recipe/onpolicy_distill/main_onpolicy_distill.py"} <= set(report.sources)
    assert "verl/trainer/config/ppo_trainer.yaml" in report.sources


def test_the_report_needs_nothing_of_this_project(tmp_path: Path) -> None:
    """It runs where the project is missing: the module alone, in a folder of its own, without site-packages."""
    (tmp_path / "node_report.py").write_text(Path(node_report.__file__).read_text())
    script = "import node_report; print(node_report.read_node(['/'], ['torch'])['sources'])"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {script}"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "{}", result.stderr
