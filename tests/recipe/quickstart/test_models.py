"""Teacher and student: folders that load, rows and ids that fit, what is trained on, and what is made again."""

import json
import re

import pytest
import torch
from support.small_world import build_small_world, short_student, short_teacher
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.onpolicy_distill.quickstart.cache import cached_folder
from recipe.onpolicy_distill.quickstart.models import (
    IGNORED,
    StudentConfig,
    TeacherConfig,
    TokenizedChat,
    make_student,
    make_teacher,
    token_ids_and_labels,
    tokenized_chats,
)
from verl.utils.tokenizer import hf_tokenizer


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return build_small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def pair(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    teacher = make_teacher(small, folder, short_teacher())
    return teacher, make_student(small, teacher, folder, short_student())


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_folders_load_and_item_ids_begin_among_the_spare_rows_of_the_teacher(small, pair):
    start = small.extend_vocab_start_token
    for folder, ids in zip(pair, (start, start + 3 * 4 + 2), strict=True):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), load(folder)
        generation = json.loads((folder / "generation_config.json").read_text())
        assert len(tokenizer) == ids
        assert ids <= model.config.vocab_size
        assert model.config.head_dim >= 32
        assert model.config.tie_word_embeddings
        assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.pad_token_id]
        assert generation["pad_token_id"] == tokenizer.pad_token_id
    assert load(pair[0]).config.vocab_size >= start + 8


def test_the_student_begins_as_the_teacher(small, pair, tmp_path):
    still = make_student(small, pair[0], tmp_path, short_student(steps=1, learning_rate=1e-12))
    ids = torch.arange(small.extend_vocab_start_token).unsqueeze(0)
    with torch.no_grad():
        teacher, student = (load(folder)(ids).logits[..., : ids.shape[1]] for folder in (pair[0], still))
        moved = load(pair[1])(ids).logits[..., : ids.shape[1]]
    torch.testing.assert_close(teacher, student, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(teacher, moved, atol=1e-2)


def test_an_untied_pair(small, tmp_path):
    teacher = make_teacher(small, tmp_path, short_teacher(tied=False))
    student = load(make_student(small, teacher, tmp_path, short_student()))
    assert not student.config.tie_word_embeddings
    assert student.lm_head.weight.shape == student.model.embed_tokens.weight.shape
    assert not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)


def test_a_chat_ends_with_the_end_token_of_its_answer(small):
    tokenizer = hf_tokenizer(small.student_tokenizer)
    chat = next(chat for chat in tokenized_chats(small.rec_test, tokenizer))
    text = tokenizer.decode(chat.ids)
    answer = tokenizer.decode(chat.ids[chat.answer_start :])
    assert text.startswith("<|im_start|>user\nhistory: <|sid_begin|>")
    assert text.endswith("<|im_start|>assistant\n" + answer)
    assert re.fullmatch(r"<\|sid_begin\|><s_a_\d><s_b_\d><s_c_\d><\|sid_end\|><\|im_end\|>", answer)


def test_labels_token_by_token():
    # ids      5  6  7 | 8  9      and, padded with 0,   5  6 | 7
    chats = [TokenizedChat([5, 6, 7, 8, 9], 3), TokenizedChat([5, 6, 7], 2)]
    ids, answers = token_ids_and_labels(chats, on_questions=False)
    _, everything = token_ids_and_labels(chats, on_questions=True)
    assert ids.tolist() == [[5, 6, 7, 8, 9], [5, 6, 7, 0, 0]]
    assert answers.tolist() == [[IGNORED] * 3 + [8, 9], [IGNORED] * 2 + [7] + [IGNORED] * 2]
    assert everything.tolist() == [[IGNORED, 6, 7, 8, 9], [IGNORED, 6, 7, IGNORED, IGNORED]]


def test_models_are_reused_only_where_nothing_changed(small, pair, tmp_path_factory):
    folder = pair[0].parent
    written = (pair[1] / "model.safetensors").stat().st_mtime_ns
    assert make_teacher(small, folder, short_teacher()) == pair[0]
    assert make_student(small, pair[0], folder, short_student()) == pair[1]
    assert (pair[1] / "model.safetensors").stat().st_mtime_ns == written

    other_world = build_small_world(tmp_path_factory.mktemp("other"), seed=1)
    teachers = [
        make_teacher(world, folder, short_teacher(**changes))
        for world, changes in ((small, {"seed": 1}), (small, {"hidden": 64}), (small, {"steps": 2}), (other_world, {}))
    ]
    assert len({pair[0], *teachers}) == 5
    students = [
        make_student(small, teacher, folder, short_student(**changes))
        for teacher, changes in ((pair[0], {"seed": 1}), (pair[0], {"batch_size": 4}), (teachers[0], {}))
    ]
    assert len({pair[1], *students}) == 4


def test_the_seed_decides_the_weights(small, pair, tmp_path):
    again = make_teacher(small, tmp_path, short_teacher())
    other = make_teacher(small, tmp_path, short_teacher(seed=1))
    first, same, different = (load(folder).lm_head.weight for folder in (pair[0], again, other))
    torch.testing.assert_close(first, same)
    assert not torch.allclose(first, different)


def test_an_interrupted_folder_is_made_again(tmp_path):
    def fail(target):
        (target / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached_folder(tmp_path, "thing", {"seed": 0}, fail)
    assert not list(tmp_path.iterdir())
    made = cached_folder(tmp_path, "thing", {"seed": 0}, lambda target: (target / "whole").write_text("whole"))
    assert sorted(path.name for path in made.iterdir()) == ["key.json", "whole"]
    assert cached_folder(tmp_path, "thing", {"seed": 0}, fail) == made


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (TeacherConfig, {"heads": 3}, "heads 3 must be even"),
        (TeacherConfig, {"steps": 0}, "steps 0 must be positive"),
        (StudentConfig, {"learning_rate": -1.0}, "learning_rate -1.0 must be positive"),
    ],
)
def test_bad_settings(config, settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**settings)
