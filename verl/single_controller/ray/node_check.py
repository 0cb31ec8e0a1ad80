"""Checks that every node of a cluster has what a run needs, before anything heavy starts there.

In: what each node has to have. Out: nothing, or one ValueError that lists what is missing or differs where. One task
per node, all at once, without a claim on CPUs or GPUs.

The module itself needs the standard library alone: its code travels to nodes on which this project may be missing or
another version, and ``scripts/versions.py`` loads it without the package around it.
"""

import hashlib
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DISTRIBUTIONS = ("torch", "ray", "vllm", "transformers", "tensordict", "peft")
"""Packages whose versions have to agree; one built for the CPU may be called ``NAME-cpu``."""
SOURCES = ("verl", "recipe")
"""Packages whose source must equal the driver's."""
DEPLOY = "deploy one environment and source on all nodes (deploy_env.sh --all-nodes)"
COPY = "copy it there, or give the absolute path of a place that all nodes see"
LISTED = 3
"""Most files or packages that one problem names."""
DIGESTED_BYTES = 64 * 2**20
"""Largest file whose content is compared, not its size alone."""
ANSWER_S = 120.0
"""Seconds a node has to start a process and answer."""

Report = dict[str, dict[str, str]]
"""Of a machine: sizes by file for each ``key=path``, ``versions`` by package, digests of the ``source`` by file."""


def check_nodes_hold(
    needed: Mapping[str, Mapping[str, str]], node_ips: Mapping[str, str], packages: Sequence[str]
) -> None:
    """Compare every node with the driver.

    Args:
        needed: by node id, the paths that its processes will read, by the setting that names them.
        node_ips: address of each of these nodes.
        packages: keys of ``DISTRIBUTIONS`` whose versions count.

    Raises:
        ValueError: the nodes, what is wrong there, and the fix.
    """
    driver = read_node({key: path for paths in needed.values() for key, path in paths.items()}, packages)
    nodes_with: dict[str, list[str]] = {}
    for node, answer in _ask(needed, packages).items():
        for problem in [answer] if isinstance(answer, str) else find_problems(driver, answer):
            nodes_with.setdefault(problem, []).append(node_ips[node])
    if nodes_with:
        lines = [f"  node {', '.join(nodes)}: {problem}" for problem, nodes in nodes_with.items()]
        raise ValueError("\n".join(["the cluster is not ready for this run:", *lines]))


def _ask(needed: Mapping[str, Mapping[str, str]], packages: Sequence[str]) -> dict[str, Report | str]:
    """Every node's report by node id, or why it gave none."""
    import ray
    from ray.cloudpickle import register_pickle_by_value
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    register_pickle_by_value(sys.modules[__name__])
    task: Any = ray.remote(num_cpus=0, max_retries=0)(read_node)
    calls = {}
    for node, paths in needed.items():
        on_node = NodeAffinitySchedulingStrategy(node, soft=False)
        calls[node] = task.options(scheduling_strategy=on_node).remote(paths, packages)
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
    answers: dict[str, Report | str] = {}
    for node, call in calls.items():
        try:
            # All have had their time above; what is not there now is a node that did not answer.
            answers[node] = ray.get(call, timeout=1)
        except ray.exceptions.RayError as error:
            answers[node] = f"it could not be asked ({' '.join(str(error).split())[:300]}); see that its Ray is well"
    return answers


def read_node(paths: Mapping[str, str], packages: Sequence[str]) -> Report:
    """The report of the machine this runs on.

    Args:
        paths: folders and files to look at, by setting.
        packages: keys of ``DISTRIBUTIONS``.
    """
    report: Report = {
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in packages},
        "source": {name: digest for package in SOURCES for name, digest in source_digests(package).items()},
    }
    for key, path in paths.items():
        found = Path(path).expanduser()
        files = [entry for entry in (found.iterdir() if found.is_dir() else [found]) if entry.is_file()]
        report[f"{key}={path}"] = {file.name: describe_file(file) for file in files}
    return report


def describe_file(path: Path) -> str:
    """Size of a file, and a digest unless it is large: two configs may have the same size."""
    size = path.stat().st_size
    return f"{size} bytes" if size > DIGESTED_BYTES else f"{size} bytes, digest {digest_file(path)}"


def digest_file(path: Path) -> str:
    """Digest of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def installed_version(package: str) -> str:
    """Version of a package of ``DISTRIBUTIONS``, ``missing`` where it is not installed."""
    for name in (package, f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "missing"


def source_digests(package: str) -> dict[str, str]:
    """Digest of each source file of a package, by a name such as ``verl/protocol.py``."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return {
        f"{package}/{path.relative_to(folder)}": digest_file(path)
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }


def find_problems(driver: Report, node: Report) -> Iterator[str]:
    """What is missing on a node or differs from the driver, one text each with its fix.

    A path without files on the driver is a name on a hub: the nodes fetch it themselves, as the driver did.
    """
    for item, there in node.items():
        wrong = [
            f"{name} {there.get(name, 'missing')} instead of {here}"
            for name, here in sorted(driver[item].items())
            if there.get(name) != here
        ]
        if wrong:
            what = ", ".join(wrong[:LISTED]) + ", ..." * (len(wrong) > LISTED)
            yield f"{item}: {what if there else 'not found'}; {COPY if '=' in item else DEPLOY}"
