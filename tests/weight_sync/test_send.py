"""Buckets of whole weights for the engines."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.tiny_workers import load_plain, worker_config, write_model

from verl.weight_sync import send as weight_export
from verl.weight_sync.send import Placement, WeightExporter
from verl.workers.student_worker import StudentWorker

pytestmark = pytest.mark.usefixtures("one_rank")

CPU = torch.device("cpu")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request: pytest.FixtureRequest, tiny_tokenizers: tuple[Path, Path], tmp_path: Path) -> Path:
    """A model of either kind."""
    return write_model(tmp_path, tiny_tokenizers[1], tied=request.param)


def build(folder: Path) -> StudentWorker:
    worker = StudentWorker(config=worker_config(folder), device="cpu")
    worker.init_model()
    return worker


def names_on_disk(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_buckets_hold_every_tensor_once_and_no_more_than_fits(folder: Path) -> None:
    limit = 50_000
    module = build(folder)._state.module
    exporter = WeightExporter(module, Placement(CPU, True), torch.float32, limit)
    assert exporter.num_buckets > 3
    found: dict[str, torch.Tensor] = {}
    for index in range(exporter.num_buckets):
        info = exporter.export(index)
        tensors = load_file(info["path"])
        assert sorted(info["names"]) == sorted(tensors)
        assert not tensors.keys() & found.keys()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
        found |= tensors
        exporter.release(index)
        assert not Path(info["path"]).parent.exists()
    assert found.keys() == names_on_disk(folder)
    plain = dict(load_plain(folder).named_parameters())
    assert all(torch.equal(value, plain[name]) for name, value in found.items())
    shapes = [(name, "float32", tuple(found[name].shape)) for name, _, _ in exporter.metadata()]
    assert exporter.metadata() == shapes and len(shapes) == len(found)


def test_engines_get_their_precision(folder: Path) -> None:
    module = build(folder)._state.module
    exporter = WeightExporter(module, Placement(CPU, True), torch.bfloat16, 2**30)
    info = exporter.export(0)
    tensors = load_file(info["path"])
    exporter.release(0)
    plain = dict(load_plain(folder).named_parameters())
    assert all(torch.equal(value, plain[name].bfloat16()) for name, value in tensors.items())
    assert {dtype for _, dtype, _ in exporter.metadata()} == {"bfloat16"}


def test_releasing_what_is_not_lent_does_nothing(folder: Path) -> None:
    build(folder).release_weight_bucket(0)


def test_a_full_shared_memory_is_gone_around(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_export, "SHARED_MEMORY", tmp_path / "nowhere")
    worker = build(folder)
    info = worker.export_weight_bucket(0)
    assert Path(info["path"]).is_file()
    assert "no room" in caplog.text
    worker.release_weight_bucket(0)
    assert not Path(info["path"]).exists()
