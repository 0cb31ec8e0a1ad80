"""Who may know whom: the import directions of the design, read from the source."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for top in ("verl", "recipe", "experiments") for path in (REPO / top).rglob("*.py"))

RAY_MAY_BE_IMPORTED_IN = (
    "verl/single_controller/ray/",
    "verl/experimental/agent_loop/actors.py",
    "verl/experimental/agent_loop/agent_loop.py",
    "verl/experimental/agent_loop/remote_calls.py",
    "verl/experimental/agent_loop/servers.py",
)
VLLM_MAY_BE_IMPORTED_IN = ("verl/workers/rollout/",)

# A module may import verl modules that begin with one of these prefixes.
ALLOWED = {
    "verl/protocol.py": ("verl.protocol",),
    "verl/utils/": ("verl.utils", "verl.protocol", "verl.trainer.config", "verl.workers.config"),
    "verl/tools/": ("verl.tools", "verl.utils"),
    "verl/single_controller/": ("verl.single_controller", "verl.protocol", "verl.utils"),
    "verl/workers/config/": ("verl.workers.config",),
    "verl/workers/actor/": (
        "verl.workers.actor",
        "verl.workers.config",
        "verl.workers.fsdp",
        "verl.trainer.ppo.core_algos",
        "verl.utils",
        "verl.protocol",
    ),
    "verl/workers/": (
        "verl.workers",
        "verl.trainer.config",
        "verl.single_controller.base",
        "verl.utils",
        "verl.protocol",
    ),
    "verl/experimental/": (
        "verl.experimental",
        "verl.tools",
        "verl.workers.rollout",
        "verl.workers.config",
        "verl.trainer.config",
        "verl.utils",
        "verl.protocol",
    ),
    # The last three are imported inside functions of preflight.py alone, to look at a run before it starts.
    "verl/trainer/config/": (
        "verl.trainer.config",
        "verl.workers.config",
        "verl.utils.redaction",
        "verl.utils.hub_cache",
        "verl.trainer.ppo.core_algos",
        "verl.utils.dataset.parquet_files",
        "verl.experimental.agent_loop.base",
    ),
    "verl/trainer/": (
        "verl.trainer",
        "verl.single_controller",
        "verl.experimental.agent_loop",
        "verl.utils",
        "verl.protocol",
    ),
    "verl/model_merger.py": ("verl.workers.fsdp", "verl.utils"),
    "verl/__init__.py": ("verl.protocol",),
    "recipe/": ("recipe", "verl"),
    "experiments/": ("experiments", "recipe", "verl"),
}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            names.add(str(node.module))
    return names


def allowed_prefixes(relative: str) -> tuple[str, ...]:
    return next(prefixes for place, prefixes in ALLOWED.items() if relative.startswith(place))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPO)))
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    relative = str(path.relative_to(REPO))
    own = {name for name in imported_modules(path) if name.split(".")[0] in ("verl", "recipe", "experiments")}
    prefixes = allowed_prefixes(relative)
    wrong = sorted(name for name in own if not any(name == p or name.startswith(p + ".") for p in prefixes))
    assert not wrong, f"{relative} imports {wrong}; it may import {prefixes}"


@pytest.mark.parametrize(("package", "places"), [("ray", RAY_MAY_BE_IMPORTED_IN), ("vllm", VLLM_MAY_BE_IMPORTED_IN)])
def test_ray_and_vllm_stay_at_the_edge(package: str, places: tuple[str, ...]) -> None:
    users = [
        str(path.relative_to(REPO))
        for path in SOURCES
        if any(name.split(".")[0] == package for name in imported_modules(path))
    ]
    assert users, f"nothing imports {package}: the rule tests nothing"
    outside = [user for user in users if not user.startswith(places)]
    assert not outside, f"{package} is imported in {outside}; only {places} may"


def test_core_algos_is_pure_torch() -> None:
    names = {name.split(".")[0] for name in imported_modules(REPO / "verl/trainer/ppo/core_algos.py")}
    assert names <= {"torch", "numpy", "verl", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", ["verl", "verl.trainer.config", "recipe.onpolicy_distill.main_onpolicy_distill"])
def test_imports_that_help_needs_are_light(module: str) -> None:
    probe = f"import sys, {module}; print([m for m in ('torch', 'ray', 'vllm', 'transformers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
