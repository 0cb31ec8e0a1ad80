"""Runs whose teacher is behind a URL, or reads a system prompt of its own, in this process."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_workers as tiny
from support.agent_loop_fakes import schema
from support.exact_cases import lone_teacher
from support.fake_server import FakeServer
from support.in_process_run import run_in_process, settings
from support.launch import read_metrics, series, write_onerec_parquet
from support.loop_fakes import bare_trainer
from support.tiny_pairs import Pair

from recipe.onpolicy_distill.main_onpolicy_distill import build_trainer
from recipe.onpolicy_distill.onpolicy_distill_trainer import RayOnPolicyDistillTrainer, with_sums
from verl.config import PPOConfig
from verl.experimental.agent_loop.base import ChatTemplate
from verl.protocol import DataProto
from verl.single_controller.base import WorkerError
from verl.trainer.ppo.teacher_prompt import with_prompts, with_system_prompt
from verl.utils.tokenizer import hf_tokenizer
from verl.workers.served_teacher import ServedTeacher

pytestmark = pytest.mark.usefixtures("one_rank")

REF, DISTILL = "actor_rollout_ref.ref", "algorithm.distill"
STEPS = 4


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onerec_parquet(tmp_path_factory.mktemp("prompts") / "train.parquet", 16)


def run_of(pair: Pair, prompts: Path, folder: Path, **changes: Any) -> PPOConfig:
    """Compares all ids that both models know, so that whole distributions come from a server too."""
    topk = {f"{DISTILL}.objective": "topk", f"{DISTILL}.topk": pair.extend_vocab_start_token}
    return settings(pair, prompts, folder, **{"trainer.total_training_steps": STEPS, **topk, **changes})


def losses(folder: Path) -> list[float]:
    values = series(folder, "actor/distill_loss")
    assert len(values) == STEPS
    return values


def test_a_run_by_url_is_the_run_with_the_model_and_goes_on_after_both_servers_died(
    tiny_pair: Pair, prompts: Path, tmp_path: Path
) -> None:
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "model"))
    servers = [FakeServer(tiny_pair.teacher) for _ in range(3)]
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "served", **{f"{REF}.url": servers[0].url}))
    assert losses(tmp_path / "served") == pytest.approx(losses(tmp_path / "model"), rel=1e-4)
    assert read_metrics(tmp_path / "served")[1]["distill/teacher_log_prob_bound"] < 1e-6
    urls, broken = f"[{servers[1].url},{servers[2].url}]", tmp_path / "broken"
    # Each sees its own probe twice, once before the run and once in it, and scores half of the rows of three steps.
    servers[1].before = lambda number: servers[1].abort() if number == 7 else None
    servers[2].before = lambda number: servers[2].abort() if number == 14 else None
    with pytest.raises(WorkerError, match=f"{servers[1].url}.*{servers[2].url}"):
        run_in_process(run_of(tiny_pair, prompts, broken, **{f"{REF}.url": urls}))
    assert 0 < len(read_metrics(broken)) < STEPS
    again = FakeServer(tiny_pair.teacher)
    run_in_process(run_of(tiny_pair, prompts, broken, **{f"{REF}.url": again.url}))
    assert losses(broken) == losses(tmp_path / "served")
    for server in (servers[0], again):
        server.close()


def test_answers_are_sent_as_they_come_and_scored_as_they_would_be_together(
    tiny_pair: Pair, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, begun = FakeServer(tiny_pair.teacher), list[str]()
    begin = ServedTeacher.begin
    monkeypatch.setattr(ServedTeacher, "begin", lambda *call: (begun.append(call[1]), begin(*call))[1])
    served = {f"{REF}.url": server.url, f"{DISTILL}.topk": 8}
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "come", **served))
    assert begun == ["score_for_update"] * STEPS
    monkeypatch.setattr(RayOnPolicyDistillTrainer, "scores_as_they_come", False)
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "together", **served))
    server.close()
    assert len(begun) == STEPS
    came, together = (read_metrics(tmp_path / name) for name in ("come", "together"))
    names = ("actor/distill_loss", "actor/grad_norm", "distill/teacher_log_prob_bound", "distill/teacher_rest_mass")
    for step in range(1, STEPS + 1):
        assert [came[step][name] for name in names] == [together[step][name] for name in names]


def test_means_of_parts_are_weighted_by_their_positions() -> None:
    parts = [({"distill/x": 1.0, "distill/y": 0.0}, 1), ({"distill/x": 3.0, "distill/y": 2.0}, 3), ({}, 0)]
    rows = [DataProto.from_dict({"ref_log_prob": torch.zeros(1, 1)}, meta_info={"metrics": of}) for of, _ in parts]
    scores = [with_sums(lambda part=part: part, "b", count) for part, (_, count) in zip(rows, parts, strict=True)]
    trainer = bare_trainer(rollouts=SimpleNamespace(scores_of=lambda batch: DataProto.concat(scores)))
    batch = DataProto.from_dict({"answer_row": torch.arange(3)})
    assert "metrics" not in trainer.ref_log_prob(batch).meta_info
    assert trainer.stage_metrics == {"distill_teacher/b/x": 2.5, "distill_teacher/b/y": 1.5}


def test_what_a_run_finds_out_before_it_starts(tiny_pair: Pair, prompts: Path, tmp_path: Path) -> None:
    def build(**changes: Any) -> None:
        build_trainer(run_of(tiny_pair, prompts, tmp_path, **changes))

    server = FakeServer(tiny_pair.teacher)
    with pytest.raises(ValueError, match=r"^actor_rollout_ref\.ref\.url: servers .*--max-logprobs -1 .*\n- http://127"):
        build(**{f"{REF}.url": "http://127.0.0.1:9"})
    server._tokenizer = type("Other", (), {"encode": lambda *_, **__: [1, 2]})()
    with pytest.raises(ValueError, match=r"(?s)^actor_rollout_ref\.ref\.url: serve the model .*other tokens"):
        build(**{f"{REF}.url": server.url})
    build(**{f"{REF}.url": server.url, "trainer.vocab_check": "warn"})
    server.close()


OTHER = f"++{DISTILL}.teachers.x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{REF}.url": "ftp://a"}, "url=ftp://a must begin with http://"),
        ({f"{REF}.url": "http://me:secret@a/v1"}, "url=a/v1 must begin with http:// or https:// and hold no password"),
        (
            {f"{REF}.url": "http://a", f"{DISTILL}.objective": "exact", f"{DISTILL}.topk": 64},
            "exact needs whole distri",
        ),
        ({OTHER: "{url: [http://a], path: b}"}, "x.path=b is not read beside algorithm.distill.teachers.x.url"),
        ({OTHER: "{url: [http://a], vocabulary: stitched}"}, "x.url with vocabulary=stitched: servers do not tell"),
        (
            {f"{REF}.url": "http://a", f"{REF}.engine": "vllm"},
            "engine=vllm starts servers, and actor_rollout_ref.ref.url",
        ),
        (
            {f"+{REF}.engine_kwargs.quantization": "fp8"},
            "(['quantization']) need actor_rollout_ref.ref.engine=vllm",
        ),
        (
            {f"{REF}.engine": "vllm", f"{DISTILL}.objective": "exact", f"{DISTILL}.topk": 64},
            "servers (actor_rollout_ref",
        ),
        ({OTHER: "{engine: vllm, vocabulary: stitched}"}, "x.engine=vllm with vocabulary=stitched: servers do not"),
        (
            {OTHER: "{vocabulary: stitched, system_prompt: a}", f"{REF}.url": "http://a"},
            "ref.url reads no system_prompt of a stitched teacher",
        ),
        (
            {OTHER: "{vocabulary: stitched, system_prompt_column: a, item_text: b}", f"{REF}.engine": "vllm"},
            "ref.engine=vllm reads no item_text of a stitched teacher",
        ),
        (
            {f"{REF}.engine": "vllm", f"{REF}.item_text": "a", f"{REF}.model.path": "null"},
            "ref.item_text=a: data.prompt_extend_tokens=drop leaves out its prompts with items; set it to replace",
        ),
        (
            {
                f"{REF}.engine": "vllm",
                f"+{REF}.engine_kwargs.tensor_parallel_size": 2,
                "trainer.teacher_nnodes": 1,
                "trainer.teacher_n_gpus_per_node": 3,
            },
            "x trainer.teacher_n_gpus_per_node=3 GPUs do not divide into servers of tensor_parallel_size=2",
        ),
        (
            {
                f"{REF}.url": "http://a",
                "algorithm.adv_estimator": "grpo",
                f"{DISTILL}.objective": "sampled",
                f"{DISTILL}.topk": 64,
            },
            "actor_rollout_ref.ref.url has no effect, for nothing reads",
        ),
        ({f"{REF}.api_key_env": "sk-secret"}, "ref.api_key_env must be the name of a variable"),
        ({f"{REF}.api_key_env": "KEY"}, "api_key_env=KEY has no effect without actor_rollout_ref.ref.url"),
        ({f"{REF}.system_prompt": "a", "data.truncation": "left"}, "system_prompt: data.truncation=left cuts prompts"),
        (
            {
                f"{REF}.url": "http://a",
                f"{REF}.model.path": "null",
                "actor_rollout_ref.rollout.extend_vocab_start_token": "auto",
            },
            "=auto compares tokenizers, and that of actor_rollout_ref.ref.url is not here",
        ),
    ],
)
def test_settings_that_no_server_can_follow(
    changes: dict[str, Any], message: str, tiny_pair: Pair, prompts: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as refused:
        build_trainer(run_of(tiny_pair, prompts, tmp_path, **changes))
    assert message in str(refused.value) and "secret" not in str(refused.value)


@pytest.mark.parametrize("objective", ["topk", "sampled"])
def test_a_run_with_a_served_base_teacher_stitched_to_the_student_as_it_was(
    objective: str, tiny_pair: Pair, prompts: Path, tmp_path: Path
) -> None:
    """Served, the base teacher has no rows past the shared ids, so that `sampled` loses nothing either."""
    server = FakeServer(tiny_pair.teacher, rows=tiny_pair.extend_vocab_start_token)
    changes = {f"++{DISTILL}.teachers.both": "{vocabulary: stitched}", "trainer.total_training_steps": 2}
    if objective == "sampled":
        changes |= {f"{DISTILL}.objective": objective, f"{DISTILL}.topk": 64}
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "model", **changes))
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "served", **changes, **{f"{REF}.url": server.url}))
    server.close()
    name = "actor/distill_loss" if objective == "topk" else "actor/pg_loss"
    wanted, found = ([read_metrics(tmp_path / each)[step] for step in (1, 2)] for each in ("model", "served"))
    assert [step[name] for step in found] == pytest.approx([step[name] for step in wanted], rel=1e-4, abs=1e-6)
    assert all(step[name] for step in wanted)
    assert "distill_teacher/both/teacher_log_prob_bound" in found[0] or objective == "sampled"


# ------------------------------------------------------------------ a system prompt


def chats(pair: Pair, systems: list[str | None]) -> DataProto:
    """Rows with and without a system message, and answers of several lengths."""
    template = ChatTemplate(hf_tokenizer(pair.student))
    turns = [{"role": "user", "content": "add 1 and " + "2" * row} for row in range(len(systems))]
    return tiny.answered(
        [with_system_prompt([turn], system) for system, turn in zip(systems, turns, strict=True)], template
    )


def test_the_teacher_reads_another_system_message_before_the_same_answer(tiny_pair: Pair) -> None:
    template = ChatTemplate(hf_tokenizer(tiny_pair.student))
    student, wanted = (chats(tiny_pair, each) for each in ([None, "list", "be name"], ["be short"] * 3))
    chats_of_teacher = [with_system_prompt(chat, "be short") for chat in student.array("raw_prompt")]
    found = with_prompts(student, chats_of_teacher, template)
    assert torch.equal(found.tensor("input_ids"), wanted.tensor("input_ids"))
    assert torch.equal(found.tensor("attention_mask"), wanted.tensor("attention_mask"))
    assert torch.equal(found.tensor("response_mask"), student.tensor("response_mask"))
    student.array("raw_prompt")[1] = [{"role": "user", "content": "another one"}]
    with pytest.raises(ValueError, match="row 1: its agent loop made another prompt"):
        with_prompts(student, chats_of_teacher, template)


def test_the_same_system_message_gives_the_same_scores(tiny_pair: Pair) -> None:
    config = tiny.worker_config(tiny_pair.student, tiny_pair.teacher, tiny_pair.extend_vocab_start_token)
    trainer = bare_trainer(role_groups={"ref": lone_teacher(config)}, tokenizer=hf_tokenizer(tiny_pair.student))
    batch = chats(tiny_pair, ["be short"] * 4)
    batch.meta_info["validate"] = False
    plain = trainer.score_with("ref", batch).tensor("ref_log_prob")
    trainer.config.actor_rollout_ref.ref.system_prompt = "be short"
    assert torch.equal(trainer.score_with("ref", batch).tensor("ref_log_prob"), plain)
    trainer.config.actor_rollout_ref.ref.system_prompt = "be long"
    other = trainer.score_with("ref", batch).tensor("ref_log_prob")
    assert (other != plain)[batch.tensor("response_mask").bool()].all()
    # A column that tells rows different things, or nothing: each row is scored as if all had its own.
    ref = trainer.config.actor_rollout_ref.ref
    ref.system_prompt, ref.system_prompt_column = None, "hint"
    batch.non_tensor_batch["hints"] = np.array([{"hint": hint} for hint in ("be long", "", "be short", "")])
    batch.array("raw_prompt")[3] = batch.array("raw_prompt")[3][1:]  # not what it was made of, and not looked at
    mixed = trainer.score_with("ref", batch).tensor("ref_log_prob")
    assert torch.equal(mixed, torch.cat([other[:1], plain[1:]]))


def test_a_run_whose_teacher_has_a_system_prompt(tiny_pair: Pair, prompts: Path, tmp_path: Path) -> None:
    """Served and not, it scores the same rows; without the prompt others."""
    server = FakeServer(tiny_pair.teacher)
    told = {f"{REF}.system_prompt": "list all", "trainer.total_training_steps": 2, "trainer.save_freq": -1}
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "model", **told))
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "served", **told, **{f"{REF}.url": server.url}))
    run_in_process(run_of(tiny_pair, prompts, tmp_path / "plain", **told | {f"{REF}.system_prompt": "null"}))
    server.close()
    first = [read_metrics(tmp_path / name)[1]["actor/distill_loss"] for name in ("model", "served", "plain")]
    assert first[0] == pytest.approx(first[1], rel=1e-4) and abs(first[0] - first[2]) > 1e-3
    with pytest.raises(ValueError, match=r"system_prompt makes rows of up to .* tokens; raise"):
        limit = {f"{REF}.log_prob_max_token_len_per_gpu": 64 + 8}
        build_trainer(run_of(tiny_pair, prompts, tmp_path / "long", **told, **limit))


def test_a_prompt_that_lists_tools_lists_them_for_the_teacher_too(tiny_pair: Pair) -> None:
    template = ChatTemplate(hf_tokenizer(tiny_pair.student), [schema("add")])
    chat = [{"role": "user", "content": "add 1 and 2"}]
    told, ids = with_system_prompt(chat, "be short"), torch.tensor([[*template.encode_prompt(chat, True), 5, 6]])
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "responses": ids[:, -2:]}
    batch = DataProto.from_dict(tensors, {"raw_prompt": [chat]})
    found = with_prompts(batch, [told], template).tensor("input_ids")[0].tolist()
    assert found == [*template.encode_prompt(told, True), 5, 6]
