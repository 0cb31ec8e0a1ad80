"""Loading a user's module, and a class or function of it by name.

In:  a Python file or a dotted module, and a name in it. Out: the object. Runs the code it loads.
"""

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

EXTERNAL_MODULES = "VERL_USE_EXTERNAL_MODULES"
"""Environment variable with modules or Python files, commas between them, that every process imports with ``verl``."""


def import_external_modules(names: Iterable[str] = ()) -> None:
    """Import these and those of the environment here; every process of the run does when it imports ``verl``.

    Raises:
        ValueError: one of them cannot be imported.
    """
    known = os.environ.get(EXTERNAL_MODULES, "").split(",")
    # Another process may have another current folder.
    names = [os.path.abspath(os.path.expanduser(name)) if name.endswith(".py") else name for name in [*known, *names]]
    modules = [name for name in names if name]
    for name in modules:
        load_module(name)
    os.environ[EXTERNAL_MODULES] = ",".join(dict.fromkeys(modules))


def load_extern_type(file_path: str | Path, type_name: str) -> Any:
    """The object ``type_name`` of a Python file or of a dotted module.

    Args:
        file_path: see ``load_module``.
        type_name: name of a class, function or other attribute.

    Raises:
        ValueError: no such file, module or name; the message gives what the module does define.
    """
    module = load_module(file_path)
    if not hasattr(module, type_name):
        defined = ", ".join(sorted(name for name in vars(module) if not name.startswith("_")))
        raise ValueError(f"{file_path} defines no {type_name!r}; it defines {defined or 'nothing'}")
    return getattr(module, type_name)


def load_module(path: str | Path) -> ModuleType:
    """The module of a Python file (``path/to/file.py``, ``file://path/to/file.py``) or of a dotted name.

    A dotted name may be written as verl does: ``pkg://package.module``, ``pkg://package/module``.

    Raises:
        ValueError: there is no such file or module, or it cannot be imported.
    """
    text = str(path).removeprefix("file://")
    if text.startswith("pkg://"):
        text = text.removeprefix("pkg://").removesuffix(".py").replace("/", ".")
    try:
        return _load_file(Path(text)) if text.endswith(".py") or "/" in text else importlib.import_module(text)
    except (ImportError, SyntaxError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{text}.".startswith(f"{error.name}."):
            raise ValueError(f"no module {text!r} can be imported; give a Python file or a dotted module") from error
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    """The module of a Python file, registered so that pickling and a second load find the same objects."""
    resolved = path.expanduser().resolve()
    if resolved.suffix != ".py" or not resolved.is_file():
        raise ValueError(f"{path} is no file that ends in .py; give a Python file or a dotted module")
    name = f"{resolved.stem}_{hashlib.sha256(str(resolved).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None, "a name that ends in .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # a half-executed module must not be what the next load finds
        raise
    return module
