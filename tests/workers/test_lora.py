"""A student with an adapter: the adapter alone is trained, and without it the model is the student before the run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import TEMPERATURE, Models, workers, workers_apart

from verl import model_merger
from verl.config import ActorRolloutRefConfig, CheckpointConfig, DistillConfig, OptimizerConfig, TeacherConfig
from verl.protocol import DataProto
from verl.workers.fsdp.adapter import trained_weights
from verl.workers.fsdp.checkpoint import ADAPTER_FOLDER, HUGGINGFACE, SHARDS
from verl.workers.model_workers import StudentWorker, TeacherWorker

pytestmark = pytest.mark.usefixtures("one_rank")

LORA = {"lora_rank": 4, "lora_alpha": 8}
SELF = DistillConfig("exact", teachers={"self": TeacherConfig(sources=["rec_*"], weight=0.6)})


def config(models: Models, folder: Path | None = None, lora: dict[str, Any] = LORA, **sections: Any) -> Any:
    return models.config(folder, model={**LORA, **lora}, **sections)


def adapter_of(worker: StudentWorker) -> dict[str, torch.Tensor]:
    return {name: tiny.whole(weight.detach()) for name, weight in trained_weights(worker.module).items()}


def log_probs(worker: StudentWorker, batch: DataProto) -> torch.Tensor:
    return worker.compute_log_prob(batch).tensor("old_log_probs")


def test_a_fresh_adapter_changes_nothing_and_training_changes_the_adapter_alone(models: Models, tmp_path: Path) -> None:
    batch, plain = models.batch(2), workers(models.config())
    student = workers(config(models), SELF)
    assert torch.equal(log_probs(student, batch), log_probs(plain, batch))
    assert {name: value.shape for name, value in tiny.exported(student).items()} == {
        name: value.shape for name, value in tiny.exported(plain).items()
    }
    fresh, base = adapter_of(student), tiny.weights_of(student)
    assert len(fresh) == 2 * 2 * 7 and all(name.startswith("base_model.model.model.layers.") for name in fresh)
    metrics = student.update_actor(batch).meta_info["metrics"]
    assert metrics["actor/extended_row_drift"] == metrics["actor/shared_row_drift"] == 0
    student.update_actor(batch)
    assert all(not torch.equal(value, fresh[name]) for name, value in adapter_of(student).items())
    assert all(torch.equal(value, base[name]) for name, value in tiny.weights_of(student).items())

    tiny.save_checkpoint(student, tmp_path)
    exported, saved = tiny.exported(student), dict(tiny.load_plain(tmp_path / HUGGINGFACE).named_parameters())
    assert exported.keys() == saved.keys() == base.keys()
    assert all(torch.equal(value, saved[name]) for name, value in exported.items())
    changed = {name.split(".")[-2] for name, value in exported.items() if not torch.equal(value, base[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    merged = workers(models.config(tmp_path / HUGGINGFACE))
    trained = log_probs(student, batch)
    assert (trained - log_probs(plain, batch)).abs().max() > 1e-2
    torch.testing.assert_close(log_probs(merged, batch), trained, rtol=0, atol=1e-5)


def test_peft_and_the_merger_make_the_same_model_of_the_adapter(models: Models, tmp_path: Path) -> None:
    from peft import PeftModel

    parts = CheckpointConfig(save_contents=["model"], load_contents=["model"])
    student, batch = workers(config(models, models.untied, actor={"checkpoint": parts}), SELF), models.batch(2)
    for _ in range(2):
        student.update_actor(batch)
    tiny.save_checkpoint(student, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [ADAPTER_FOLDER, HUGGINGFACE, SHARDS]
    size = sum(path.stat().st_size for path in (tmp_path / SHARDS).iterdir())
    assert size < 4.2 * sum(value.numel() for value in adapter_of(student).values()) + 20_000, "no base weights"
    right = log_probs(student, batch)
    peft = PeftModel.from_pretrained(tiny.load_plain(models.untied), tmp_path / ADAPTER_FOLDER)
    assert model_merger.main(["--local_dir", str(tmp_path), "--target_dir", str(tmp_path / "merged")]) == 0
    for model in (peft, tiny.load_plain(tmp_path / "merged")):
        with torch.no_grad():
            scores = tiny.of_tokens(tiny.plain_log_probs(model, batch, models.ids, TEMPERATURE), batch)
        torch.testing.assert_close(scores, right, rtol=0, atol=1e-5)
    shutil.rmtree(tmp_path / "merged")
    changed = json.loads((tmp_path / ADAPTER_FOLDER / "adapter_config.json").read_text())
    changed["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / ADAPTER_FOLDER / "adapter_config.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"gone, whose .* here lack model\.layers\.0\.mlp\.down_proj\."):
        model_merger.merge(tmp_path, tmp_path / "merged")


def own_teacher(worker: StudentWorker) -> TeacherWorker:
    teacher: Any = worker.colocated_roles["self"]
    return teacher


@pytest.mark.parametrize("packed", [True, False])
def test_the_self_teacher_is_the_student_without_its_adapter(models: Models, packed: bool) -> None:
    """Also where it is stitched to the base teacher; against a copy of its folder, which is loaded apart."""
    batch, other = models.batch(3), models.student.parent / "copy"
    other.is_symlink() or other.symlink_to(models.student)
    limits = {"ppo_max_token_len_per_gpu": 24}
    one, two = (
        workers(models.config(packed=packed, model=LORA, actor=limits), DistillConfig("exact", teachers=teachers))
        for path in (None, str(other))
        for teachers in [{"self": TeacherConfig(path), "mixed": TeacherConfig(path, "stitched", weight=0.6)}]
    )
    assert own_teacher(one).model.module is one.module and own_teacher(two).model.module is not two.module
    for _ in range(3):
        found, right = one.update_actor(batch), two.update_actor(batch)
        own, alone = (own_teacher(worker).compute_ref_log_prob(batch).tensor("ref_log_prob") for worker in (one, two))
        assert torch.equal(own, alone) and own.any()
        metrics = found.meta_info["metrics"]
        assert metrics == right.meta_info["metrics"] and metrics["actor/updates"] == 1
        assert all(torch.equal(value, right.batch[key]) for key, value in found.batch.items())
    assert not torch.equal(log_probs(one, batch), own)
    assert all(torch.equal(value, adapter_of(two)[name]) for name, value in adapter_of(one).items())


def test_teachers_on_other_ranks_are_loaded_there(models: Models) -> None:
    batch = models.batch(2)
    student, teachers = workers_apart(config(models), SELF)
    assert teachers["self"].model.module is not student.module
    beside = workers(config(models), SELF)
    own, apart = (t.compute_ref_log_prob(batch).tensor("ref_log_prob") for t in (own_teacher(beside), teachers["self"]))
    assert torch.equal(own, apart)


def resumed_step(settings: ActorRolloutRefConfig, share: DataProto, checkpoint: Path) -> tuple[Any, Any]:
    """The next step of a run that goes on from a checkpoint: its metrics, and the adapter after it."""
    worker = workers(settings, SELF)
    worker.load_checkpoint(str(checkpoint))
    return worker.update_actor(share).meta_info["metrics"], adapter_of(worker)


def run(settings: ActorRolloutRefConfig, batch: DataProto, folder: Path) -> dict[str, Any]:
    """On each rank: two steps, a checkpoint between them, and one step that goes on from it."""
    worker = workers(settings, SELF)
    share = batch.chunk(worker.world_size)[worker.rank]
    seen: dict[str, Any] = {"base": tiny.exported(worker)}
    seen["metrics"] = worker.update_actor(share).meta_info["metrics"]
    moments = {name: worker._state.optimizer.state[weight] for name, weight in trained_weights(worker.module).items()}
    seen["gradient"] = {name: tiny.whole(state["exp_avg"]) / (1 - tiny.ADAM_BETA1) for name, state in moments.items()}
    seen["adapter"], seen["weights"] = adapter_of(worker), tiny.exported(worker)
    tiny.save_checkpoint(worker, folder)
    seen["scores"] = log_probs(worker, share)
    seen["next"] = worker.update_actor(share).meta_info["metrics"], adapter_of(worker)
    seen["resumed"] = resumed_step(settings, share, folder)
    torch.save(seen, folder / f"seen_{worker.rank}.pt")
    return seen


def test_a_resumed_run_takes_the_same_step_and_two_ranks_do_what_one_does(models: Models, tmp_path: Path) -> None:
    settings, batch = config(models, lora={"lora_rank": 5}), models.batch(2)  # 5 rows of A do not divide over two ranks
    one = run(settings, batch, tmp_path / "alone")
    tiny.run_ranks(2, run, settings, batch, tmp_path / "two")
    two = [torch.load(tmp_path / f"two/seen_{rank}.pt", weights_only=False) for rank in range(2)]
    for seen in (one, *two):
        torch.testing.assert_close(seen["resumed"], seen["next"], rtol=0, atol=0)
        assert seen["metrics"] == pytest.approx(one["metrics"], rel=1e-6, abs=1e-6)
        tiny.assert_same_gradient(seen["gradient"], one["gradient"], atol=1e-6)
    torch.testing.assert_close(torch.cat([seen["scores"] for seen in two]), one["scores"], rtol=0, atol=1e-4)
    metrics = resumed_step(settings, batch, tmp_path / "two")[0]  # two ranks, then one
    assert metrics == pytest.approx(two[0]["next"][0], rel=1e-4, abs=1e-5)
    for seen in (one, two[0]):  # the rank that writes buckets
        for name in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
            first, second = (seen["adapter"][f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            right = seen["base"][f"{name}.weight"] + LORA["lora_alpha"] / 5 * second @ first
            torch.testing.assert_close(seen["weights"][f"{name}.weight"], right, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_extended_ids_are_trained_beside_the_adapter_where_that_is_set(
    tied: bool, models: Models, tmp_path: Path
) -> None:
    from peft import PeftModel

    folder, batch, start = models.student if tied else models.untied, models.batch(2), models.extend_start
    decays = OptimizerConfig(lr=1e-3, weight_decay=0.5)
    settings = config(models, folder, lora={"lora_extended_rows": True}, actor={"optim": decays})
    student, plain = workers(settings, SELF), workers(config(models, folder, actor={"optim": decays}), SELF)
    assert own_teacher(student).model.module is not student.module, "without the adapter, its rows are others"
    for worker in (student, plain):
        worker.update_actor(batch)
    alone, beside = (worker.update_actor(batch).meta_info["metrics"] for worker in (plain, student))
    assert alone["actor/extended_row_drift"] == alone["actor/shared_row_drift"] == beside["actor/shared_row_drift"] == 0
    assert beside["actor/extended_row_drift"] > 1e-3 and beside["actor/grad_norm"] > alone["actor/grad_norm"]
    tiny.save_checkpoint(student, tmp_path)
    before, after, right = tiny.weights_of(plain), tiny.exported(student), log_probs(student, batch)
    names = ["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"]
    for name in names:
        assert torch.equal(after[name][:start], before[name][:start])
        assert not (after[name][start : models.ids] == before[name][start : models.ids]).all()
    adapted = PeftModel.from_pretrained(tiny.load_plain(folder), tmp_path / ADAPTER_FOLDER)
    model_merger.merge(tmp_path, tmp_path / "merged")
    for model in (adapted, *map(tiny.load_plain, (tmp_path / HUGGINGFACE, tmp_path / "merged"))):
        with torch.no_grad():
            scores = tiny.of_tokens(tiny.plain_log_probs(model, batch, models.ids, TEMPERATURE), batch)
        torch.testing.assert_close(scores, right, rtol=0, atol=1e-5)
    metrics, weights = resumed_step(settings, batch, tmp_path)
    assert metrics == student.update_actor(batch).meta_info["metrics"]
    torch.testing.assert_close(weights, adapter_of(student), rtol=0, atol=0)


def test_half_precision_is_that_of_the_base_alone(models: Models) -> None:
    half = {"mixed_precision": {"param_dtype": "bf16"}}
    student = workers(models.config(actor={"fsdp_config": half}, model=LORA), SELF)
    assert {weight.dtype for weight in tiny.weights_of(student).values()} == {torch.bfloat16}
    assert {weight.dtype for weight in adapter_of(student).values()} == {torch.float32}
    fresh = adapter_of(student)
    assert student.update_actor(models.batch(2)).meta_info["metrics"]["actor/updates"] == 1
    assert not all(torch.equal(value, fresh[name]) for name, value in adapter_of(student).items())
    assert {weight.dtype for weight in tiny.exported(student).values()} == {torch.bfloat16}


def test_chosen_layers_alone_are_adapted(models: Models) -> None:
    student = workers(config(models, lora={"target_modules": ["q_proj", "mlp.up_proj"]}))
    assert {name.split(".")[-3] for name in adapter_of(student)} == {"q_proj", "up_proj"}


def test_experts_stay_as_they_are(tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> None:
    model = tiny.write_model(tmp_path, tiny_tokenizers[1], family="qwen3_moe")
    student = workers(tiny.worker_config(model, model=LORA))
    assert {name.split(".")[-3] for name in adapter_of(student)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["q_proj", "w_proj"], r"the model has no \['w_proj'\]"),
        (["lm_head"], r"adapts lm_head.weight; name linear layers"),
        (["embed_tokens"], r"adapts model.embed_tokens.weight; name linear layers"),
    ],
)
def test_layers_that_cannot_be_adapted_are_refused(models: Models, targets: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=rf"target_modules=\[.*\].*{words}"):
        workers(config(models, models.untied, lora={"target_modules": targets}))


def save_exported(settings: ActorRolloutRefConfig, folder: Path) -> None:
    student = workers(settings)
    torch.save(tiny.exported(student), folder / f"rank_{student.rank}.pt")


def test_rows_beside_an_adapter_in_half_precision_reach_every_rank(models: Models, tmp_path: Path) -> None:
    """They are fp32, and what rank 0 has read is not."""
    half = {"fsdp_config": {"mixed_precision": {"param_dtype": "bf16"}}}
    tiny.run_ranks(2, save_exported, config(models, lora={"lora_extended_rows": True}, actor=half), tmp_path)
    rows = torch.load(tmp_path / "rank_0.pt")["model.embed_tokens.weight"].float()
    torch.testing.assert_close(rows, tiny.load_plain(models.student).get_input_embeddings().weight, rtol=0, atol=1e-2)
