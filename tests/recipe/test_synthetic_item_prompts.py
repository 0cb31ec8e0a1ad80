"""Rehearsal prompts of random items, as a command and in a run's own settings."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.chat_files import chat, write_rows
from support.tiny_pairs import Pair

from recipe.onpolicy_distill.synthetic_item_prompts import main, make_prompt_file
from verl.trainer.launch.checks import check_run
from verl.trainer.launch.typed import load_config
from verl.utils.tokenizer import hf_tokenizer

KEY = "data.synthetic_item_prompts"
TEMPLATES = {"next": {"user": "history: {history}"}, "caption": {"user": "caption: {item}"}}
HYDRA_TEMPLATES = "{next: {user: 'history: {history}'}, caption: {user: 'caption: {item}'}}"
TEACHER = "++algorithm.distill.teachers.self={vocabulary:full,sources:['synthetic_rec_*']}"


def config_of(*overrides: str) -> Any:
    return load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


@pytest.fixture
def run(tiny_pair: Pair, tmp_path: Path) -> list[str]:
    """A run with general prompts and rehearsal of random codes."""
    settings = {
        "actor_rollout_ref.model.path": tiny_pair.student,
        "actor_rollout_ref.ref.model.path": tiny_pair.teacher,
        "actor_rollout_ref.rollout.extend_vocab_start_token": "auto",
        "data.train_files": write_rows(tmp_path / "general.parquet", [chat("Why?", source="general")] * 4),
        "data.cache_dir": tmp_path / "cache",
        "data.train_batch_size": 12,
        "data.max_prompt_length": 256,
        "trainer.default_local_dir": tmp_path / "run",
        "trainer.device": "cpu",
        f"{KEY}.count": 8,
        f"++{KEY}.templates": HYDRA_TEMPLATES,
    }
    return [f"{key}={value}" for key, value in settings.items()]


def test_they_need_a_teacher_that_reads_them(run: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape("['synthetic_rec_next', 'synthetic_rec_caption'], and no teacher")):
        config_of(*run)
    with pytest.raises(ValueError, match=re.escape("['synthetic_rec_next'], and no teacher")) as error:
        config_of(*run, TEACHER.replace("synthetic_rec_*", "*_caption"))
    fix = re.search(r"\+\+algorithm\S+='(.*)'", str(error.value))
    assert fix is not None
    fixed = config_of(*run, f"++algorithm.distill.teachers.self={fix[1]}")
    assert fixed.algorithm.distill.teacher_knows_extended("synthetic_rec_next", True)


def test_a_catalogue_that_cannot_be_used_is_said_before_the_run(run: list[str], tmp_path: Path) -> None:
    missing = tmp_path / "none.parquet"
    with pytest.raises(ValueError, match=re.escape(f"{KEY}.catalogue={missing} matches no parquet file")):
        check_run(config_of(*run, TEACHER, f"{KEY}.catalogue={missing}"))


def test_a_class_of_the_users_own_reads_files_of_its_own(run: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{KEY}.count=8 makes files of this project's layouts")):
        config_of(*run, TEACHER, "data.custom_cls.path=mine.py", "data.custom_cls.name=Mine")


def test_the_command_writes_what_a_run_would_make(
    run: list[str], tiny_pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "rec.parquet"
    arguments = ["--tokenizer", str(tiny_pair.student), "--count", "8", "--out", str(out)]
    main([*arguments, "--templates", json.dumps(TEMPLATES)])
    assert capsys.readouterr().out == f"8 prompts in {out}: 4 synthetic_rec_next, 4 synthetic_rec_caption\n"
    made = make_prompt_file(config_of(*run, TEACHER).data, hf_tokenizer(tiny_pair.student))
    assert out.read_bytes() == made.read_bytes()
    for change, message in {
        ("--count", "0"): "--count 0 must be at least 1",
        ("--templates", '{"a": {"text": "x"}}'): "--templates",
        ("--catalogue", "none.parquet"): "none.parquet",
    }.items():
        with pytest.raises(SystemExit, match=r"^error: [^\n]*" + re.escape(message)):
            main([*arguments, "--templates", json.dumps(TEMPLATES), *change])
