"""Which module may import which: the layers of the design, read from the source.

    config, protocol -> ops, vocabulary -> utils -> single_controller, weight_sync -> workers -> agent loop -> trainer
    -> recipe -> experiments

A module imports its own layer and those below it, and no two files or folders import each other.
"""

import ast
import sys
from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.tiny_pairs import REPO

SOURCES = sorted(path for top in ("verl", "recipe", "experiments") for path in (REPO / top).rglob("*.py"))

LAYERS = (
    ("verl.config", "verl.protocol", "verl.trainer.config", "verl.workers.config"),
    ("verl.ops", "verl.vocabulary"),
    ("verl.utils",),
    ("verl.single_controller", "verl.weight_sync", "verl.tools"),
    ("verl.workers",),
    ("verl.experimental",),
    ("verl.trainer", "verl.model_merger", "verl"),
    ("recipe",),
    ("experiments",),
)
LAYER_OF = {name: number for number, names in enumerate(LAYERS) for name in names}

RAY_MAY_BE_IMPORTED_IN = ("verl/single_controller/ray/", "verl/experimental/agent_loop/")
VLLM_MAY_BE_IMPORTED_IN = ("verl/workers/rollout/",)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in SOURCES}


def imported_names(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth: modules, and what is taken from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def imported_modules(path: Path) -> set[str]:
    """The modules of this project that a file imports."""
    found = {name if name in MODULES else name.rpartition(".")[0] for name in imported_names(path)}
    return {name for name in found if name in MODULES} - {module_name(path)}


def layer_of(module: str) -> int:
    """The number of the layer that lists the module, or the closest package around it."""
    while module not in LAYER_OF:
        module = module.rpartition(".")[0]
    return LAYER_OF[module]


def find_circle(edges: Iterable[tuple[str, str]]) -> list[str]:
    """Nodes that lead back to the first of them, or nothing."""
    sorter: TopologicalSorter[str] = TopologicalSorter()
    for source, target in edges:
        if source != target:
            sorter.add(source, target)
    try:
        sorter.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


EDGES = sorted((name, target) for name, path in MODULES.items() for target in imported_modules(path))


def test_nothing_imports_upward() -> None:
    upward = [f"{source} imports {target}" for source, target in EDGES if layer_of(source) < layer_of(target)]
    assert not upward
    assert len(EDGES) > 300, "too few imports to mean anything"


def test_no_two_modules_or_folders_import_each_other() -> None:
    def folder(module: str) -> str:
        place = MODULES[module].parent.relative_to(REPO)
        # A module directly in verl/ has its own layer, and an entry point stands above all that it puts together.
        return module if place == Path("verl") or ".main_" in module else str(place)

    assert not find_circle(EDGES)
    # A package's __init__ that re-exports names from folders below it is that package's table of contents.
    inside = ((s, t) for s, t in EDGES if MODULES[s].name != "__init__.py" and MODULES[t].name != "__init__.py")
    assert not find_circle((folder(source), folder(target)) for source, target in inside)


def test_the_rules_find_circles_and_layers() -> None:
    assert find_circle([("a", "b"), ("b", "c"), ("c", "a"), ("a", "d")])
    assert not find_circle([("a", "b"), ("a", "a"), ("b", "c")])
    modules = ("verl.config.data", "verl.trainer.config", "verl.trainer.ppo", "verl")
    assert [layer_of(name) for name in modules] == [0, 0, 6, 6]


@pytest.mark.parametrize(("package", "places"), [("ray", RAY_MAY_BE_IMPORTED_IN), ("vllm", VLLM_MAY_BE_IMPORTED_IN)])
def test_ray_and_vllm_stay_at_the_edge(package: str, places: tuple[str, ...]) -> None:
    users = [path for path in SOURCES if any(name.split(".")[0] == package for name in imported_names(path))]
    outside = [user for path in users if not (user := str(path.relative_to(REPO))).startswith(places)]
    assert users and not outside, f"{package} is imported in {outside}; only {places} may"


def test_the_algorithm_and_its_kernels_are_pure_torch() -> None:
    # Attention is registered with transformers; everything else here is tensors in, tensors out.
    paths = [REPO / "verl/trainer/ppo/core_algos.py", *(REPO / "verl/ops").glob("*.py")]
    names = {name.split(".")[0] for path in paths if path.stem != "attention" for name in imported_names(path)}
    assert len(paths) > 4 and names <= {"torch", "numpy", "verl", *sys.stdlib_module_names}
