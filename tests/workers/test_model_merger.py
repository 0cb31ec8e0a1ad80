"""The export's command line and files. Export of several ranks' shards, and its log-probs: ``test_two_ranks``."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_workers import load_plain, worker_config
from transformers import AutoModelForCausalLM

from verl import model_merger
from verl.workers.fsdp.huggingface import WEIGHTS_INDEX, write_weights
from verl.workers.student_worker import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")


@pytest.fixture(scope="module")
def checkpoint(one_rank: None, student_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a step, with the student as it was loaded."""
    folder = tmp_path_factory.mktemp("run") / "global_step_1"
    worker = StudentWorker(config=worker_config(student_model), device="cpu")
    worker.init_model()
    worker.save_checkpoint(str(folder / "actor"), 1)
    return folder


def test_a_model_goes_through_a_checkpoint_unchanged(student_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    command = ["merge", "--local_dir", str(checkpoint), "--target_dir", str(tmp_path / "model")]
    assert model_merger.main(command) == 0
    before, after = dict(load_plain(student_model).named_parameters()), load_plain(tmp_path / "model")
    assert all(torch.equal(value, before[name]) for name, value in after.named_parameters())
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert names == {path.name for path in (checkpoint / "actor" / "huggingface").iterdir()}


def test_another_precision_is_written_and_told(checkpoint: Path, tmp_path: Path) -> None:
    model_merger.merge(checkpoint / "actor", tmp_path / "model", "bf16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_large_models_take_several_files(student_model: Path, checkpoint: Path, tmp_path: Path) -> None:
    described = checkpoint / "actor" / "huggingface"
    (tmp_path / "config.json").write_text((described / "config.json").read_text())
    infos = write_weights(checkpoint / "actor" / "shards", tmp_path, max_file_bytes=100_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    weight_map = json.loads((tmp_path / WEIGHTS_INDEX).read_text())["weight_map"]
    assert weight_map.keys() == {info.name for info in infos}
    assert all(name in load_file(tmp_path / file) for name, file in weight_map.items())
    before = dict(load_plain(student_model).named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in load_plain(tmp_path).named_parameters())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--local_dir", "{empty}"], "holds no huggingface/config.json"), (["--dtype", "fp8"], "'fp8' is not one of")],
    ids=["no checkpoint", "precision"],
)
def test_user_errors_are_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    command = ["merge", "--local_dir", str(checkpoint), "--target_dir", str(tmp_path / "model")]
    assert model_merger.main([*command, *(text.format(empty=tmp_path) for text in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
