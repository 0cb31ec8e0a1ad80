"""Rehearsal prompts of random items, as a command and in a run's own settings."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.chat_files import chat, write_rows
from support.in_process_run import settings
from support.tiny_pairs import Pair

from recipe.onpolicy_distill.synthetic_item_prompts import main, make_prompt_file
from verl.config import PPOConfig
from verl.trainer.launch.checks import check_run
from verl.utils.tokenizer import hf_tokenizer

KEY = "data.synthetic_item_prompts"
TEMPLATES = {"next": {"user": "history: {history}"}, "caption": {"user": "caption: {item}"}}
HYDRA_TEMPLATES = "{next: {user: 'history: {history}'}, caption: {user: 'caption: {item}'}}"
TEACHER = "++algorithm.distill.teachers.self"
READS = {TEACHER: "{vocabulary:full,sources:['synthetic_rec_*']}"}


@pytest.fixture
def run(tiny_pair: Pair, tmp_path: Path) -> Callable[..., PPOConfig]:
    """Settings of a run with general prompts and rehearsal of random codes."""
    train = write_rows(tmp_path / "general.parquet", [chat("Why?", source="general")] * 4)
    rehearsal = {f"{KEY}.count": 8, f"++{KEY}.templates": HYDRA_TEMPLATES}
    return lambda **changes: settings(tiny_pair, train, tmp_path / "run", **rehearsal, **changes)


def test_they_need_a_teacher_that_reads_them(run: Callable[..., PPOConfig]) -> None:
    with pytest.raises(ValueError, match=re.escape("['synthetic_rec_next', 'synthetic_rec_caption'], and no teacher")):
        run()
    with pytest.raises(ValueError, match=re.escape("['synthetic_rec_next'], and no teacher")) as error:
        run(**{TEACHER: "{vocabulary:full,sources:['*_caption']}"})
    fix = re.search(r"\+\+algorithm\S+='(.*)'", str(error.value))
    assert fix is not None
    assert run(**{TEACHER: fix[1]}).algorithm.distill.teacher_knows_extended("synthetic_rec_next", True)


def test_a_catalogue_that_cannot_be_used_is_said_before_the_run(run: Callable[..., PPOConfig], tmp_path: Path) -> None:
    missing = tmp_path / "none.parquet"
    with pytest.raises(ValueError, match=re.escape(f"{KEY}.catalogue={missing} matches no parquet file")):
        check_run(run(**READS, **{f"{KEY}.catalogue": missing}))


def test_a_class_of_the_users_own_reads_files_of_its_own(run: Callable[..., PPOConfig]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{KEY}.count=8 makes files of this project's layouts")):
        run(**READS, **{"data.custom_cls.path": "mine.py", "data.custom_cls.name": "Mine"})


def test_the_command_writes_what_a_run_would_make(
    run: Callable[..., PPOConfig], tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rec.parquet"
    arguments = ["--tokenizer", str(tiny_pair.student), "--count", "8", "--out", str(out)]
    main([*arguments, "--templates", json.dumps(TEMPLATES)])
    assert capsys.readouterr().out == f"8 prompts in {out}: 4 synthetic_rec_next, 4 synthetic_rec_caption\n"
    made = make_prompt_file(run(**READS).data, hf_tokenizer(tiny_pair.student))
    assert out.read_bytes() == made.read_bytes()
    for change, message in {
        ("--count", "0"): "--count 0 must be at least 1",
        ("--templates", '{"a": {"text": "x"}}'): "--templates",
        ("--catalogue", "none.parquet"): "none.parquet",
    }.items():
        with pytest.raises(SystemExit, match=r"^error: [^\n]*" + re.escape(message)):
            main([*arguments, "--templates", json.dumps(TEMPLATES), *change])
