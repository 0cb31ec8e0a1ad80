"""Buckets of whole weights, and which export of a bucket each engine reads; the order of a sync: ``test_manager``."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.exact_cases import workers
from support.tiny_workers import load_plain, worker_config, write_model

from verl import weight_sync
from verl.single_controller.base.decorator import Begun
from verl.single_controller.base.worker import Channel
from verl.weight_sync import (
    ReceivedWeights,
    WeightExporter,
    as_file,
    broadcast_weights,
    bucket_for,
    bucket_tensors,
    send_weights,
    weight_shapes,
)
from verl.workers.model_workers import StudentWorker


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(
    request: pytest.FixtureRequest, tiny_tokenizers: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model of either kind."""
    return write_model(tmp_path_factory.mktemp("model"), tiny_tokenizers[1], tied=request.param)


@pytest.fixture(scope="module")
def student(folder: Path, one_rank: None) -> StudentWorker:
    return workers(worker_config(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_hold_every_tensor_once_and_no_more_than_fits(
    student: StudentWorker, folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, device, limit = student._state.module, torch.device("cpu"), 50_000
    exporter = WeightExporter(module, device=device, writes_files=True, dtype=dtype, bucket_bytes=limit)
    assert exporter.num_buckets > 3
    found: dict[str, torch.Tensor] = {}
    folders: list[Path] = []
    given_back: list[str] = []
    monkeypatch.setattr(weight_sync, "release_cached_memory", given_back.append)
    for index in range(exporter.num_buckets):
        info = exporter.export(index)
        tensors = load_file(info["path"])
        assert dict(zip(info["names"], info["shapes"], strict=True)) == {k: list(v.shape) for k, v in tensors.items()}
        assert not tensors.keys() & found.keys()
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= limit
        found |= tensors
        folders.append(Path(info["path"]).parent)
        assert [folder for folder in folders if folder.exists()] == folders[-2:], "engines read the one, and then this"
    assert not given_back, "the next bucket takes that memory"
    exporter.release()
    assert given_back == ["cpu"]
    exporter.release()  # once more does nothing
    assert not any(folder.exists() for folder in folders)
    assert found.keys() == load_file(folder / "model.safetensors").keys()
    plain = dict(load_plain(folder).named_parameters())
    for name, value in found.items():
        assert torch.equal(value, plain[name].to(dtype)), name


def test_engines_apart_read_what_one_rank_has_stored(student: StudentWorker, tmp_path: Path) -> None:
    """A bucket of theirs, as a file, is that of the engines beside, to the byte."""
    exporter, stored = student._exporter, list[Any]()
    beside = exporter.export(0)
    content = Path(beside.pop("path")).read_bytes()
    exporter.release()
    assert exporter.store(0, None) is None, "other ranks take part in gathering alone"
    apart = exporter.store(0, lambda value: stored.append(value) or "handle")
    assert apart == beside | {"stored": "handle"}
    with as_file(apart, stored[0]) as bucket:
        assert Path(bucket["path"]).read_bytes() == content
    assert not Path(bucket["path"]).exists()
    exporter.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_in_a_channel_receive_what_was_described_to_them(
    student: StudentWorker, folder: Path, dtype: torch.dtype
) -> None:
    """Two of them, in threads, over gloo: every tensor of the model once, by name, in shape and precision."""
    module, device = student._state.module, torch.device("cpu")
    exporter = WeightExporter(module, device=device, writes_files=False, dtype=dtype, bucket_bytes=50_000)
    rendezvous, buckets, plain = student.open_channel(3, 60.0), exporter.describe(), load_plain(folder)

    def receive(rank: int) -> dict[str, torch.Tensor]:
        channel, received = Channel(rendezvous, rank, device), ReceivedWeights(weight_shapes(plain))
        assert all(received.add(bucket) for bucket in buckets) and not received.problems()
        return {name: tensor for bucket in buckets for name, tensor in bucket_tensors(bucket, device, channel)}

    with ThreadPoolExecutor(2) as engines:
        found = [engines.submit(receive, rank) for rank in (1, 2)]
        student.join_channel("cpu")
        assert student.channel is not None
        for index in range(len(buckets)):
            exporter.store(index, student.channel)
    for weights in (each.result() for each in found):
        assert weights.keys() == dict(plain.named_parameters()).keys()
        for name, value in plain.named_parameters():
            assert weights[name].dtype == dtype and torch.equal(weights[name], value.to(dtype)), name
    student.channel = None


def test_where_shared_memory_is_full_a_file_on_disk_is_used(
    student: StudentWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weight_sync, "SHARED_MEMORY", tmp_path / "nowhere")
    info = student.export_weight_bucket(0)
    assert Path(info["path"]).is_file()
    assert "nowhere is too full for" in caplog.text
    student.release_weight_buckets()
    assert not Path(info["path"]).exists()


def test_a_failed_export_names_its_bucket(student: StudentWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_sync, "save_file", lambda *arguments: Path("/no/such/file").stat())
    with pytest.raises(RuntimeError, match="weight bucket 0: FileNotFoundError: "):
        student.export_weight_bucket(0)
    student.release_weight_buckets()


@pytest.mark.parametrize("fails", [None, "begin a weight sync", "load weight bucket 0 of version 7"])
def test_the_next_bucket_is_exported_while_engines_load_and_all_are_released(fails: str | None) -> None:
    events: list[str] = []

    def call(*event: Any) -> Callable[[], list[dict[str, Any]]]:
        events.append(" ".join(map(str, event)))
        return Begun(lambda given: [{"path": given.path}], SimpleNamespace(path=event[-1], check=print))  # of an export

    def wait(task: str, calls: list[Any], check: Callable[[], None] = print) -> None:
        call("wait:", task)
        if task == fails:
            raise ConnectionError

    student = SimpleNamespace(weight_buckets=lambda: [{}] * 3, export_weight_bucket=partial(call, "export"), begin=call)
    names = ("start_weight_update", "update_weights", "finish_weight_update")
    engine = SimpleNamespace(**{name: SimpleNamespace(remote=partial(call, name)) for name in names})
    with pytest.raises(ConnectionError) if fails else nullcontext():
        send_weights(student, [engine], [(0,)], wait, 7)
    expected = ["start_weight_update", "export 0", "wait: begin a weight sync"]
    for index in range(3):
        expected += [f"update_weights {{'path': {index}}} None"] + [f"export {index + 1}"] * (index < 2)
        expected += [f"wait: load weight bucket {index} of version 7"]
    end = [] if fails else ["finish_weight_update 7", "wait: finish the weight sync of version 7"]
    done = expected[: expected.index(f"wait: {fails}") + 1] if fails else expected
    assert events == [*done, "release_weight_buckets", *end]


def raise_where(fails: bool) -> None:
    if fails:
        raise ConnectionError


@pytest.mark.parametrize("fails", [None, "load weight bucket 1 of version 7", "store 1"])
def test_a_bucket_is_broadcast_while_engines_load_it(fails: str | None) -> None:
    """Where an engine fails, the ranks wait for it, and nobody for them; where a rank does, engines wait."""
    events: list[str] = []

    def call(*event: Any) -> Begun:
        events.append(" ".join(map(str, event)))
        check = partial(raise_where, fails == events[-1])
        return Begun(lambda _: events.append(f"{event[-1]} sent"), SimpleNamespace(check=check))

    def wait(task: str, calls: list[Any], check: Callable[[], None] = lambda: None) -> None:
        call("wait:", task)
        check()
        raise_where(task == fails)

    student = SimpleNamespace(weight_buckets=lambda: ["first", "second"], store_weight_bucket=partial(call, "store"))
    names = ("start_weight_update", "update_weights", "finish_weight_update")
    engine = SimpleNamespace(**{name: SimpleNamespace(remote=partial(call, name)) for name in names})
    with pytest.raises(ConnectionError) if fails else nullcontext():
        broadcast_weights(student, [engine, engine], wait, 7)
    expected = [*["start_weight_update"] * 2, "wait: begin a weight sync", "store 0", "store 1"]
    for index, bucket in enumerate(["first", "second"]):
        expected += [f"update_weights {bucket}"] * 2 + [f"wait: load weight bucket {index} of version 7"]
        expected += [f"{index} sent"]
    end = [*["finish_weight_update 7"] * 2, "wait: finish the weight sync of version 7"]
    assert events == (expected[:-1] if fails else [*expected, *end])


def test_on_cpu_an_engine_reads_the_export_of_its_own_node() -> None:
    exports = [{"path": "a"}, None, None, {"path": "b"}]
    assert [bucket_for(ranks, exports)["path"] for ranks in ((0, 1), (2, 3))] == ["a", "b"]


@pytest.mark.parametrize("ranks", [(2,), (2, 3)])
def test_on_cuda_an_engine_gets_the_handles_of_its_own_gpus_alone(ranks: tuple[int, ...]) -> None:
    made = [[{f"gpu{rank}": f"{name} of {rank}"} for name in "ab"] for rank in range(4)]
    exports = [{"names": ["a", "b"], "ipc_handles": handles} for handles in made]
    handles = [{f"gpu{rank}": f"{name} of {rank}" for rank in ranks} for name in "ab"]
    assert bucket_for(ranks, exports) == {"names": ["a", "b"], "ipc_handles": handles}
