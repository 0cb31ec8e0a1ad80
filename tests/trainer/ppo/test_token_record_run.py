"""What a run records of its tokens adds up to the metrics of the step."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support.in_process_run import run_in_process, settings
from support.launch import read_metrics, write_onerec_parquet
from support.tiny_pairs import make_pair

from verl.experimental.agent_loop.base import AgentLoopBase, AgentLoopOutput, register

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS = 2
TOOL_IDS = [5, 6]
DISTILL, ROLLOUT = "algorithm.distill", "actor_rollout_ref.rollout"
SELF = {f"++{DISTILL}.teachers.self": "{vocabulary:full,sources:[rec_*]}"}
BASE = "ref"


@register("writes_twice")
class WritesTwice(AgentLoopBase):
    """Three tokens, a tool's answer, and the rest; nothing of every fourth row is trained."""

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> AgentLoopOutput:
        trajectory = self.start(row, with_tools=False)
        whole, trajectory.remaining_tokens = trajectory.remaining_tokens, 3
        await self.write_turn(trajectory, sampling_params)
        trajectory.remaining_tokens = whole - len(trajectory.response_ids)
        trajectory.add_other_turn(TOOL_IDS)
        await self.write_turn(trajectory, sampling_params)
        output = self.finish(trajectory, num_turns=4)
        output.response_mask = [mask * (row["index"] % 4 > 0) for mask in output.response_mask]
        return output


def tokens_of(path: Path) -> list[dict[str, Any]]:
    """Every token of a record, with what its row says beside the lists."""
    tokens = []
    for row in pq.read_table(path).to_pylist():
        del row["prompt_ids"]
        lists = {name: values for name, values in row.items() if isinstance(values, list)}
        scalars = {name: value for name, value in row.items() if name not in lists}
        tokens += [scalars | dict(zip(lists, of_token, strict=True)) for of_token in zip(*lists.values(), strict=True)]
    return tokens


def mean(values: list[float]) -> float:
    assert values, "a mean over nothing"
    return sum(values) / len(values)


def gaps(tokens: list[dict[str, Any]]) -> list[float]:
    """Log-probs of student less teacher at trained tokens that every teacher knows, over the ids that its own knows."""
    shared = [token for token in tokens if token["state"] == "trained" and not token["is_item"]]
    mass = [math.log1p(-token["extend_mass"]) if token["teacher"] == BASE else 0.0 for token in shared]
    return [t["student_log_prob"] - log - t["teacher_log_prob"] for t, log in zip(shared, mass, strict=True)]


@pytest.mark.parametrize(
    ("values", "states"),
    [
        ({f"{DISTILL}.objective": "exact", f"{DISTILL}.leak_coef": 0.1}, {"trained", "after_item"}),
        ({"algorithm.distill_adv_min_clip": -2.0}, {"trained", "after_item"}),
        (
            {f"{ROLLOUT}.agent.default_agent_loop": "writes_twice", "actor_rollout_ref.actor.ppo_mini_batch_size": 6},
            {"trained", "after_item", "other", "whole_answer"},
        ),
    ],
)
def test_sums_are_the_metrics_of_the_step(
    values: dict[str, Any], states: set[str], tiny_tokenizers: Any, tmp_path: Path
) -> None:
    pair = make_pair(*tiny_tokenizers, tmp_path / "pair", extended_scale=1.0)  # draws item tokens
    prompts = write_onerec_parquet(tmp_path / "train.parquet", 24, sources=("general", "rec_next"))
    common = dict.fromkeys(("trainer.test_freq", "trainer.total_training_steps", "trainer.save_freq"), STEPS)
    common |= dict.fromkeys(("actor_rollout_ref.actor.ppo_mini_batch_size", "data.train_batch_size"), 12)
    common |= {"trainer.rollout_data_dir": tmp_path / "rollouts", "trainer.validation_data_dir": tmp_path / "answers"}
    common |= {"data.val_files": prompts, f"{ROLLOUT}.stop_at_extended_token": False, "data.max_response_length": 12}
    run_in_process(settings(pair, prompts, tmp_path / "run", **common | SELF | values))
    seen: set[str] = set()
    for step, metrics in read_metrics(tmp_path / "run").items():
        tokens = tokens_of(tmp_path / "rollouts" / f"{step}.tokens.parquet")
        trained = [token for token in tokens if token["state"] == "trained"]
        of_base = [token for token in trained if token["teacher"] == BASE]
        seen |= {token["state"] for token in tokens}
        assert metrics["actor/entropy"] == pytest.approx(mean([t["entropy"] for t in trained]), abs=1e-5)
        assert metrics["distill/trained_tokens"] == len(of_base) < len(trained)
        assert metrics["distill/extend_mass"] == pytest.approx(mean([t["extend_mass"] for t in of_base]), abs=1e-5)
        assert metrics["distill/reverse_kl"] == pytest.approx(mean(gaps(of_base)), abs=1e-5)
        of_self = [token for token in trained if token["teacher"] == "self"]
        assert metrics["distill_teacher/self/reverse_kl"] == pytest.approx(mean(gaps(of_self)), abs=1e-5)
        items = [t for t in of_self if t["is_item"]]
        right = mean([t["student_log_prob"] - t["teacher_log_prob"] for t in items])
        assert metrics["distill_teacher/self/extend_reverse_kl"] == pytest.approx(right, abs=1e-5)
        check_signal(trained, metrics, exact=f"{DISTILL}.objective" in values)
        assert all(token["signal"] is None for token in tokens if token["state"] != "trained")
        assert {token["weight_version"] for token in tokens} == {step - 1}, "the first engine has the starting weights"
        lines = [json.loads(line) for line in (tmp_path / "rollouts" / f"{step}.jsonl").read_text().splitlines()]
        rows = pq.read_table(tmp_path / "rollouts" / f"{step}.tokens.parquet").to_pylist()
        assert [row["uid"] for row in rows] == [line["uid"] for line in lines]
        assert [row["response_length"] for row in rows] == [line["response_tokens"] for line in lines]
        assert [row["state"].count("trained") for row in rows] == [line["trained_tokens"] for line in lines]
    assert seen == states
    held_out = tokens_of(tmp_path / "answers" / f"{STEPS}.tokens.parquet")
    right = mean(gaps([token for token in held_out if token["teacher"] == BASE]))
    assert metrics["val/reverse_kl"] == pytest.approx(right, abs=1e-5)
    assert {token["signal"] for token in held_out} == {token["signal_name"] for token in held_out} == {None}


def check_signal(trained: list[dict[str, Any]], metrics: dict[str, float], exact: bool) -> None:
    """The divergence of an exact objective, else the advantage."""
    signal = [token["signal"] for token in trained]
    assert {token["signal_name"] for token in trained} == {"divergence" if exact else "advantage"}
    if not exact:
        assert metrics["critic/advantages/mean"] == pytest.approx(mean(signal), abs=1e-5)
        assert metrics["critic/advantages/min"] == pytest.approx(min(signal), abs=1e-5)
        return
    assert metrics["actor/distill_divergence"] == pytest.approx(mean(signal), abs=1e-5)
    of_items = sum(token["signal"] for token in trained if token["is_item"]) / len(signal)
    assert metrics["actor/extend_divergence"] == pytest.approx(of_items, abs=1e-5) and of_items > 0
