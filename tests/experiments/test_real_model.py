"""The study of a real chat model: its table by hand, its data, and its steps on a random model of the same kind."""

import json
import math
import subprocess
import sys
from random import Random
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.tiny_pairs import REPO

from experiments.real_model import data, ifeval, judge, models
from experiments.real_model.__main__ import main
from experiments.real_model.distil import MODES, DistilConfig, settings
from experiments.real_model.side_by_side import side_by_side
from experiments.real_model.sizes import sizes_of
from experiments.real_model.table import Estimate, compare, markdown
from recipe.onpolicy_distill.quickstart import models as training
from recipe.onpolicy_distill.quickstart.catalogue import all_item_tokens
from verl.trainer.launch.typed import load_config
from verl.utils.dataset.items import item_tokens
from verl.utils.tokenizer import hf_tokenizer

COMMAND = [sys.executable, "-m", "experiments.real_model"]


def test_a_mean_over_instructions_has_the_error_of_prompts():
    """Two prompts: 2 of 3 followed, 0 of 1; mean 2/4, residuals (2 - 1.5)/2 and (0 - 0.5)/2."""
    estimate = Estimate.of([(2, 3), (0, 1)])
    assert estimate.mean == 0.5 and estimate.residuals == [0.25, -0.25]
    assert estimate.error == pytest.approx(math.sqrt(0.125 / 2))
    assert Estimate.of([(1, 1)]).error is None


def test_what_fell_short_comes_first_and_differences_are_paired():
    ones, half, none = [(1, 1)] * 4, [(1, 1), (1, 1), (0, 1), (0, 1)], [(0, 1)] * 4
    before = {"ifeval_prompt_strict": none, "leak": ones, "recall_1": half, "recall_5": half}
    after = {"ifeval_prompt_strict": half, "leak": none, "recall_1": half, "recall_5": [*half[:3], (1, 1)]}
    rows = compare({"teacher": {"ifeval_prompt_strict": ones, "leak": none}, "before": before, "after": after})
    assert [row["metric"] for row in rows] == ["ifeval_prompt_strict", "leak", "recall_1", "recall_5"]
    strict, _, first, fifth = rows
    assert strict["short"] == 0.5 and strict["change"] == "50% regained"
    assert first["error"]["after"] == pytest.approx(math.sqrt(1 / 3 / 4)) and first["short_error"] == 0
    # One prompt of four won: the differences are 0, 0, 0 and 1.
    assert (fifth["short"], fifth["short_error"]) == (-0.25, pytest.approx(0.25))
    assert markdown(rows).splitlines()[2].startswith("| IFEval, prompts, strict | 4 | 1.000 ± 0.000 | 0.000 ± 0.000 |")


def test_the_verifier_of_ifeval():
    pytest.importorskip("lm_eval", reason=models.INSTALL)
    asked = {
        "punctuation:no_comma": {},
        "length_constraints:number_sentences": {"relation": "at least", "num_sentences": 3},
        "change_case:capital_word_frequency": {"capital_relation": "at least", "capital_frequency": 2},
    }
    document = {"key": 0, "prompt": "?", "instruction_id_list": list(asked), "kwargs": list(asked.values())}
    # Dr. ends no sentence; the words in capitals are USA and END.
    strict = ifeval.verdicts(document, "Dr. Smith left the USA. He came back. This is the END.")["strict"]
    assert strict == [True, True, True]
    assert ifeval.verdicts(document, "Dr. Smith left, I hear. Yes.")["strict"] == [False, False, False]
    loose = ifeval.verdicts(document, "Sure, here it is:\nI go. You go. The USA is the END.")
    assert (loose["strict"], loose["loose"]) == ([False, True, True], [True, True, True])


def test_what_usually_follows_an_item_counts_every_purchase(tmp_path):
    a, b, c = ("".join(item_tokens((number, 0, 0))) for number in range(3))
    rows = [{"source": judge.NEXT, "messages": text} for text in (a + b + b + a, b + b + c)]
    pq.write_table(
        pa.Table.from_pylist([*rows, {"source": "rec_item", "messages": a + c}]), tmp_path / "rec_train.parquet"
    )
    users = [SimpleNamespace(prompt=f"bought {text}") for text in (a + b + a, a + b)]
    # After a: b once. After b: b twice, a and c once.
    following = judge._usual_next(tmp_path, users, popular := [(2, 0, 0), (0, 0, 0), (1, 0, 0)])
    assert following == [[(1, 0, 0), *popular[:2]], [(1, 0, 0), (0, 0, 0), (2, 0, 0)]]


@pytest.mark.parametrize("real", [True, False])
def test_purchases_become_chats(real, request, tmp_path):
    config = data.DataConfig(items=64, history=4, rec_train=4000, test_users=50, test_about=5)
    folder = data.make_data(tmp_path, config, request.getfixturevalue("shared_data") if real else tmp_path)
    train, test = (pq.read_table(folder / f"rec_{name}.parquet").to_pylist() for name in ("train", "test"))
    assert (len(train), len(test)) == (4000, 60)
    items = {
        row["item"]: (row["text"], row["caption"]) for row in pq.read_table(folder / "catalogue.parquet").to_pylist()
    }
    for row in test:
        question, answer = (message["content"][0]["text"] for message in json.loads(row["messages"]))
        text, title = items[json.loads(row["metadata"])["target_item"]]
        asked = {"rec_next": "<|sid_end|>. What will", "rec_title": text, "rec_item": f"name {title}?"}
        assert asked[row["source"]] in question and answer == (title if row["source"] == "rec_title" else text)


def test_users_who_are_tested_are_in_no_training_row(monkeypatch, tmp_path):
    items = {user: {"sid": [user, 0, 0], "title": f" LAMP {user} "} for user in range(16)}
    monkeypatch.setattr(data, "catalogue_items", lambda *_: items)
    monkeypatch.setattr(data, "purchase_windows", lambda *_: {str(user): [[user] * 4, [user] * 5] for user in items})
    made = data._online_retail(data.DataConfig(), tmp_path, Random(0))
    trained, tested = ({run[0] for run in runs} for runs in (made.trained, made.tested))
    assert len(tested) == 2 and not trained & tested and trained | tested == set(items)
    assert [len(run) for run in made.tested] == [5, 5], "the last purchases"
    assert made.items[3]["title"] == "lamp 3"


def test_the_distillation_s_settings_are_valid(tmp_path):
    models.make_teacher(tmp_path, tiny=True).rename(tmp_path / "teacher")

    def config_of(mode):
        folders = dict.fromkeys(("student", "data", "prompts"), tmp_path) | {"teacher": tmp_path / "teacher"}
        values = settings(DistilConfig(3, bf16=True, mode=mode, first_tokens=8), **folders)
        overrides = [f"{key}={value}" for key, value in values.items()]
        return load_config(overrides, "recipe.onpolicy_distill.config", "onpolicy_distill_trainer")

    exact, sampled, fork = map(config_of, MODES)
    shares = dict(zip([*data.QUESTIONS, "general_*"], (0.14, 0.16, 0.08, 0.62), strict=True))
    assert exact.algorithm.distill.is_divergence and exact.algorithm.distill.teacher_knows_extended(data.NEXT)
    assert exact.data.seed == 3 and exact.data.source_weights == shares
    assert [sampled.actor_rollout_ref.rollout.horizon.at(step) for step in (1, 51, 101, 150)] == [8, 36, 64, 64]
    for config in (sampled, fork):
        assert config.algorithm.distill.objective == "sampled" and not config.algorithm.distill.teachers
        assert config.data.train_files == [str(tmp_path / "general_train.parquet")] and not config.data.source_weights
    masks = [config.actor_rollout_ref.rollout.mask_after_extend_token for config in (exact, sampled, fork)]
    assert masks == [True, True, False]
    assert fork.actor_rollout_ref.ref.ref_replace_token_id == hf_tokenizer(tmp_path / "teacher").eos_token_id
    assert sizes_of("full", 2, True).judge.bf16 and sizes_of("small", 2, False).student.learning_rate == 3e-4


def test_answers_stand_side_by_side(tmp_path):
    for model, answers in {"before": ["<s_a_1>", "x\ny|z"], "after": ["*Hi*", ""]}.items():
        lines = [{"source": "ifeval", "prompt": f"q{n}", "answer": text} for n, text in enumerate(answers)]
        lines.append({"source": "rec_next", "prompt": "q0", "answer": "other"})
        (tmp_path / model).mkdir()
        (tmp_path / model / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = side_by_side({model: tmp_path / model for model in ("before", "after")}, seed=1)
    assert text.count("| | answer |") == 2 and "other" not in text
    rows = ["before | &lt;s\\_a\\_1>", "after | \\*Hi\\*", "before | x<br>y\\|z", "after | (nothing)"]
    assert [row for row in rows if f"| {row} |" not in text] == []


def test_a_student_that_only_has_more_ids_is_at_no_distance(tmp_path):
    """The teacher gives its tokens more, having nothing else to give to; over the ids of both they are equal."""
    size, teacher = sizes_of("tiny", 0, False), models.make_teacher(tmp_path, tiny=True)
    files = data.make_data(tmp_path, size.data, tmp_path), data.make_prompts(teacher, tmp_path, size.prompts)
    training.save_model(tmp_path / "student", *models.extend(teacher, all_item_tokens(64), seed=0))
    known, extended = hf_tokenizer(teacher).get_vocab(), hf_tokenizer(tmp_path / "student").get_vocab()
    assert known.items() <= extended.items() and len(extended) == len(known) + 2 + 3 * 64
    folder = judge.judge(tmp_path / "student", teacher, files, tmp_path, tmp_path, size.judge)
    outcomes = json.loads((folder / "outcomes.json").read_text())
    assert sum(tokens for _, tokens in outcomes["reverse_kl"]) > 0 < sum(leaks for leaks, _ in outcomes["leak"])
    assert all(abs(nats) < 1e-3 for nats, _ in outcomes["reverse_kl"])
    counted, summed = (Estimate.of(outcomes[key]).mean for key in ("leak", "leak_mass"))
    assert summed == pytest.approx(counted, rel=0.5) and len(outcomes["leak"]) == size.prompts.test


@pytest.mark.slow
def test_every_step_on_a_random_model_and_none_of_them_twice(tmp_path, caplog):
    out = tmp_path / "out"
    arguments = ["--tiny", "--out", str(out), "--data", str(tmp_path), "actor_rollout_ref.rollout.name=hf"]
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--until", "judge_before"])
    subprocess.run([*COMMAND, *arguments], check=True, cwd=REPO, timeout=400)
    (result,) = out.glob("result-*.json")  # named by its override
    metrics = {row["metric"] for row in json.loads(result.read_text())["rows"]}
    assert {"reverse_kl", "leak_mass", "recall_20", "free_item", "rec_title"} <= metrics
    caplog.set_level("INFO", "experiments")
    caplog.set_level("INFO", "recipe")
    caplog.clear()
    main(arguments)
    assert caplog.text.count("reused: ") == 8


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_real_model_on_a_small_scale(tmp_path):
    arguments = ["--small", "--out", str(tmp_path)]
    first = subprocess.run([*COMMAND, *arguments, "--until", "teacher"], cwd=REPO, capture_output=True, text=True)
    if first.returncode and "pip" in first.stderr.splitlines()[-1]:
        pytest.skip(first.stderr.splitlines()[-1])
    assert first.returncode == 0, first.stderr
    subprocess.run([*COMMAND, *arguments], check=True, cwd=REPO, timeout=1400)
    rows = {row["metric"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    assert rows["reverse_kl"]["mean"]["after"] < rows["reverse_kl"]["mean"]["before"]
