"""The entry point settles the vocabulary before anything reads the threshold."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer, settle_vocabulary
from verl.trainer.config import PPOConfig
from verl.trainer.config.typed import load_config

if TYPE_CHECKING:
    from tiny_pairs import Pair

KEY = "actor_rollout_ref.rollout.extend_vocab_start_token"


def config_of(student: Path, teacher: Path | None, *overrides: str) -> PPOConfig:
    paths = [f"actor_rollout_ref.model.path={student}", f"actor_rollout_ref.ref.model.path={teacher or 'null'}"]
    return load_config([*paths, *overrides], "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def test_auto_becomes_the_id_it_stands_for(tiny_pair: "Pair", caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(tiny_pair.student, tiny_pair.teacher, f"{KEY}=auto")
    with pytest.raises(ValueError, match="was not settled"):
        _ = config.actor_rollout_ref.rollout.extend_start
    contract = settle_vocabulary(config)
    assert contract is not None and contract.extend_start == tiny_pair.extend_vocab_start_token
    assert config.actor_rollout_ref.rollout.extend_vocab_start_token == tiny_pair.extend_vocab_start_token
    assert config.actor_rollout_ref.rollout.extend_start == tiny_pair.extend_vocab_start_token
    assert "ids that the teacher lacks" in caplog.text


@pytest.mark.parametrize("has_teacher", [True, False])
def test_auto_without_an_extension_is_none(tiny_pair: "Pair", has_teacher: bool) -> None:
    config = config_of(tiny_pair.student, tiny_pair.student if has_teacher else None, f"{KEY}=auto")
    contract = settle_vocabulary(config)
    assert (contract is not None) == has_teacher
    assert config.actor_rollout_ref.rollout.extend_vocab_start_token is None


def test_what_needs_an_extension_is_refused_where_auto_finds_none(tiny_pair: "Pair", tmp_path: Path) -> None:
    wanted = [f"{KEY}=auto", "actor_rollout_ref.actor.freeze_extended_rows=True", "trainer.device=cpu"]
    config = config_of(tiny_pair.student, tiny_pair.student, *wanted, f"trainer.default_local_dir={tmp_path}")
    with pytest.raises(ValueError, match=r"freeze_extended_rows=True has no effect without extended ids"):
        build_trainer(config)


def test_an_unsound_pair(tiny_pair: "Pair", caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        ValueError, match=rf"neither shared nor extended; set {KEY}={tiny_pair.extend_vocab_start_token}"
    ):
        settle_vocabulary(config_of(tiny_pair.student, tiny_pair.teacher))
    assert caplog.text == ""
    config = config_of(tiny_pair.student, tiny_pair.teacher, "trainer.vocab_check=warn")
    contract = settle_vocabulary(config)
    assert contract is not None and contract.problems
    assert config.actor_rollout_ref.rollout.extend_vocab_start_token is None
    assert "neither shared nor extended" in caplog.text
    assert settle_vocabulary(config_of(tiny_pair.student, tiny_pair.teacher, "trainer.vocab_check=off")) is None


def test_a_tokenizer_beside_the_model(tiny_pair: "Pair", tiny_tokenizers: tuple[Path, Path]) -> None:
    teacher, student = tiny_tokenizers
    config = config_of(
        tiny_pair.student,
        tiny_pair.teacher,
        f"{KEY}={tiny_pair.extend_vocab_start_token}",
        f"actor_rollout_ref.model.tokenizer_path={student}",
        f"actor_rollout_ref.ref.model.tokenizer_path={teacher}",
    )
    contract = settle_vocabulary(config)
    assert contract is not None and (contract.student.tokenizer, contract.teacher.tokenizer) == (
        str(student),
        str(teacher),
    )
