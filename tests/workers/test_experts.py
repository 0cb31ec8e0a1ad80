"""A mixture of experts as student and teacher: what is trained, sent, exported and resumed.

The reference is transformers alone: each row by itself through the plain model in fp32, whole logits, and the objective
by its formula.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import tiny_workers as tiny
from support.engines import PLAIN, ReplicaProcess, generate, sync
from support.exact_cases import MISSING, TEMPERATURE, Models, workers
from transformers import AutoTokenizer

from verl.config import ActorRolloutRefConfig, AlgoConfig, DistillConfig, HFModelConfig, RolloutConfig
from verl.protocol import DataProto
from verl.trainer.ppo.advantage import distillation_advantage
from verl.workers.fsdp.checkpoint import HUGGINGFACE
from verl.workers.model_workers import StudentWorker, TeacherWorker

pytestmark = pytest.mark.usefixtures("one_rank")

RESPONSE = tiny.RESPONSE
LOW, HIGH = -30.0, 5.0
OBJECTIVES = {"sampled": "actor/pg_loss", "exact": "actor/distill_loss"}
"""Objectives, and the metric that has their loss."""


@pytest.fixture(scope="module")
def mixtures(tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    """An untied student and a teacher, both Qwen3-MoE."""
    folder = tmp_path_factory.mktemp("mixtures")
    extend_start, ids = (len(AutoTokenizer.from_pretrained(tokenizer)) for tokenizer in tiny_tokenizers)
    moe = {"family": "qwen3_moe", "tied": False}
    student = tiny.write_model(folder / "student", tiny_tokenizers[1], **moe)
    teacher = tiny.write_model(folder / "teacher", tiny_tokenizers[0], rows=ids - 10, seed=1, **moe)
    return Models(student, student, teacher, student, ids, extend_start)


def rows_of(models: Models) -> list[tiny.Row]:
    return tiny.draw_rows(8, models.ids, seed=2)


def rollouts(models: Models) -> DataProto:
    return tiny.rollouts(rows_of(models), models.extend_start, TEMPERATURE)


def plain_loss(models: Models, objective: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The objective's mean over trained tokens, and its gradient."""
    start, pad = models.extend_start, AutoTokenizer.from_pretrained(models.teacher).pad_token_id
    student, teacher = tiny.load_plain(models.student), tiny.load_plain(models.teacher)
    losses = []
    for prompt, response in rows_of(models):
        tokens = torch.tensor(prompt + response)
        first_item = next((place for place, token in enumerate(response) if token >= start), len(response))
        drawn = torch.tensor(response[: first_item + 1], dtype=torch.int64)
        predicts = slice(len(prompt) - 1, len(prompt) - 1 + len(drawn))
        log_p = (student(tokens[None]).logits[0, predicts, : models.ids] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            known = tokens.masked_fill(tokens >= start, pad)
            log_q = (teacher(known[None]).logits[0, predicts, :start] / TEMPERATURE).log_softmax(-1)
        if objective == "exact":
            shared = log_p[:, :start].log_softmax(-1)
            losses += (shared.exp() * (shared - log_q)).sum(-1)
            continue
        for place, token in enumerate(drawn.tolist()):
            of_student = log_p[place, token]
            of_teacher = log_q[place, token] if token < start else torch.tensor(MISSING)
            advantage = (of_teacher - of_student.detach()).clamp(LOW, HIGH)
            losses.append(-advantage * (of_student - of_student.detach()).exp())
    loss = torch.stack(losses).mean()
    return loss.detach(), tiny.plain_gradient(student, loss)


def plain_balance(models: Models) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Transformers' own loss over the tokens that an update reads, and its gradient."""
    rows = []
    for prompt, response in rows_of(models):
        first_item = next((place for place, token in enumerate(response) if token >= models.extend_start), RESPONSE)
        rows += [torch.tensor((prompt + response[: first_item + 1])[:-1])] if response else []
    real = [torch.ones_like(tokens) for tokens in rows]
    inputs, mask = (torch.nn.utils.rnn.pad_sequence(values, batch_first=True) for values in (rows, real))
    student = tiny.load_plain(models.student)
    output = student(input_ids=inputs, attention_mask=mask, output_router_logits=True)
    # The last experts and the head have none.
    gradient = tiny.plain_gradient(student, output.aux_loss + 0 * output.logits.sum())
    return output.aux_loss.detach(), gradient


def trained(config: ActorRolloutRefConfig, objective: str, batch: DataProto) -> tuple[StudentWorker, dict[str, float]]:
    """A fresh student after one update on its rank's share of the rows; the metrics."""
    distill = DistillConfig(objective, support="shared") if objective == "exact" else DistillConfig()
    student = workers(config, distill)
    share = batch.chunk(student.world_size)[student.rank]
    if objective == "sampled":
        algorithm = AlgoConfig("on_policy_distill", distill_adv_max_clip=HIGH, distill_adv_min_clip=LOW)
        student.actor.advantage_part = partial(distillation_advantage, config=algorithm)
        teacher = student.colocated_roles["ref"]
        assert isinstance(teacher, TeacherWorker)
        share = share.union(teacher.compute_ref_log_prob(share))
    return student, student.update_actor(share).meta_info["metrics"]


def save_update(config: ActorRolloutRefConfig, objective: str, batch: DataProto, folder: Path) -> None:
    """What each rank runs."""
    student, metrics = trained(config, objective, batch)
    torch.save((tiny.first_gradient(student), metrics), folder / f"seen_{student.rank}.pt")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("packed", "tokens"), [(True, 64), (True, 24), (False, 40)])
def test_loss_and_gradient_are_those_of_the_plain_model(
    objective: str, packed: bool, tokens: int, mixtures: Models
) -> None:
    config = mixtures.config(packed=packed, actor={"ppo_max_token_len_per_gpu": tokens})
    student, metrics = trained(config, objective, rollouts(mixtures))
    loss, gradient = plain_loss(mixtures, objective)
    assert metrics[OBJECTIVES[objective]] == pytest.approx(float(loss), abs=1e-5)
    tiny.assert_same_gradient(tiny.first_gradient(student), gradient)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_ranks_give_those_of_the_plain_model_too(objective: str, mixtures: Models, tmp_path: Path) -> None:
    tiny.run_ranks(2, save_update, mixtures.config(), objective, rollouts(mixtures), tmp_path)
    loss, gradient = plain_loss(mixtures, objective)
    for rank in range(2):
        of_rank, metrics = torch.load(tmp_path / f"seen_{rank}.pt")
        assert metrics[OBJECTIVES[objective]] == pytest.approx(float(loss), abs=1e-5)
        tiny.assert_same_gradient(of_rank, gradient)


COEF = 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("ranks", "packed", "tokens"), [(1, True, 64), (1, True, 24), (1, False, 40), (2, True, 24), (2, False, 64)]
)
def test_the_router_loss_is_that_of_transformers_over_the_mini_batch(
    objective: str, ranks: int, packed: bool, tokens: int, mixtures: Models, tmp_path: Path
) -> None:
    settings = {"ppo_max_token_len_per_gpu": tokens, "router_aux_loss_coef": COEF}
    arguments = mixtures.config(packed=packed, actor=settings), objective, rollouts(mixtures), tmp_path
    if ranks == 1:
        save_update(*arguments)
    else:
        tiny.run_ranks(ranks, save_update, *arguments)
    (loss, gradient), (balance, of_balance) = plain_loss(mixtures, objective), plain_balance(mixtures)
    expected = {name: value + COEF * of_balance[name] for name, value in gradient.items()}
    for rank in range(ranks):
        of_rank, metrics = torch.load(tmp_path / f"seen_{rank}.pt")
        assert metrics["actor/router_aux_loss"] == pytest.approx(float(balance), abs=1e-5)
        assert metrics["actor/loss"] == pytest.approx(float(loss + COEF * balance), abs=1e-5)
        tiny.assert_same_gradient(of_rank, expected)


def test_a_model_that_asks_for_router_logits_is_trained_without_that_loss(mixtures: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(mixtures.student, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"output_router_logits": True, "router_aux_loss_coef": 9.0})
    )
    (asked, its_metrics), (student, metrics) = (
        trained(mixtures.config(path), "exact", rollouts(mixtures)) for path in (folder, mixtures.student)
    )
    assert its_metrics == metrics and "actor/router_aux_loss" not in metrics
    right = tiny.first_gradient(student)
    assert all(torch.equal(value, right[name]) for name, value in tiny.first_gradient(asked).items())


def save_and_resume(config: ActorRolloutRefConfig, batch: DataProto, folder: Path) -> None:
    """What each rank runs: two steps with a checkpoint between them, and the second once more from there."""
    student, _ = trained(config, "exact", batch)
    share = batch.chunk(student.world_size)[student.rank]
    tiny.save_checkpoint(student, folder)
    resumed = workers(config, student._distill)
    resumed.load_checkpoint(str(folder))
    seen = [(worker.update_actor(share).meta_info["metrics"], tiny.state_of(worker)) for worker in (student, resumed)]
    torch.save(seen, folder / f"seen_{student.rank}.pt")


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_export_has_the_names_of_the_model_and_a_resumed_run_goes_on_to_the_bit(
    ranks: int, mixtures: Models, tmp_path: Path
) -> None:
    arguments = mixtures.config(actor={"router_aux_loss_coef": COEF}), rollouts(mixtures), tmp_path
    if ranks == 1:
        save_and_resume(*arguments)
    else:
        tiny.run_ranks(ranks, save_and_resume, *arguments)
    for rank in range(ranks):
        (metrics, state), (resumed_metrics, resumed) = torch.load(tmp_path / f"seen_{rank}.pt")
        assert metrics == resumed_metrics and state.keys() == resumed.keys()
        assert all(torch.equal(value, resumed[name]) for name, value in state.items())
    given, exported = (load_file(folder / "model.safetensors") for folder in (mixtures.student, tmp_path / HUGGINGFACE))
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in given
    assert {name: value.shape for name, value in exported.items()} == {
        name: value.shape for name, value in given.items()
    }


@pytest.mark.slow
def test_log_probs_of_vllm_are_those_of_the_trainer_over_updates(
    tiny_tokenizers: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Five updates, each on the engine's answers, and a sync in several buckets after each."""
    folder = tiny.write_model(tmp_path, tiny_tokenizers[1], family="qwen3_moe", tied=False, head_dim=32)
    sizes = {"prompt_length": tiny.PROMPT, "response_length": tiny.RESPONSE, "max_num_seqs": 16}
    rollout = RolloutConfig(name="vllm", dtype="float32", cpu_kvcache_space_gb=0.1, **sizes)
    engine = ReplicaProcess(rollout, HFModelConfig(path=str(folder)))
    request.addfinalizer(engine.close)
    student = workers(tiny.worker_config(folder, rollout={"weight_sync_bucket_mb": 1}))
    prompts = [prompt for prompt, _ in tiny.draw_rows(8, 300)]

    def answers(version: int) -> DataProto:
        outputs = engine.run(generate, prompts, {**PLAIN, "max_tokens": tiny.RESPONSE, "seed": 100 * version})
        assert {output.weight_version for output in outputs} == {version}
        batch = tiny.rollouts([(prompt, output.token_ids) for prompt, output in zip(prompts, outputs, strict=True)])
        batch.batch["rollout_log_probs"] = torch.zeros(len(prompts), tiny.RESPONSE)
        for row, output in enumerate(outputs):
            batch.tensor("rollout_log_probs")[row, : len(output.token_ids)] = torch.tensor(output.log_probs)
        return batch

    def gap(batch: DataProto) -> float:
        scores = student.compute_log_prob(batch).tensor("old_log_probs")
        return float((scores - batch.tensor("rollout_log_probs")).abs().max())

    batch = answers(0)
    assert gap(batch) < 1e-4
    for version in range(1, 6):
        student.update_actor(tiny.with_loss_inputs(batch, seed=version))
        assert gap(batch) > 1e-2
        buckets = [student.export_weight_bucket(index) for index in range(len(student.weight_buckets()))]
        assert len(buckets) == 2, "more of them are not kept at a time"
        engine.run(sync, buckets, version)
        student.release_weight_buckets()
        batch = answers(version)
        assert gap(batch) < 1e-4
