"""Runs whose teacher alone is told a rule, for all prompts or in a column of the data: the student, never told, learns
it. Student and teacher begin as one model, which answers a letter, and its capital when told to shout.
"""

import re
from copy import deepcopy
from pathlib import Path
from random import Random
from string import ascii_lowercase
from typing import Any, cast

import pytest
import torch
from support import tiny_workers as tiny
from support.chat_files import chat, write_rows
from support.exact_cases import lone_teacher
from support.in_process_run import run_in_process, settings
from support.launch import read_metrics
from support.tiny_pairs import Pair

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from recipe.onpolicy_distill.quickstart.models import TokenizedChat, TrainingConfig, train
from recipe.onpolicy_distill.tiny_models import new_model
from verl.config import PPOConfig
from verl.experimental.agent_loop.base import ChatTemplate
from verl.trainer.ppo.teacher_prompt import TeacherPrompts, with_system_prompt
from verl.utils.dataset.items import item_tokens, read_item_texts
from verl.utils.tokenizer import hf_tokenizer, save_tokenizer

pytestmark = pytest.mark.usefixtures("one_rank")

REF, STEPS = "actor_rollout_ref.ref", 40
RULE = "Shout."
KNOWN, HELD_OUT = range(40), range(40, 50)


def question(letter: str, number: int) -> str:
    return f"name {letter} {number}"


@pytest.fixture(scope="module")
def model(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers a letter, or its capital where a system message tells it to."""
    folder, tokenizer = tmp_path_factory.mktemp("model"), hf_tokenizer(tiny_tokenizers[0])
    template, chats = ChatTemplate(tokenizer), []
    for letter in ascii_lowercase:
        for number in KNOWN:
            for rule, answer in ((None, letter), (RULE, letter.upper())):
                turns = with_system_prompt([{"role": "user", "content": question(letter, number)}], rule)
                prompt = template.encode_prompt(turns, False)
                chats.append(TokenizedChat(prompt + tokenizer.encode(answer + tokenizer.eos_token), len(prompt)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape: dict[str, Any] = {"rows": len(tokenizer), "hidden": 64, "layers": 2, "heads": 2, "tied": True}
        trained = new_model(tokenizer, **shape, max_position_embeddings=256, initializer_range=0.05)
        train(trained, chats, TrainingConfig(steps=200, learning_rate=3e-3), "model", on_questions=False)
    trained.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def run_of(model: Path, folder: Path, told_letters: str, **changes: Any) -> PPOConfig:
    """Trains on known numbers, validates on others: the reward is the share of capitals."""
    rule, random = re.compile(f"[{told_letters}]"), Random(0)

    def rows(numbers: range) -> list[dict[str, Any]]:
        pairs = [(letter, number) for letter in ascii_lowercase for number in numbers]
        return [
            chat(question(*pair), pair[0].upper(), source="told" if rule.match(pair[0]) else "untold")
            | {"uuid": f"{pair}", "hint": RULE if rule.match(pair[0]) else random.choice(["", None])}
            for pair in random.sample(pairs, len(pairs))
        ]

    reward = folder.with_suffix(".py")
    reward.write_text("def compute_score(solution_str, ground_truth, **_):\n    return solution_str == ground_truth\n")
    values: dict[str, Any] = {
        f"{REF}.model.path": "null",
        "actor_rollout_ref.actor.optim.lr": 3e-3,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 16,
        "custom_reward_function.path": reward,
        "data.enable_think": False,
        "data.max_response_length": 4,
        "data.train_batch_size": 16,
        "data.val_files": write_rows(folder / "val.parquet", rows(HELD_OUT)),
        "trainer.save_freq": -1,
        "trainer.test_freq": STEPS,
        "trainer.total_training_steps": STEPS,
        "trainer.val_before_train": True,
        **changes,
    }
    train_file = write_rows(folder / "train.parquet", rows(KNOWN))
    return settings(Pair(model, model, "null"), train_file, folder, **values)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("told_letters", "changes"),
    [
        ("a-z", {f"{REF}.system_prompt": RULE, "algorithm.distill.objective": "exact"}),
        ("a-m", {f"{REF}.system_prompt_column": "hint", "algorithm.distill.objective": "topk"}),
    ],
)
def test_a_rule_that_the_teacher_alone_is_told_is_learned(
    model: Path, tmp_path: Path, told_letters: str, changes: dict[str, Any]
) -> None:
    """For all prompts, and for those of some letters alone: the others stay as they are."""
    run_in_process(run_of(model, tmp_path, told_letters, **changes))
    metrics = read_metrics(tmp_path)
    assert metrics[0]["val/told/reward"] < 0.02 and metrics[STEPS]["val/told/reward"] > 0.9
    assert metrics[STEPS].get("val/untold/reward", 0.0) < 0.1


def test_what_a_column_can_be(tiny_pair: Pair, tmp_path: Path) -> None:
    def build(**changes: Any) -> None:
        values = {f"{REF}.{name}": value for name, value in changes.items()}
        build_trainer(run_of(tiny_pair.teacher, tmp_path, "a-z", **values))

    with pytest.raises(ValueError, match=r"ref\.system_prompt_column=hints names no column with a text .* from hint"):
        build(system_prompt_column="hints")
    with pytest.raises(ValueError, match=r"ref\.system_prompt is not read beside .*\.system_prompt_column=hint; leave"):
        build(system_prompt_column="hint", system_prompt=RULE)
    with pytest.raises(ValueError, match=r"ref\.system_prompt_column=hint makes rows of up to \d+ tokens; raise"):
        build(system_prompt_column="hint", log_prob_max_token_len_per_gpu=64 + 4)
    with pytest.raises(
        ValueError, match=r"ref\.item_text=a: data.prompt_extend_tokens=drop leaves .* set it to replace"
    ):
        build(item_text="a", **{"model.path": tiny_pair.teacher})
    # Also where the base teacher is the student as it was: the data leave out what their teachers do not know by name.
    with pytest.raises(ValueError, match=r"ref\.item_text=a: data.prompt_extend_tokens=drop leaves"):
        build(item_text="a")
    served = {"engine": "vllm", "system_prompt_column": "hint"}
    with pytest.raises(ValueError, match=r"hint makes rows longer .*; set .*ref\.engine_kwargs\.max_model_len above"):
        build(**served)
    with pytest.raises(
        ValueError, match=r"rows of up to (\d+) tokens; raise .*ref\.engine_kwargs\.max_model_len=69 to"
    ):
        build(**served, **{"engine_kwargs": "{max_model_len: 69}"})
    build(**served, **{"engine_kwargs": "{max_model_len: 512}"})


def test_hints_of_scored_validation_rows_are_measured_too(tiny_pair: Pair, tmp_path: Path) -> None:
    """They are longer than all to train on; validation that scores nothing does not ask for them."""
    hinted = [chat("name a 1", "A") | {"uuid": "a", "hint": RULE * 20}]
    values = {f"{REF}.system_prompt_column": "hint", f"{REF}.log_prob_max_token_len_per_gpu": 64 + 4 + 60}
    config = run_of(tiny_pair.teacher, tmp_path, "a-z", **values)
    config.data.val_files = [write_rows(tmp_path / "long.parquet", hinted)]
    sampling = config.actor_rollout_ref.rollout.val_kwargs
    sampling.do_sample = False
    build_trainer(config)
    sampling.do_sample = True
    with pytest.raises(ValueError, match=r"system_prompt_column=hint makes rows of up to \d+ tokens; raise"):
        build_trainer(config)


# ------------------------------------------------------------------ items as texts


def test_of_items_in_a_prompt_the_teacher_reads_texts(tiny_pair: Pair, tmp_path: Path) -> None:
    """Its scores are those of a prompt that is written so by hand; prompts without a known item stay as they are."""
    catalogue = {(1, 2, 3): "a red tea set", (4, 5, 6): "the lantern"}
    rows = [{"sid": list(item), "text": text} for item, text in catalogue.items()]
    path, random = write_rows(tmp_path / "items.parquet", rows), Random(0)
    written = {"".join(item_tokens(item)): text for item, text in catalogue.items()}
    unknown = "".join(item_tokens((7, 7, 7)))
    template, config = ChatTemplate(hf_tokenizer(tiny_pair.student)), PPOConfig()
    config.actor_rollout_ref = tiny.worker_config(
        tiny_pair.student, tiny_pair.teacher, tiny_pair.extend_vocab_start_token, ref={"item_text": str(path)}
    )
    talks, by_hand = [], []
    for _ in range(40):
        parts = random.choices([*written, unknown, "buy ", "what is", "7"], k=random.randint(1, 6))
        turns = [{"role": "system", "content": parts[0]}] * random.randint(0, 1)
        talks.append([*turns, {"role": "user", "content": "".join(parts)}])
        by_hand.append([*turns, {"role": "user", "content": "".join(written.get(part, part) for part in parts)}])
        by_hand[-1][0] = {**by_hand[-1][0], "content": written.get(parts[0], parts[0])} if turns else by_hand[-1][0]
    batch, wanted = tiny.answered(talks, template), tiny.answered(by_hand, template)
    read = TeacherPrompts(config, template).as_read(batch, ["ref"] * len(batch))
    for key in ("input_ids", "attention_mask", "responses"):
        assert torch.equal(read.tensor(key), wanted.tensor(key))
    short, longest = deepcopy(config), int(wanted.tensor("attention_mask").sum(dim=1).max())
    short.actor_rollout_ref.actor.ppo_max_token_len_per_gpu = longest
    short.actor_rollout_ref.ref.log_prob_max_token_len_per_gpu = longest - 1
    short.actor_rollout_ref.ref.log_prob_use_dynamic_bsz = True
    TeacherPrompts(short, template).as_read(batch, ["ref"] * len(batch), in_update=True)
    limit = f"actor_rollout_ref.ref.log_prob_max_token_len_per_gpu={longest - 1} to {longest}"
    with pytest.raises(ValueError, match=rf"ref\.item_text makes rows of up to {longest} tokens; raise {limit}$"):
        TeacherPrompts(short, template).as_read(batch, ["ref"] * len(batch))
    actor = short.actor_rollout_ref.actor
    actor.ppo_micro_batch_size_per_gpu, actor.ppo_max_token_len_per_gpu = 4, longest - 1  # cut by rows
    TeacherPrompts(short, template).as_read(batch, ["ref"] * len(batch), in_update=True)
    short.actor_rollout_ref.model.override_config = {"max_position_embeddings": longest - 1}
    with pytest.raises(ValueError, match=rf"ref\.item_text makes .* {longest} tokens; shorten it, .* {longest - 1}$"):
        TeacherPrompts(short, template).as_read(batch, ["ref"] * len(batch), in_update=True)
    teacher = lone_teacher(config.actor_rollout_ref)
    scores, right, as_student = (
        teacher.compute_ref_log_prob(rows).tensor("ref_log_prob") for rows in (read, wanted, batch)
    )
    assert torch.equal(scores, right)
    changed = torch.tensor([talk != text for talk, text in zip(talks, by_hand, strict=True)])
    assert torch.equal(scores[~changed], as_student[~changed]) and 5 < changed.sum() < 35
    assert (scores != as_student)[changed].any(dim=1).all()


def test_a_catalogue_without_texts_is_refused(tmp_path: Path) -> None:
    def read(*rows: dict[str, Any]) -> dict[str, str]:
        return read_item_texts(write_rows(tmp_path / "items.parquet", list(rows)))

    named = {"sid": [1, 2, 3], "text": "tea"}
    assert read(named, named) == {"".join(item_tokens((1, 2, 3))): "tea"}
    with pytest.raises(ValueError, match=r"items\.parquet has no column 'text'; it needs sid, and text of each item"):
        read({"sid": [1, 2, 3]})
    for other in ({**named, "text": "set"}, {"sid": [3, 2, 1], "text": ""}):
        with pytest.raises(ValueError, match=r"has no text, or two, of item \[\d, 2, \d\]; give it one"):
            read(named, other)
    with pytest.raises(ValueError, match=r"items\.parquet, row 0 has no text, or two, of item \[1, 2, 3\]"):
        read({**named, "text": 7})
    for sid in ([1.0, 2.0, 3.0], ["1", "2", "3"], None):  # never written like this in a prompt
        with pytest.raises(ValueError, match=r"items\.parquet: sid must hold lists of ints"):
            read({**named, "sid": sid})


def test_settings_that_would_change_nothing_are_refused(tiny_pair: Pair, tmp_path: Path) -> None:
    """Items that no prompt can hold, a template without system messages, hints in rows of another teacher."""
    path = write_rows(tmp_path / "items.parquet", [{"sid": [10**6, 1, 1], "text": "tea"}])
    config, tokenizer = PPOConfig(), deepcopy(hf_tokenizer(tiny_pair.student))
    models = tiny.worker_config(tiny_pair.student, tiny_pair.teacher, tiny_pair.extend_vocab_start_token)
    config.actor_rollout_ref, unread, ref = models, cast(Any, None), models.ref
    ref.item_text = str(path)
    with pytest.raises(ValueError, match=rf"ref\.item_text={path}: the student's tokenizer has not all tokens of any"):
        TeacherPrompts(config, ChatTemplate(tokenizer)).check(unread, None, False)
    ref.item_text, ref.system_prompt = None, RULE
    TeacherPrompts(config, ChatTemplate(tokenizer)).check(unread, None, False)
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"ref\.system_prompt: the chat template shows no system message; leave"):
        TeacherPrompts(config, ChatTemplate(tokenizer)).check(unread, None, False)
    others = {f"{REF}.system_prompt_column": "hint", "++algorithm.distill.teachers.other": "{sources: [told]}"}
    with pytest.raises(ValueError, match=r"ref\.system_prompt_column=hint names no column with a text"):
        build_trainer(run_of(tiny_pair.teacher, tmp_path / "run", "a-m", **others))
