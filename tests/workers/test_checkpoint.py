"""What a checkpoint brings back, part by part, and the model that a merge makes of it.

Checkpoints of several ranks: ``test_two_ranks``.
"""

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_workers as tiny
from support.exact_cases import workers
from support.file_faults import full_disk
from transformers import AutoModelForCausalLM

from verl import model_merger
from verl.config import CheckpointConfig, OptimizerConfig
from verl.workers.fsdp import checkpoint
from verl.workers.fsdp.checkpoint import SaveOutcome, write_file, write_weights
from verl.workers.model_workers import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

SHARD, EXTRA = "shards/00001-of-00001.safetensors", "extra_rank_0.safetensors"
BATCH = tiny.with_loss_inputs(tiny.rollouts(tiny.draw_rows(8, 200)))


def student(folder: Path, contents: list[str] | None = None) -> StudentWorker:
    """A worker with a fresh model; ``contents`` is what it saves and loads."""
    actor = {"optim": OptimizerConfig(lr=1e-2, lr_scheduler_type="linear", total_training_steps=10)}
    if contents is not None:
        actor["checkpoint"] = CheckpointConfig(save_contents=contents, load_contents=contents)
    return workers(tiny.worker_config(folder, actor=actor))


def same_weights(*models: StudentWorker | Path | dict[str, torch.Tensor]) -> bool:
    """Of workers, Hugging Face folders and what `weights` gave."""
    one, other = (model if isinstance(model, dict) else weights(model) for model in models)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def weights(model: StudentWorker | Path) -> dict[str, torch.Tensor]:
    if isinstance(model, Path):
        return dict(tiny.load_plain(model).named_parameters())
    return tiny.weights_of(model)


@pytest.fixture(scope="module")
def saved(one_rank: None, student_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step, with the student as it was loaded."""
    folder = tmp_path_factory.mktemp("run") / "global_step_1"
    tiny.save_checkpoint(student(student_model), folder / "actor")
    return folder


# ------------------------------------------------------------------ saved and loaded


@pytest.mark.parametrize(
    ("contents", "entries"),
    [(["model"], ["huggingface", "shards"]), (["hf_model"], ["huggingface"]), (["extra"], [EXTRA])],
)
def test_only_the_chosen_parts_are_written_and_read(
    student_model: Path, tmp_path: Path, contents: list[str], entries: list[str]
) -> None:
    first = student(student_model, contents)
    first.update_actor(BATCH)
    tiny.save_checkpoint(first, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == entries
    files = list(tmp_path.rglob("*.*"))
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}, "no file is a pickle"
    assert len({path.stat().st_mode for path in files}) == 1, "weights are as readable as their config.json"
    assert any(tmp_path.glob("huggingface/*.safetensors")) == ("hf_model" in contents)
    if "hf_model" in contents:
        assert same_weights(tmp_path / "huggingface", first)
        assert "packed_sdpa" not in (tmp_path / "huggingface/config.json").read_text()
    second = student(student_model, contents)
    second.load_checkpoint(str(tmp_path))
    assert same_weights(second, first) == ("model" in contents)
    assert second.actor.optimizer_steps == ("extra" in contents)
    assert not any(state["exp_avg"].full_tensor().any() for state in second._state.optimizer.state.values())


def test_training_goes_on_while_a_checkpoint_is_written_and_a_resumed_run_takes_the_same_step(
    student_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = student(student_model)
    tiny.save_checkpoint(worker, tmp_path, 0)
    (tmp_path / SHARD).rename(tmp_path / "shards/00002-of-00002.safetensors")  # as if by more ranks; overwritten below
    worker.update_actor(BATCH)
    worker.compute_log_prob(BATCH)  # a pass without backward must leave no gathered parameters behind
    at_save = weights(worker)
    torch.manual_seed(7)  # or a fresh worker's seed would do as well
    released = threading.Event()
    monkeypatch.setattr(checkpoint, "write_file", lambda *file: (released.wait(30), write_file(*file)))
    worker.begin_checkpoint(str(tmp_path), 1)
    assert worker.checkpoint_outcome(wait=False) == SaveOutcome(done=False)
    drawn = torch.rand(3)
    worker.update_actor(BATCH)
    released.set()
    outcome = worker.checkpoint_outcome(wait=True)
    assert outcome.done and not outcome.error and outcome.seconds > 0
    assert worker.checkpoint_outcome(wait=False) == outcome, "until the next begins"
    assert same_weights(tmp_path / "huggingface", at_save)

    again = student(student_model)
    again.compute_log_prob(BATCH)
    again.load_checkpoint(str(tmp_path))
    assert same_weights(again, at_save)
    assert torch.equal(torch.rand(3), drawn)
    assert again.update_actor(BATCH).meta_info["metrics"]["actor/lr"] == pytest.approx(0.9e-2)
    assert [group["lr"] for group in again._state.optimizer.param_groups] == pytest.approx([0.9e-2, 0.9e-2])
    assert same_weights(again, worker)


@pytest.mark.parametrize("limit", [200, 60_000], ids=["extra", "shards"])
def test_a_full_disk_costs_only_the_checkpoint(student_model: Path, tmp_path: Path, limit: int) -> None:
    worker = student(student_model)
    with full_disk(limit), pytest.raises(OSError, match="File too large"):
        tiny.save_checkpoint(worker, tmp_path / "full")
    tiny.save_checkpoint(worker, tmp_path / "whole")
    worker.load_checkpoint(str(tmp_path / "whole"))
    assert same_weights(worker, student_model)


def test_an_export_says_to_transformers_4_where_positions_are_and_keeps_what_cannot_be_validated(
    student_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(student_model, tmp_path / "student")
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
    for name, entries in (
        ("config.json", {"rope_parameters": {**yarn, "rope_theta": 5e5}}),
        ("generation_config.json", {"do_sample": False, "temperature": 0.6, "eos_token_id": [322, 320]}),
    ):
        values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(values | entries))
    tiny.save_checkpoint(student(folder, ["hf_model"]), tmp_path)
    config, generation = (
        json.loads((tmp_path / "huggingface" / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, yarn)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "huggingface")
    assert again.config.rope_parameters == {**yarn, "rope_theta": 5e5}
    assert (generation["temperature"], generation["eos_token_id"]) == (0.6, [322, 320])


# ------------------------------------------------------------------ refused


def test_a_missing_part_is_an_error(student_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no whole set of shards"):
        student(student_model, ["model"]).load_checkpoint(str(tmp_path))
    with pytest.raises(ValueError, match="leave 'extra' out"):
        student(student_model, ["extra"]).load_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("tied", "rows", "words"), [(False, 0, r"Missing key .*lm_head\.weight"), (True, 700, "[Ss]ize mismatch .*")]
)
def test_a_checkpoint_of_another_model_is_refused_with_what_differs(
    saved: Path, tiny_tokenizers: tuple[Path, Path], tmp_path: Path, tied: bool, rows: int, words: str
) -> None:
    other = student(tiny.write_model(tmp_path, tiny_tokenizers[1], tied=tied, rows=rows))
    with pytest.raises(ValueError, match=f"cannot be loaded .*{words}.*; take a whole one of this model"):
        other.load_checkpoint(str(saved / "actor"))


@pytest.mark.parametrize("damage", ["zeros", "truncated", "missing"])
def test_a_damaged_shard_is_not_loaded(saved: Path, student_model: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(saved / "actor", tmp_path / "actor")
    path = tmp_path / "actor" / SHARD
    content = path.read_bytes()
    if damage == "missing":
        path.rename(path.with_name("00002-of-00002.safetensors"))
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else b"\0" * len(content))
    message = rf"{path.parent} (cannot be read|holds no whole set of shards) \(.*\); take"
    with pytest.raises(ValueError, match=message):
        student(student_model).load_checkpoint(str(tmp_path / "actor"))
    with pytest.raises(ValueError, match=message):
        model_merger.merge(tmp_path, tmp_path / "merged")


# ------------------------------------------------------------------ merged


def test_a_merge_writes_all_files_of_a_model_in_the_chosen_precision(saved: Path, tmp_path: Path) -> None:
    command = ["merge", "--local_dir", str(saved), "--target_dir", str(tmp_path), "--dtype", "bf16"]
    assert model_merger.main(command) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names == {path.name for path in (saved / "actor" / "huggingface").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_large_models_take_several_files(student_model: Path, saved: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", 100_000)
    (tmp_path / "config.json").write_text((saved / "actor/huggingface/config.json").read_text())
    write_weights(saved / "actor/shards", tmp_path, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert same_weights(tmp_path, student_model)


@pytest.mark.parametrize("option", ["--local_dir", "--dtype"])
def test_user_errors_of_a_merge_are_one_line(saved: Path, tmp_path: Path, capsys: Any, option: str) -> None:
    command = ["merge", "--local_dir", str(saved), "--target_dir", str(tmp_path), option, "unknown"]
    assert model_merger.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "unknown" in error and error.count("\n") == 1


def test_shards_of_verl_are_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "model_world_size_1_rank_0.pt").touch()
    with pytest.raises(ValueError, match="holds shards of verl, which only the merger of that verl reads"):
        model_merger.merge(tmp_path, tmp_path / "out")
