"""Loading objects by file and by dotted module."""

import pickle
from collections import OrderedDict
from pathlib import Path

import pytest

from verl.utils.import_utils import load_extern_type


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class Thing:\n    pass\n")
    thing = load_extern_type(str(path), "Thing")
    assert load_extern_type(path, "Thing") is thing
    assert isinstance(pickle.loads(pickle.dumps(thing())), thing)


@pytest.mark.parametrize("module", ["collections", "pkg://collections"])
def test_a_dotted_module(module: str) -> None:
    assert load_extern_type(module, "OrderedDict") is OrderedDict


def test_a_missing_module_is_named() -> None:
    with pytest.raises(ValueError, match=r"no module 'no_such_package.inner'"):
        load_extern_type("no_such_package.inner", "Thing")


def test_a_broken_file_shows_its_own_error_every_time(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_package_inside\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_package_inside"):
            load_extern_type(path, "Thing")
