"""The entry point resolves the vocabulary before anything reads the threshold."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
from support.tiny_pairs import Pair

from verl.config import PPOConfig
from verl.trainer.launch.typed import load_config
from verl.trainer.launch.vocabulary_check import resolve_vocabulary

KEY = "actor_rollout_ref.rollout.extend_vocab_start_token"
HELPER = "algorithm.distill.teachers.helper"


def config_of(student: Path, teacher: Path | None, *overrides: str) -> PPOConfig:
    paths = [f"actor_rollout_ref.model.path={student}", f"actor_rollout_ref.ref.model.path={teacher or 'null'}"]
    return load_config([*paths, *overrides], "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")


def test_auto_becomes_the_id_it_stands_for(tiny_pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(tiny_pair.student, tiny_pair.teacher, f"{KEY}=auto")
    rollout = config.actor_rollout_ref.rollout
    with pytest.raises(ValueError, match="=auto is not resolved"):
        _ = rollout.extend_start
    contract = resolve_vocabulary(config)
    assert contract is not None and contract.extend_start == tiny_pair.extend_vocab_start_token
    assert rollout.extend_vocab_start_token == rollout.extend_start == tiny_pair.extend_vocab_start_token
    assert "ids that the teacher lacks" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        (["data.prompt_extend_tokens=replace"], True),
        (["actor_rollout_ref.rollout.mask_after_extend_token=False"], True),
        (["data.prompt_extend_tokens=replace", "actor_rollout_ref.ref.ref_replace_token_id=3"], False),
        ([], False),
    ],
)
def test_an_end_token_that_stands_for_items_is_named(
    tiny_pair: Pair, caplog: pytest.LogCaptureFixture, overrides: list[str], warns: bool
) -> None:
    resolve_vocabulary(config_of(tiny_pair.student, tiny_pair.teacher, f"{KEY}=auto", *overrides))
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(found) == warns
    text = "reads 320 '<|endoftext|>', which ends a text; set actor_rollout_ref.ref.ref_replace_token_id to one that"
    assert not warns or text in found[0]


@pytest.mark.parametrize("has_teacher", [True, False])
def test_auto_without_an_extension_is_none(tiny_pair: Pair, has_teacher: bool) -> None:
    config = config_of(tiny_pair.student, tiny_pair.student if has_teacher else None, f"{KEY}=auto")
    assert (resolve_vocabulary(config) is not None) == has_teacher
    assert config.actor_rollout_ref.rollout.extend_vocab_start_token is None


def test_an_unsound_pair(tiny_pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    fix = f"set {KEY}={tiny_pair.extend_vocab_start_token}"
    with pytest.raises(ValueError, match=rf"(?s)trainer.vocab_check=warn.*neither shared nor extended; {fix}"):
        resolve_vocabulary(config_of(tiny_pair.student, tiny_pair.teacher))
    assert caplog.text == ""
    config = config_of(tiny_pair.student, tiny_pair.teacher, "trainer.vocab_check=warn")
    contract = resolve_vocabulary(config)
    assert contract is not None and contract.problems
    assert config.actor_rollout_ref.rollout.extend_vocab_start_token is None
    assert "neither shared nor extended" in caplog.text
    assert resolve_vocabulary(config_of(tiny_pair.student, tiny_pair.teacher, "trainer.vocab_check=off")) is None


def with_teacher(pair: Pair, path: Path, vocabulary: str, *overrides: str) -> PPOConfig:
    further = f"++{HELPER}={{path: {path}, vocabulary: {vocabulary}, sources: [helped_*]}}"
    return config_of(pair.student, pair.teacher, f"{KEY}={pair.extend_vocab_start_token}", further, *overrides)


@pytest.mark.parametrize(
    ("model", "vocabulary", "right"),
    [("teacher", "full", "base"), ("teacher", "stitched", "base"), ("student", "base", "full")],
)
def test_the_vocabulary_of_a_further_teacher(
    tiny_pair: Pair, caplog: pytest.LogCaptureFixture, model: str, vocabulary: str, right: str
) -> None:
    path, verb = getattr(tiny_pair, model), "lacks" if right == "base" else "knows"
    advice = f"- set {HELPER}.vocabulary={right}, not {vocabulary}: {path} {verb} the item tokens"
    with pytest.raises(ValueError, match=re.escape(advice) + "$"):
        resolve_vocabulary(with_teacher(tiny_pair, path, vocabulary))
    resolve_vocabulary(with_teacher(tiny_pair, path, vocabulary, "trainer.vocab_check=warn"))
    assert advice.removeprefix("- ") in caplog.text
    resolve_vocabulary(with_teacher(tiny_pair, path, right))


def test_a_further_teacher_is_compared_where_the_base_teacher_is_the_start(tiny_pair: Pair) -> None:
    start, sound = tiny_pair.extend_vocab_start_token, f"++{HELPER}={{path: {tiny_pair.teacher}, vocabulary: base}}"
    assert resolve_vocabulary(config_of(tiny_pair.student, None, f"{KEY}={start}", sound)) is None
    with pytest.raises(ValueError, match=f"set {HELPER}.vocabulary=base, not full"):
        resolve_vocabulary(config_of(tiny_pair.student, None, f"{KEY}={start}", sound.replace("base}", "full}")))
    with pytest.raises(ValueError, match=f"lacks ids from {start} on; set {KEY}={start}, or give another model"):
        resolve_vocabulary(config_of(tiny_pair.student, None, f"{KEY}=auto", sound))
    topk = ["algorithm.distill.objective=topk", f"algorithm.distill.topk={start + 1}"]
    with pytest.raises(ValueError, match=rf"topk={start + 1} is more than the {start} ids that student and teacher"):
        resolve_vocabulary(config_of(tiny_pair.student, None, f"{KEY}={start}", sound, *topk))


def test_what_else_is_wrong_with_a_further_teacher_follows_the_advice(tiny_pair: Pair, tmp_path: Path) -> None:
    other_end = shutil.copytree(tiny_pair.teacher, tmp_path / "other-end")
    settings = other_end / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token": "!"}))
    with pytest.raises(ValueError, match=f"student and {HELPER} do not fit") as caught:
        resolve_vocabulary(with_teacher(tiny_pair, other_end, "full"))
    _, advice, end = str(caught.value).splitlines()
    assert advice.startswith(f"- set {HELPER}.vocabulary=base") and end.startswith("- the student's end token is")
