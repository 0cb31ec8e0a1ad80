"""Loading a user's class or function by name.

In:  a Python file or a dotted module, and a name in it. Out: the object. Runs the code it loads.
"""

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any


def load_extern_type(file_path: str | Path, type_name: str) -> Any:
    """The object ``type_name`` of a Python file or of a dotted module.

    Args:
        file_path: ``path/to/file.py``, ``package.module`` or, the same, ``pkg://package.module``.
        type_name: name of a class, function or other attribute.

    Raises:
        ValueError: no such file, module or name; the message gives what the module does define.
    """
    text = str(file_path).removeprefix("pkg://")
    if text.endswith(".py") or "/" in text:
        module = _load_file(Path(text))
    else:
        try:
            module = importlib.import_module(text)
        except ModuleNotFoundError as error:
            # Only the module itself: a missing import inside it is the user's to see as it is.
            if error.name is None or not f"{text}.".startswith(f"{error.name}."):
                raise
            raise ValueError(f"no module {text!r} can be imported; give a Python file or a dotted module") from error
    if not hasattr(module, type_name):
        defined = ", ".join(sorted(name for name in vars(module) if not name.startswith("_")))
        raise ValueError(f"{file_path} defines no {type_name!r}; it defines {defined or 'nothing'}")
    return getattr(module, type_name)


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
