"""The entry point resolves the vocabulary before anything reads the threshold."""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config
from verl.trainer.launch.vocabulary_check import resolve_vocabulary

if TYPE_CHECKING:
    from support.tiny_pairs import Pair

KEY = "actor_rollout_ref.rollout.extend_vocab_start_token"


def config_of(student: Path, teacher: Path | None, *overrides: str) -> PPOConfig:
    paths = [f"actor_rollout_ref.model.path={student}", f"actor_rollout_ref.ref.model.path={teacher or 'null'}"]
    return load_config([*paths, *overrides], "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def test_auto_becomes_the_id_it_stands_for(tiny_pair: "Pair", caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(tiny_pair.student, tiny_pair.teacher, f"{KEY}=auto")
    with pytest.raises(ValueError, match="=auto is not resolved"):
        _ = config.actor_rollout_ref.rollout.extend_start
    contract = resolve_vocabulary(config)
    assert contract is not None and contract.extend_start == tiny_pair.extend_vocab_start_token
    assert config.actor_rollout_ref.rollout.extend_vocab_start_token == tiny_pair.extend_vocab_start_token
    assert config.actor_rollout_ref.rollout.extend_start == tiny_pair.extend_vocab_start_token
    assert "ids that the teacher lacks" in caplog.text


@pytest.mark.parametrize("has_teacher", [True, False])
def test_auto_without_an_extension_is_none(tiny_pair: "Pair", has_teacher: bool) -> None:
    config = config_of(tiny_pair.student, tiny_pair.student if has_teacher else None, f"{KEY}=auto")
    contract = resolve_vocabulary(config)
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
        resolve_vocabulary(config_of(tiny_pair.student, tiny_pair.teacher))
    assert caplog.text == ""
    config = config_of(tiny_pair.student, tiny_pair.teacher, "trainer.vocab_check=warn")
    contract = resolve_vocabulary(config)
    assert contract is not None and contract.problems
    assert config.actor_rollout_ref.rollout.extend_vocab_start_token is None
    assert "neither shared nor extended" in caplog.text
    assert resolve_vocabulary(config_of(tiny_pair.student, tiny_pair.teacher, "trainer.vocab_check=off")) is None


def test_a_tokenizer_beside_the_model(tiny_pair: "Pair", tiny_tokenizers: tuple[Path, Path]) -> None:
    teacher, student = tiny_tokenizers
    config = config_of(
        tiny_pair.student,
        tiny_pair.teacher,
        f"{KEY}={tiny_pair.extend_vocab_start_token}",
        f"actor_rollout_ref.model.tokenizer_path={student}",
        f"actor_rollout_ref.ref.model.tokenizer_path={teacher}",
    )
    contract = resolve_vocabulary(config)
    assert contract is not None and (contract.student.tokenizer_path, contract.teacher.tokenizer_path) == (
        str(student),
        str(teacher),
    )


def with_teacher(pair: "Pair", path: Path, vocabulary: str, *overrides: str) -> PPOConfig:
    further = f"++algorithm.distill.teachers.helper={{path: {path}, vocabulary: {vocabulary}, sources: [helped_*]}}"
    return config_of(pair.student, pair.teacher, f"{KEY}={pair.extend_vocab_start_token}", further, *overrides)


@pytest.mark.parametrize("vocabulary", ["full", "stitched"])
def test_a_further_teacher_without_item_tokens_is_said_to_be_base(tiny_pair: "Pair", vocabulary: str) -> None:
    with pytest.raises(ValueError, match=r"^set algorithm\.distill\.teachers\.helper\.vocabulary=base: ") as caught:
        resolve_vocabulary(with_teacher(tiny_pair, tiny_pair.teacher, vocabulary))
    (line,) = str(caught.value).splitlines()
    assert f"helper.path={tiny_pair.teacher} lacks the item tokens, and vocabulary={vocabulary} says otherwise" in line
    resolve_vocabulary(with_teacher(tiny_pair, tiny_pair.teacher, "base"))


def test_a_further_teacher_with_item_tokens_is_said_to_be_full(tiny_pair: "Pair") -> None:
    with pytest.raises(ValueError, match=r"^set algorithm\.distill\.teachers\.helper\.vocabulary=full: ") as caught:
        resolve_vocabulary(with_teacher(tiny_pair, tiny_pair.student, "base"))
    assert "knows the item tokens, and vocabulary=base says otherwise" in str(caught.value)
    resolve_vocabulary(with_teacher(tiny_pair, tiny_pair.student, "full"))


def test_what_else_is_wrong_with_a_further_teacher_follows_the_advice(tiny_pair: "Pair", tmp_path: Path) -> None:
    other_end = tmp_path / "other-end"
    shutil.copytree(tiny_pair.teacher, other_end)
    settings = other_end / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "!"}))
    with pytest.raises(ValueError, match="vocabulary=base: ") as caught:
        resolve_vocabulary(with_teacher(tiny_pair, other_end, "full"))
    first, *others = str(caught.value).splitlines()
    assert first.startswith("set algorithm.distill.teachers.helper.vocabulary=base")
    assert len(others) == 1 and others[0].startswith("- the student's end token is")
    with pytest.raises(ValueError, match=r"teachers\.helper \(vocabulary=base\) does not fit: ") as caught:
        resolve_vocabulary(with_teacher(tiny_pair, other_end, "base"))
    assert others[0] in str(caught.value)


def test_a_further_teacher_that_does_not_fit_may_pass(tiny_pair: "Pair", caplog: pytest.LogCaptureFixture) -> None:
    resolve_vocabulary(with_teacher(tiny_pair, tiny_pair.teacher, "full", "trainer.vocab_check=warn"))
    assert "set algorithm.distill.teachers.helper.vocabulary=base: " in caplog.text
