"""Teacher and student: folders that load, rows and ids that fit, what is trained on, and what is made again."""

import re

import pytest
import torch
from support.small_world import build_small_world, make_small_models
from transformers import AutoModelForCausalLM

from recipe.onpolicy_distill.quickstart import models
from recipe.onpolicy_distill.quickstart.cache import cached_folder
from recipe.onpolicy_distill.quickstart.models import (
    IGNORED,
    TokenizedChat,
    TrainingConfig,
    token_ids_and_labels,
    tokenized_chats,
)
from verl.utils.tokenizer import hf_tokenizer


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_student_begins_as_the_teacher(small_world, small_models, tmp_path):
    ids = torch.arange(small_world.extend_vocab_start_token).unsqueeze(0)
    still = make_small_models(small_world, tmp_path, steps=1, learning_rate=1e-12)
    with torch.no_grad():
        logits = [load(folder)(ids).logits[..., : ids.shape[1]] for folder in (*still, small_models[1])]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0], logits[2], atol=1e-2)


def test_a_chat_ends_with_the_end_token_of_its_answer(small_world):
    tokenizer = hf_tokenizer(small_world.student_tokenizer)
    chat = tokenized_chats(small_world.rec_test, tokenizer)[0]
    text, answer = tokenizer.decode(chat.ids), tokenizer.decode(chat.ids[chat.answer_start :])
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


def test_models_are_reused_only_where_nothing_changed(small_world, small_models, tmp_path):
    folder = small_models[0].parent
    written = (small_models[1] / "model.safetensors").stat().st_mtime_ns
    assert make_small_models(small_world, folder) == small_models
    assert (small_models[1] / "model.safetensors").stat().st_mtime_ns == written
    other_world = build_small_world(tmp_path, seed=1)
    others = [
        make_small_models(small_world, folder, {"seed": 1}),
        make_small_models(small_world, folder, {"hidden": 64}),
        make_small_models(small_world, folder, seed=1),
        make_small_models(other_world, folder),
    ]
    assert len({small_models[0], *(teacher for teacher, _ in others)}) == 4
    assert len({small_models[1], *(student for _, student in others)}) == 5


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


def test_a_training_that_was_killed_goes_on_as_if_it_had_not(small_world, small_models, tmp_path, monkeypatch):
    chats = tokenized_chats(small_world.rec_train, hf_tokenizer(small_world.student_tokenizer))
    config, unfinished = TrainingConfig(steps=4, batch_size=4), tmp_path / "unfinished.pt"
    whole, killed, resumed = (load(small_models[1]) for _ in range(3))
    models.train(whole, chats, config, "student", on_questions=True)
    loss, calls = models._loss, []

    def kill(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return loss(*arguments)

    monkeypatch.setattr(models, "SAVE_S", 0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(models, "_loss", kill)
        models.train(killed, chats, config, "student", on_questions=True, unfinished=unfinished)
    models.train(resumed, chats, config, "student", on_questions=True, unfinished=unfinished)
    for name, weight in resumed.state_dict().items():
        assert torch.equal(weight, whole.state_dict()[name]), name
    assert torch.load(unfinished, weights_only=True)["steps"] == 4
