"""The examples of code of one's own: each by hand, and all but the tool in one short training."""

import json
import re
import shlex
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from support.agent_loop_fakes import END, call, converse
from support.chat_files import EXTEND_START
from support.doc_commands import PROGRAMS, commands, module_of
from support.in_process_run import run_in_process
from support.launch import Run
from support.tiny_pairs import REPO

from examples.tiny import settings, write_models_and_prompts
from recipe.onpolicy_distill.synthetic_item_prompts import item_sampler
from verl.config import CustomClassConfig, DataConfig
from verl.config.ppo import RewardFunctionConfig
from verl.experimental.agent_loop.base import ChatTemplate, get_agent_loop_class
from verl.tools.base_tool import BaseTool, initialize_tools_from_config
from verl.trainer.launch.checks import check_run
from verl.trainer.launch.typed import load_config
from verl.trainer.ppo.reward import load_reward_fn
from verl.utils.dataset.items import item_tokens, read_catalogue
from verl.utils.dataset.onerec_dataset import create_rl_dataset
from verl.utils.import_utils import EXTERNAL_MODULES, import_external_modules, load_extern_type
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.vocab_contract import read_contract

EXAMPLES = REPO / "examples"
AGAIN = {"role": "user", "content": "Please answer."}
STEPS, ANSWERS, FEWEST, FORMAT_PART, DECAY = 2, 4, 8, 0.25, 0.9


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_each_is_short_and_gives_a_command_of_the_readme(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 60
    shown = [shlex.split(line) for line in text.replace("\\\n", " ").splitlines() if "python -m examples.tiny" in line]
    known = [*commands("examples/README.md"), ["python", "-m", "examples.tiny", "[HYDRA_OVERRIDES]"]]
    assert len(shown) == (path.name != "__init__.py") and all(command in known for command in shown)


# ------------------------------------------------------------------ each by hand


@pytest.mark.parametrize(
    ("answer", "score", "one_line"),
    [
        ("Paris", 1.1, 1.0),
        ("<think>\nfar\n</think>\n\n paris\n", 1.1, 1.0),
        ("Rome", 0.1, 1.0),
        ("It is\nParis", 0.0, 0.0),
        (" \n", 0.0, 0.0),
    ],
)
def test_the_reward(answer: str, score: float, one_line: float) -> None:
    reward: Any = load_reward_fn(RewardFunctionConfig(path=str(EXAMPLES / "reward.py")))
    result = reward(data_source="capitals", solution_str=answer, ground_truth="Paris", extra_info={})
    assert result == {"score": pytest.approx(score), "acc": float(score > 1), "one_line": one_line}


@pytest.fixture
def calculator() -> BaseTool:
    (tool,) = initialize_tools_from_config(EXAMPLES / "tool.yaml")
    return tool


@pytest.mark.parametrize(
    ("expression", "value"), [("2 * (3 + 4)", "14"), (" -1 / 3", "-0.333333"), ("2e3 - 1", "1999")]
)
async def test_the_tool_works_out(calculator: BaseTool, expression: str, value: str) -> None:
    instance, _ = await calculator.create()
    response, reward, metrics = await calculator.execute(instance, {"expression": expression})
    assert (response.text, reward, metrics) == (value, None, {})


@pytest.mark.parametrize("expression", ["2 ** 9", "open('x')", "x + 1", "'a' * 9"])
async def test_the_tool_runs_nothing_else(calculator: BaseTool, expression: str) -> None:
    with pytest.raises(ValueError, match="numbers, brackets"):
        await calculator.execute("1", {"expression": expression})


async def test_the_model_reads_what_the_tool_answers(tokenizer: Any, calculator: BaseTool) -> None:
    turns: list[str | list[int]] = [call("calculator", '{"expression": "3 * 4"}') + END, "12" + END]
    output, engine = await converse(tokenizer, turns, [calculator], prompt_length=600)
    assert "<tool_response>\n12\n</tool_response>" in tokenizer.decode(engine.requests[1][0])
    assert sum(output.response_mask) == sum(map(len, engine.turns)) < len(output.response_ids)
    assert (output.metrics.tool_calls, output.metrics.tool_errors) == (1, 0)


@pytest.mark.parametrize(
    ("turns", "settings", "masks"),
    [
        (["Yes." + END], {}, "m"),
        ([" " + END, "Yes." + END], {}, "mum"),
        ([END, END], {}, "mum"),
        ([END], {"response_length": 5}, "m"),  # no room for the question
        (["<s_a_1>" + END], {"extend_vocab_start_token": EXTEND_START}, "m."),
        ([END, "<s_a_1>" + END], {"extend_vocab_start_token": EXTEND_START}, "mum."),
    ],
)
async def test_the_agent_loop_asks_again_and_trains_what_the_model_wrote(
    tokenizer: Any, turns: list[Any], settings: dict[str, Any], masks: str
) -> None:
    loop = load_extern_type(EXAMPLES / "agent_loop.py", "AskAgain")
    output, engine = await converse(tokenizer, turns, loop=loop, **settings)
    question = ChatTemplate(tokenizer).encode_tool_turn([AGAIN])
    assert tokenizer.decode(question) == "\n<|im_start|>user\nPlease answer.<|im_end|>\n<|im_start|>assistant\n"
    expected: list[int] = []
    for turn in engine.turns:
        expected += ([0] * len(question) if expected else []) + [1] * len(turn)
    if masks.endswith("."):  # the end token after an item
        expected[-1] = 0
    assert output.response_mask == expected and output.num_turns == (4 if "u" in masks else 2)
    if "u" in masks:
        assert engine.requests[1][0] == output.prompt_ids + engine.turns[0] + question


def test_the_data_set_reads_lines_and_drops_blank_questions(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(
        '{"question": " 1 + 2?", "answer": "3", "source": "sums"}\n{"question": ""}\n{"question": "Why?"}\n'
    )
    chosen = CustomClassConfig(path=str(EXAMPLES / "dataset.py"), name="QuestionDataset")
    config = DataConfig(custom_cls=chosen, cache_dir=str(tmp_path / "cache"))
    dataset = create_rl_dataset([str(path)], tokenizer, config)
    first, second = dataset[0], dataset[1]
    assert len(dataset) == 2 and dataset.drop_report.dropped == {"no_question": 1}
    assert first["raw_prompt"] == [{"role": "user", "content": "1 + 2?"}] and first["data_source"] == "sums"
    assert [row["reward_model"]["ground_truth"] for row in (first, second)] == ["3", None]


def test_the_objective_weighs_by_the_trained_tokens_before() -> None:
    first_tokens = load_extern_type(EXAMPLES / "objective.py", "first_tokens")
    rewards = torch.tensor([[0.0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 2, 0]])
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 0], [0, 1, 1, 0]])
    advantages, returns = first_tokens(rewards, mask, np.array(["a", "a", "b"]))
    right = torch.tensor([[0.5, 0.45, 0, 0.405], [-0.5, -0.45, 0, 0], [0, 2, 1.8, 0]])
    torch.testing.assert_close(advantages, right)
    assert torch.equal(advantages, returns) and advantages is not returns


def test_the_howto_makes_a_student_that_fits_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models_and_prompts(tmp_path)
    page = (REPO / "docs/howto.md").read_text(encoding="utf-8").replace("/models/Qwen3-8B", str(tmp_path / "teacher"))
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", page.replace("/models/my-recommender", "mine"), re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    for block in (textwrap.dedent(block) for block in blocks if re.search(r"^    (from|import) ", block, re.MULTILINE)):
        exec(compile(block, "docs/howto.md", "exec"), {})
    contract = read_contract("mine", str(tmp_path / "teacher"), "auto")
    assert not contract.problems and len(contract.extended) == 3 * 256 + 2
    assert read_catalogue("items.parquet") == [(0, 2, 255), (3, 7, 1)]
    item = item_sampler(hf_tokenizer("mine"), None)(Random(0))
    assert len(item) == 3 and hf_tokenizer("mine").encode("".join(item_tokens(item)))[0] >= contract.extend_start


# ------------------------------------------------------------------ in one training


def end_answers_early(student: Path) -> None:
    """Let the model end a turn as often as it writes its likeliest token: random models hardly ever do."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(student)
    with torch.no_grad():
        likeliest = model(torch.arange(50)[None]).logits[0, :, :EXTEND_START].mean(0).argmax()
        model.lm_head.weight[hf_tokenizer(student).eos_token_id] = model.lm_head.weight[likeliest]
    model.save_pretrained(student)


@pytest.fixture(scope="module")
def trained(one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The README's run of all but the tool, with more and shorter answers and a loop that asks more often."""
    folder = tmp_path_factory.mktemp("tiny")
    write_models_and_prompts(folder)
    end_answers_early(folder / "student")
    loops = [{"name": "ask_again", "_target_": "examples.agent_loop.AskAgain", "fewest": FEWEST}]
    (folder / "loops.yaml").write_text(json.dumps(loops))
    words = max((words for words in commands("examples/README.md") if module_of(words) in PROGRAMS), key=len)
    changes = [
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={folder}/loops.yaml",
        f"actor_rollout_ref.rollout.n={ANSWERS}",
        f"custom_reward_function.reward_kwargs.format_part={FORMAT_PART}",
        f"data.train_files={folder}/questions.jsonl",
        f"data.cache_dir={folder}/cache",
        "data.max_prompt_length=64",
        "data.max_response_length=48",
        f"trainer.total_training_steps={STEPS}",
        "trainer.logger=[file]",
    ]
    overrides = [*settings(folder), *words[3:], *changes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(EXTERNAL_MODULES, "")
        patch.chdir(REPO)  # the paths of the command begin there
        config = load_config(overrides, *PROGRAMS["examples.tiny"])
        import_external_modules(config.actor_rollout_ref.model.external_lib or [])
        assert get_agent_loop_class("ask_again") is load_extern_type(EXAMPLES / "agent_loop.py", "AskAgain")
        check_run(config)
        run_in_process(config)
    yield Run(folder / "run", "", 0)


@pytest.fixture(scope="module")
def rows(trained: Run) -> list[list[dict[str, Any]]]:
    """The answers of each step."""
    files = [trained.folder / "rollouts" / f"{step}.jsonl" for step in range(1, STEPS + 1)]
    return [[json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files]


def test_a_run_reads_the_data_set(rows: list[list[dict[str, Any]]]) -> None:
    for row in (row for step in rows for row in step):
        first, second = re.search(r"user\n(\d) \+ (\d) = \?<", row["input"]).groups()  # type: ignore[union-attr]
        assert row["gts"] == str(int(first) + int(second)) and row["source"] == "sums"


def test_a_run_follows_the_reward(trained: Run, rows: list[list[dict[str, Any]]]) -> None:
    compute_score = load_extern_type(EXAMPLES / "reward.py", "compute_score")
    for number, step in enumerate(rows, 1):
        texts = [re.sub(r"<\|(im_start|im_end|endoftext)\|>", "", row["output"]) for row in step]
        results = [compute_score("", text, row["gts"], {}, FORMAT_PART) for text, row in zip(texts, step, strict=True)]
        assert [row["score"] for row in step] == [result["score"] for result in results]
        metrics, mean = trained.metrics[number], sum(row["score"] for row in step) / len(step)
        assert metrics["critic/score/mean"] == pytest.approx(mean) and mean > 0
        lines = sum(result["one_line"] for result in results) / len(step)
        assert metrics["reward_extra/sums/one_line"] == pytest.approx(lines)


def test_a_run_trains_what_the_model_wrote_in_two_turns(trained: Run, rows: list[list[dict[str, Any]]]) -> None:
    question = len(ChatTemplate(hf_tokenizer(trained.folder.parent / "student")).encode_tool_turn([AGAIN]))
    plain = [row for step in rows for row in step if not row["extend_tokens"]]
    assert {row["num_turns"] for row in plain} == {2, 4}
    for row in plain:
        assert row["response_tokens"] - row["trained_tokens"] == (question if row["num_turns"] == 4 else 0)
        assert ("Please answer." in row["output"]) == (row["num_turns"] == 4)


def test_a_run_weighs_by_the_objective(trained: Run, rows: list[list[dict[str, Any]]]) -> None:
    for number, step in enumerate(rows, 1):
        scores = defaultdict(list)
        for row in step:
            scores[row["uid"]].append(row["score"])
        total = 0.0
        for row in step:
            centred = abs(row["score"] - sum(scores[row["uid"]]) / ANSWERS)
            total += centred * (1 - DECAY ** row["trained_tokens"]) / (1 - DECAY)
        tokens = sum(row["trained_tokens"] for row in step)
        assert trained.metrics[number]["advantage/task_abs"] == pytest.approx(total / tokens, rel=1e-3) and total > 0
        assert trained.metrics[number]["advantage/distill_abs"] > 0 and trained.metrics[number]["actor/grad_norm"] > 0
