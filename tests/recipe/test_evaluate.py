"""The scoreboard on the tiny pair with the small engine, against the models' own distributions."""

import itertools
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from recipe.onpolicy_distill import evaluate as module
from recipe.onpolicy_distill.evaluate import Evaluation, EvaluationConfig, evaluate, main
from recipe.onpolicy_distill.scoreboard import answers
from recipe.onpolicy_distill.scoreboard.answers import Answerer
from recipe.onpolicy_distill.scoreboard.questions import Question
from recipe.onpolicy_distill.scoreboard.scoring import ScoringConfig, distillation_metrics, sampled_batch, score
from verl.config import AlgoConfig, RolloutConfig
from verl.protocol import DataProto
from verl.utils.dataset.items import item_tokens
from verl.utils.tokenizer import hf_tokenizer

ITEMS = sorted(random.Random(0).sample(list(itertools.product(range(8), repeat=3)), 40))
KINDS = ("general_copy", "general_sum")


def text(item):
    return "".join(item_tokens(item))


def row(source, number, question, *reply, **metadata):
    turns = zip(("user", "assistant"), (question, *reply), strict=False)
    chat = [{"role": role, "content": content} for role, content in turns]
    texts = {"metadata": json.dumps(metadata), "messages": json.dumps(chat)}
    return {"uuid": f"{source}-{number}", "source": source, **texts}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoreboard")
    general = [row(kind, n, f"{kind} {'abcdef'[n]}", "ab") for n in range(6) for kind in KINDS]
    general.append(row("general_copy", 9, f"what is {text(ITEMS[0])}", "ab"))  # items in a general prompt: left out
    rec = [row("rec_next", n, f"after {text(ITEMS[n])}", text(ITEMS[n + 1])) for n in range(4)]
    rec.append(row("rec_bench", 0, "what next?", answer=text(ITEMS[5]) + text(ITEMS[6])))
    rec.append(row("rec_caption", 0, f"what is {text(ITEMS[3])}", "abc"))
    for name, rows in (("general", general), ("rec", rec)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    pq.write_table(pa.table({"pid": range(len(ITEMS)), "sid": [list(item) for item in ITEMS]}), folder / "sid.parquet")
    return folder


def options(files, model, **changes):
    names = {"general": "general", "rec": "rec", "catalogue": "sid"}
    paths = {option: str(files / f"{name}.parquet") for option, name in names.items()}
    sizes = {"engine": "hf", "device": "cpu", "max_prompt_length": 64, "max_new_tokens": 12}
    return EvaluationConfig(model=str(model), **{**paths, **sizes, **changes})


@pytest.fixture(scope="module")
def student(files, tiny_pair):
    pair = {"teacher": str(tiny_pair.teacher), "extend_vocab_start_token": tiny_pair.extend_vocab_start_token}
    return evaluate(options(files, tiny_pair.student, **pair))


def test_the_metrics_are_all_there(student):
    metrics = student.metrics
    assert metrics["rows"] == {"general": 12, "ranked": 5, "rec_text": 1}
    tasks = {
        "general_accuracy": {*KINDS},
        "rec_recall": {"rec_next", "rec_bench"},
        "rec_text_accuracy": {"rec_caption"},
    }
    assert {name: set(metrics[f"{name}_by_task"]) for name in tasks} == tasks
    assert metrics["rec_targets_in_catalogue"] == 1.0
    shares = ("general_accuracy", "rec_recall", "rec_recall_at_1", "rec_pass_at_10", "free_rate", "leak_rate")
    assert all(0 <= metrics[name] <= 1 for name in shares)
    assert 0 < metrics["extend_mass"] < 0.2
    assert metrics["entropy"] > 0 and metrics["reverse_kl"] > 0
    assert metrics["seconds"] >= sum(metrics["seconds_by_phase"].values()) * 0.99


def test_recall_is_that_of_scoring_every_item(student, tiny_pair):
    """Each item's log-prob from full forward passes, renormalised over the catalogue at every level."""
    tokenizer = hf_tokenizer(tiny_pair.student)
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.student, dtype=torch.float32)
    asked = [(f"after {text(ITEMS[n])}", {ITEMS[n + 1]}) for n in range(4)] + [("what next?", {ITEMS[5], ITEMS[6]})]
    recalls = []
    for question, targets in asked:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        prompt = [*prompt, tokenizer.convert_tokens_to_ids("<|sid_begin|>")]
        codes = [[tokenizer.convert_tokens_to_ids(f"<s_{level}_{c}>") for c in range(8)] for level in "abc"]
        log_probs = torch.zeros(len(ITEMS))
        ids = torch.tensor([[*prompt, *(codes[n][c] for n, c in enumerate(item))] for item in ITEMS])
        with torch.no_grad():
            logits = model(ids).logits[:, len(prompt) - 1 : -1]
        for number, item in enumerate(ITEMS):
            for level in range(3):
                allowed = sorted({other[level] for other in ITEMS if other[:level] == item[:level]})
                scores = logits[number, level, [codes[level][c] for c in allowed]].log_softmax(-1)
                log_probs[number] += scores[allowed.index(item[level])]
        best = {ITEMS[n] for n in log_probs.argsort(descending=True)[:10]}
        recalls.append(len(best & targets) / len(targets))
    assert student.metrics["rec_recall_at_10"] == pytest.approx(sum(recalls) / len(recalls))


@pytest.mark.parametrize(("special", "opening", "rate"), [(False, "", 1.0), (True, "", 1.0), (True, "<think>", 0.0)])
def test_right_answers_count_whatever_kind_of_token_items_are(
    files, tiny_pair, tmp_path, monkeypatch, special, opening, rate
):
    """But for those after a thought that the prompt opens and they do not end."""
    folder = shutil.copytree(tiny_pair.student, tmp_path / "student")
    tokenizer = hf_tokenizer(folder)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": item_tokens((1, 2, 3))})
    tokenizer.chat_template += opening
    tokenizer.save_pretrained(folder)

    async def greedy(self, questions, max_new_tokens):
        return [tokenizer.encode(f"{question.wanted}<|im_end|>") for question in questions]

    monkeypatch.setattr("recipe.onpolicy_distill.scoreboard.answers.Answerer.greedy", greedy)
    metrics = evaluate(options(files, folder)).metrics
    names = ("free_rate", "free_valid_rate", "general_accuracy", "rec_text_accuracy")
    assert [metrics[name] for name in names] == [rate] * 4


def test_answers_are_scored_at_the_temperature_that_they_were_drawn_at(tiny_pair):
    start, prompt, answer = tiny_pair.extend_vocab_start_token, [5, 6, 7], [9, 10, 11]
    folders = {"old_log_probs": tiny_pair.student, "ref_log_prob": tiny_pair.teacher}
    paths = {"model": str(tiny_pair.student), "teacher": str(tiny_pair.teacher), "device": "cpu"}
    config = ScoringConfig(**paths, extend_vocab_start_token=start, temperature=0.7, algorithm=AlgoConfig())
    scored = score(sampled_batch([Question("", "", "", prompt, "")], [answer], config, 0), config)
    for key, folder in folders.items():
        model, ids = AutoModelForCausalLM.from_pretrained(folder), len(hf_tokenizer(folder))
        logits = model(torch.tensor([prompt + answer])).logits[0, 2:-1, :ids] / 0.7
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        torch.testing.assert_close(scored.tensor(key)[0], expected, rtol=0, atol=1e-4)


async def test_greedy_answers_are_the_likeliest_tokens_and_a_seed_decides_the_others(tiny_pair):
    answerer = Answerer(str(tiny_pair.student), RolloutConfig(name="hf", prompt_length=8, response_length=4), "cpu")
    asked = [Question("", "", "", [5, 6, number], "") for number in range(20, 28)]
    await answerer.launch()
    try:
        greedy = await answerer.greedy(asked, 1)
        drawn = [await answerer.sampled(asked, 4, 1.0, seed) for seed in (0, 0, 1)]
    finally:
        await answerer.shutdown()
    model, ids = AutoModelForCausalLM.from_pretrained(tiny_pair.student), len(hf_tokenizer(tiny_pair.student))
    logits = model(torch.tensor([question.prompt_ids for question in asked])).logits[:, -1, :ids]
    assert [answer[0] for answer in greedy] == logits.argmax(-1).tolist()
    assert drawn[0] == drawn[1] != drawn[2]


def test_samples_carry_what_training_would_see(student, tiny_pair):
    assert [sample["source"] for sample in student.samples[:4]] == ["general_copy", "general_sum"] * 2
    assert len(student.samples) == 12
    for sample in student.samples:
        tokens = sample["tokens"]
        leaks = [n for n, token in enumerate(tokens) if token["extended"]]
        first = leaks[0] if leaks else len(tokens)
        assert [token["masked"] for token in tokens] == [n > first for n in range(len(tokens))]
        for token in tokens[:first]:
            gap = token["teacher_log_prob"] - token["student_log_prob"]
            assert token["advantage"] == pytest.approx(min(gap, 5.0), abs=2e-4)


def test_a_teacher_has_no_items_to_recommend(files, tiny_pair):
    teacher = options(files, tiny_pair.teacher, rec=None, catalogue=None, max_rows=4)
    metrics = evaluate(teacher).metrics
    assert metrics["rows"] == {"general": 4, "ranked": 0, "rec_text": 0}
    assert not {"rec_recall", "free_rate", "leak_rate", "extend_mass", "reverse_kl"} & set(metrics)
    with pytest.raises(ValueError, match=r"does not name <\|sid_begin\|>"):
        evaluate(options(files, tiny_pair.teacher))


def test_on_the_cpu_the_engine_keeps_short_beginnings(monkeypatch):
    made = []
    monkeypatch.setattr(answers, "get_replica_class", lambda name: lambda rollout, *_: made.append(rollout))
    for device, own in (("cpu", {}), ("cpu", {"block_size": 64}), ("cuda", {})):
        answers.Answerer("model", RolloutConfig(engine_kwargs={"vllm": own}), device)
    assert [rollout.engine_kwargs["vllm"].get("block_size") for rollout in made] == [32, 64, None]


def test_the_first_extended_id_may_come_from_the_teacher(monkeypatch, tiny_pair):
    seen = []
    monkeypatch.setattr(module, "evaluate", lambda config: seen.append(config) or Evaluation({}, []))
    command = ["--model", str(tiny_pair.student), "--general", "g.parquet", "--extend-vocab-start-token", "auto"]
    main([*command, "--teacher", str(tiny_pair.teacher)])
    assert [config.extend_vocab_start_token for config in seen] == [tiny_pair.extend_vocab_start_token]


def test_command_line(files, tiny_pair, tmp_path, capsys):
    out, samples = tmp_path / "deep" / "metrics.json", tmp_path / "samples.json"
    command = ["--model", str(tiny_pair.student), "--general", str(files / "general.parquet"), "--engine", "hf"]
    command += ["--max-rows", "2", "--max-new-tokens", "4", "--max-prompt-length", "64", "--device", "cpu"]
    main([*command, "--rollout", '{"max_num_seqs": 4}', "--out", str(out), "--samples-out", str(samples)])
    metrics = json.loads(out.read_text())
    assert metrics["rows"]["general"] == 2 and "reverse_kl" not in metrics
    assert "advantage" not in json.loads(samples.read_text())[0]["tokens"][0]
    assert "general_accuracy_by_task\n  general_copy" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="is a folder; name a file"):
        main([*command, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"error: --temperature 0\.0 must be above 0"):
        main([*command, "--temperature", "0"])
    with pytest.raises(SystemExit, match="error: --rec and --catalogue belong together"):
        main([*command, "--rec", str(files / "rec.parquet")])


def test_the_leak_rate_is_a_share_of_answers():
    ones, items = torch.ones(2, 4), torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0]])
    tensors = {"responses": 5 * ones.long(), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    tensors |= {"response_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]]), "distill_special_token_mask": items}
    tensors |= {"old_log_probs": -ones, "entropys": ones, "extend_mass": 0.25 * ones}
    metrics = distillation_metrics(DataProto.from_dict(tensors), extended=True)
    assert metrics == {"entropy": 1.0, "leak_rate": 0.5, "extend_mass": 0.25}


def test_template_options_reach_the_prompts(files, tiny_pair):
    changes = {"rec": None, "catalogue": None, "chat_template_kwargs": {"enable_thinking": False}}
    tokenizer = hf_tokenizer(tiny_pair.student)
    asked = module._read(options(files, tiny_pair.student, **changes), tokenizer)["general"]
    endings = [tokenizer.decode(question.prompt_ids).endswith("<think>\n\n</think>\n\n") for question in asked]
    assert endings and all(endings)


async def test_sampled_answers_have_the_temperature_and_seeds_of_their_own(monkeypatch):
    asked = []

    async def write(self, prompt, sampling):
        asked.append((sampling["temperature"], sampling["seed"] % 2**32))
        return [5]

    monkeypatch.setattr(Answerer, "_write", write)
    for seed in (0, 1):
        await object.__new__(Answerer).sampled([Question("", "", "", [5], "")] * 3, 4, 0.7, seed)
    assert {temperature for temperature, _ in asked} == {0.7} and len({seed for _, seed in asked}) == 6
