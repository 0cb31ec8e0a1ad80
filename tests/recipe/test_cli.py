"""``kai-verl``: the table of commands, and completion of what is in it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.tiny_pairs import REPO

import verl
from recipe.onpolicy_distill import cli, completion

EACH_HELP = """
import json, sys
from recipe.onpolicy_distill import cli
heavy = ["hydra", "pydantic", "numpy", "torch", "ray", "vllm", "transformers"]
for name in ("--version", *cli.COMMANDS):
    print(f"== {name}")
    sys.argv = ["kai-verl", name, "--help"]
    try:
        code = cli.main()
    except SystemExit as end:
        code = end.code
    print(json.dumps([name, code or 0, [module for module in heavy if module in sys.modules]]), file=sys.stderr)
    heavy = heavy[-4:]
"""


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int | None:
    monkeypatch.setattr(sys, "argv", ["/bin/kai-verl", *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    return cli.main()


def test_every_command_has_a_help_of_its_own_that_imports_nothing_heavy(tmp_path: Path) -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(REPO)!r}){EACH_HELP}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines() == [f'["{name}", 0, []]' for name in ("--version", *cli.COMMANDS)], done.stderr
    helps = dict(text.split("\n", 1) for text in done.stdout.split("== ")[2:])
    # Hydra's help is a text of ours and every key.
    assert "max_prompt_length: " in helps.pop("distill")
    for name, text in helps.items():
        assert text.startswith(f"usage: kai-verl {name} [-h]"), text


def test_help_may_be_cut_by_its_reader() -> None:
    shell = f"{sys.executable} -m recipe.onpolicy_distill.cli distill --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("141\n", ""), "as other programs end"


def test_python_m_says_the_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/completion.py", "--help"])
    with pytest.raises(SystemExit):
        completion.main()
    assert capsys.readouterr().out.startswith("usage: python -m recipe.onpolicy_distill.completion [-h]")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert call(monkeypatch, *words) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert rows == list(cli.COMMANDS)


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"kai-verl {verl.__version__}\n"


@pytest.mark.parametrize(("word", "hint"), [("evalute", "did you mean evaluate?"), ("x", "kai-verl --help lists them")])
def test_an_unknown_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, hint: str
) -> None:
    assert call(monkeypatch, word) == 2
    assert capsys.readouterr() == ("", f"error: kai-verl has no command {word}; {hint}\n")


def test_a_torchvision_of_another_build_than_torch_is_one_line_with_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = """def main():
    try:
        raise RuntimeError("operator torchvision::nms does not exist")
    except RuntimeError as error:  # as transformers does
        raise ModuleNotFoundError("Could not import module 'PreTrainedModel'") from error
"""
    (tmp_path / "needs_transformers.py").write_text(source, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "broken", cli.Command("needs_transformers", ""))
    assert call(monkeypatch, "broken") == 1
    assert "pip uninstall torchvision" in capsys.readouterr().err


def test_a_command_gets_its_words_and_the_current_folder_and_gives_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "users_command.py").write_text("import users_helper\nmain = users_helper.main\n")
    (tmp_path / "users_helper.py").write_text("import sys\ndef main():\n    return 7 if sys.argv[1:] == ['-a'] else 1")
    monkeypatch.setitem(cli.COMMANDS, "users", cli.Command("users_command", ""))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "users", "-a") == 7
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, "merge", "--local_dir")
    assert end.value.code == 2


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "kai-verl"
    path.write_text(completion.script("bash"))
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)
    return path


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["e"], ["evaluate"]),
        (["r"], ["restore-rows"]),
        (["evaluate", "--samp"], ["--samples", "--samples-out"]),
        (["merge", "--local_dir", "x", "--t"], ["--target_dir"]),
        (["evaluate", "--model", ""], []),  # files
        (["distill", "trainer.nn"], ["trainer.nnodes="]),
        (["plan", "trainer.nn"], ["trainer.nnodes="]),
        (["distill", "trainer.nnodes", "="], []),
        (["distill", "data.train_files", "=", "data"], []),
    ],
)
def test_bash_completes(bash_script: Path, words: list[str], offered: list[str]) -> None:
    # compopt works only where a user presses Tab.
    ask = 'compopt() { :; }; . "$0"; COMP_WORDS=(kai-verl "$@"); COMP_CWORD=$#; _kai_verl; echo "${COMPREPLY[@]}"'
    command = ["bash", "-c", ask, str(bash_script), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (offered, "")


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_are_offered_the_same(shell: str) -> None:
    words = re.findall(r"[\w.=-]+", completion.script(shell))
    assert {*cli.COMMANDS, "--samples-out", "trainer.nnodes="} <= {*words}


def test_the_docs_have_the_same_table() -> None:
    text = (REPO / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| `([\w.]+)` \|$", text, re.MULTILINE)
    assert rows == [(name, command.module.removesuffix(".__main__")) for name, command in cli.COMMANDS.items()]
