"""What has to agree on every host of a cluster, as one line: ``versions python=3.11.2 torch=2.13.0 ... code=1f3a9c02``.

    python scripts/versions.py

Read as a run reads it of its nodes, by ``verl/single_controller/ray/node_check.py``, which needs the standard library
alone and is loaded without the package around it, so that it takes no time; ``code`` is a digest of this checkout.
"""

import hashlib
import importlib.util
import platform
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
NODE_CHECK = ROOT / "verl" / "single_controller" / "ray" / "node_check.py"


def load_report() -> ModuleType:
    """The module that looks at a machine."""
    spec = importlib.util.spec_from_file_location("node_check", NODE_CHECK)
    assert spec is not None and spec.loader is not None, "a Python file has both"
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Print the line."""
    sys.path.insert(0, str(ROOT))  # this checkout's sources, whatever is installed
    report = load_report()
    found = {"python": platform.python_version()}
    found |= {package: report.installed_version(package) for package in report.DISTRIBUTIONS}
    sources = sorted(item for package in report.SOURCES for item in report.source_digests(package).items())
    found["code"] = hashlib.sha256(repr(sources).encode()).hexdigest()[:8]
    print("versions", *(f"{name}={value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
