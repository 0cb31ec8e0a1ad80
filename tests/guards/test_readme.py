"""Files, commands and settings that the README and the pages of commands name exist and work."""

import re
import shlex
from pathlib import Path

import pytest
from support.doc_commands import after_variables, commands, module_of, trainings, variables_of
from support.tiny_pairs import REPO

from recipe.onpolicy_distill.cli import COMMANDS
from recipe.onpolicy_distill.quickstart.distillation import SELF_WEIGHT, SHARES
from verl.trainer.launch.typed import load_config

README = (REPO / "README.md").read_text(encoding="utf-8")
LINKED = [page for folder in (".", "docs", "examples", "experiments/*") for page in REPO.glob(f"{folder}/*.md")]


def tree_paths() -> list[str]:
    """Paths of the README's annotated tree, with their folders put in front by indentation."""
    block = README.split("```")[1]
    paths, parent = [], ""
    for line in block.strip().splitlines():
        name = line.split()[0]
        parent = parent if line.startswith(" ") else name
        paths.append(name if name == parent else parent + name)
    return paths


def test_the_tree_shows_every_package_and_nothing_else() -> None:
    paths = tree_paths()
    assert len(paths) > 15 and not [path for path in paths if not (REPO / path).exists()]
    folders = {
        str(init.parent.relative_to(REPO)) + "/"
        for top in ("verl", "recipe/onpolicy_distill", "experiments")
        for init in (REPO / top).rglob("__init__.py")
        if "quickstart" not in init.parts
    }
    shown = [path for path in paths if path not in ("verl/", "recipe/onpolicy_distill/")]
    assert not [f for f in folders if not any(f.startswith(path) or path.startswith(f) for path in shown)]


def test_scripts_make_targets_and_modules_that_it_names_exist() -> None:
    scripts = set(re.findall(r"\b[\w/]+\.sh\b", README))
    assert scripts and not [name for name in scripts if not (REPO / name).is_file()]
    targets = set(re.findall(r"\bmake ([\w-]+)", README + (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    assert targets and not [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)]
    texts = "\n".join(page.read_text(encoding="utf-8") for page in LINKED)
    modules = set(re.findall(r"python -m\s+((?:verl|recipe|experiments|benchmarks|examples|scripts)[\w.]*)", texts))
    files = {name: REPO / name.replace(".", "/") for name in modules}
    missing = [name for name, file in files.items() if not (file.with_suffix(".py").is_file() or file.is_dir())]
    assert len(modules) > 10 and not missing
    asked = set(re.findall(r"(?:`|^ {4})kai-verl ([a-z-]+)", texts, re.MULTILINE))
    assert {"contract", "view"} <= asked <= COMMANDS.keys()


def test_links_lead_to_files() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in LINKED}
    links = [(page, link) for page, text in texts.items() for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
    assert len(links) > 50 and not [(page.name, link) for page, link in links if not (page.parent / link).is_file()]


@pytest.mark.parametrize("first", ["algorithm.distill.objective=exact", "data.train_files=general.parquet"])
def test_settings_for_rehearsal_are_accepted(first: str) -> None:
    objectives = (REPO / "docs" / "objectives.md").read_text(encoding="utf-8")
    block = next(part for part in objectives.split("\n\n") if part.startswith(f"    {first}"))
    # The second block takes the place of some lines of the first.
    others = ["algorithm.distill.objective=exact", "actor_rollout_ref.rollout.extend_vocab_start_token=auto"]
    overrides = [*others, *shlex.split(block.replace("\\\n", " "))]
    config = load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")
    if first.startswith("data"):
        assert config.data.synthetic_item_prompts.sources == ["synthetic_rec_next", "synthetic_rec_about"]
    else:
        assert config.algorithm.distill.is_divergence and config.algorithm.distill.teacher_knows_extended("rec_next")
        assert list(config.data.source_weights.values()) == list(SHARES.values())
        assert config.algorithm.distill.teachers["self"].weight == SELF_WEIGHT


PAGES = {"README.md": 1, "docs/howto.md": 9, "examples/README.md": 7, "docs/first_run.md": 1, "docs/quickstart.md": 1}
"""Pages of commands, with how many at least of each train."""
SCRIPT = (REPO / "recipe/onpolicy_distill/run_qwen3_distill.sh").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_commands_that_train_have_settings_that_exist(page: str, tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("10.0.0.1 slots=8\n10.0.0.2 slots=8\n")
    assert len(trainings(page, tmp_path)) >= PAGES[page]


@pytest.mark.parametrize("page", PAGES)
def test_other_commands_have_modules_flags_variables_and_files_that_exist(page: str) -> None:
    for words in commands(page):
        command = after_variables(words)
        assert not [name for name in variables_of(words) if f"{name} " not in SCRIPT], words
        if command[0] == "bash":
            assert (REPO / command[1]).is_file(), words
        if module := module_of(command):
            source = (REPO / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8")
            for flag in (word for word in command if word.startswith("--")):
                # Options of a dataclass have its fields' names.
                assert f'"{flag}"' in source or f"    {flag[2:].replace('-', '_')}:" in source, words


def test_it_stays_short() -> None:
    assert len(README.splitlines()) < 200
    assert len((REPO / "docs/howto.md").read_text(encoding="utf-8").splitlines()) <= 150
