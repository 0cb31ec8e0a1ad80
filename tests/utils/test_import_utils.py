"""Loading objects by file and by dotted module."""

import os
import pickle
import subprocess
import sys
from collections import OrderedDict
from email.mime.text import MIMEText
from pathlib import Path

import pytest

from verl.utils.import_utils import EXTERNAL_MODULES, load_extern_type


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class Thing:\n    pass\n")
    thing = load_extern_type(str(path), "Thing")
    assert load_extern_type(path, "Thing") is thing
    assert isinstance(pickle.loads(pickle.dumps(thing())), thing)


def test_dotted_modules_and_paths_as_verl_writes_them(tmp_path: Path) -> None:
    for module in ("collections", "pkg://collections"):
        assert load_extern_type(module, "OrderedDict") is OrderedDict
    assert load_extern_type("pkg://email/mime/text.py", "MIMEText") is MIMEText
    (tmp_path / "mine.py").write_text("answer = 42\n")
    assert load_extern_type(f"file://{tmp_path}/mine.py", "answer") == 42


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.py is no file"):
        load_extern_type(tmp_path / "absent.py", "Thing")
    with pytest.raises(ValueError, match=r"no module 'no_such_package.inner'"):
        load_extern_type("no_such_package.inner", "Thing")


def test_a_broken_file_shows_its_own_error_every_time(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    for text, expected in (("import no_such", "No module named 'no_such'"), ("def f(:", r"syntax \(broken.py, ")):
        path.write_text(text)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"broken.py cannot be imported: .*{expected}"):
                load_extern_type(path, "Thing")


def test_every_process_imports_the_users_modules(tmp_path: Path) -> None:
    """Once, at the first import of the package, whatever its folder; the environment goes on to further processes."""
    (tmp_path / "mine.py").write_text("import os\nos.environ['MINE'] = os.environ.get('MINE', '') + 'x'\n")
    probe = "import os, verl.utils.import_utils as utils; utils.import_external_modules(['json', 'mine.py']); "
    probe += "print(os.environ['MINE'], os.environ[utils.EXTERNAL_MODULES])"
    env = os.environ | {EXTERNAL_MODULES: "mine.py"}
    done = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout == f"x {tmp_path}/mine.py,json\n", done.stderr
