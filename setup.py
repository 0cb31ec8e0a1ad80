"""Package metadata; the versions live in requirements/."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def requirements(name: str) -> list[str]:
    """Requirement lines of requirements/NAME.txt."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def version() -> str:
    """``__version__`` of the package, read without importing it."""
    match = re.search(r'^__version__ = "(.+)"', (ROOT / "verl" / "__init__.py").read_text(encoding="utf-8"), re.M)
    if match is None:
        raise RuntimeError("verl/__init__.py holds no __version__")
    return match.group(1)


setup(
    name="kai-verl",
    version=version(),
    description="On-policy distillation for language models whose vocabulary extends their teacher's",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["verl", "verl.*", "recipe", "recipe.*"]),
    # Not the launch scripts: they need the cluster scripts of a checkout.
    package_data={
        "verl": ["py.typed"],
        "recipe": ["py.typed"],
        "verl.trainer.config": ["*.yaml"],
        "verl.trainer.checkpoint": ["*.yaml"],
        "verl.utils": ["*.json"],
        "verl.viewer": ["*.html", "*.css", "*.js"],
        "recipe.onpolicy_distill": ["config/*.yaml", "*.jinja"],
        "recipe.onpolicy_distill.quickstart": ["*.html", "*.yaml"],
    },
    entry_points={"console_scripts": ["kai-verl = recipe.onpolicy_distill.cli:main"]},
    install_requires=requirements("base"),
    extras_require={
        "cpu": requirements("cpu"),
        "cuda": requirements("cuda"),
        "flash-attn": ["flash-attn>=2.7"],
        "dev": requirements("dev"),
    },
)
