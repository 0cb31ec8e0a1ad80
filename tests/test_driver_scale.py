"""The driver's cost does not grow with the cluster: rows are views and bytes are those of the batch."""

import importlib
import pickle
from types import ModuleType

import pytest
import torch
from support.tiny_pairs import REPO

from verl.single_controller.base.decorator import plan_calls, registered_methods
from verl.workers.model_workers import StudentWorker

HEADER_BYTES = 2048
"""Most bytes that a call takes besides its rows: names, dtypes, shapes, meta_info."""


@pytest.fixture(scope="module")
def driver_scale() -> ModuleType:
    """The benchmark as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPO / "benchmarks")
        return importlib.import_module("driver_scale")


def test_what_goes_to_a_rank_is_a_view_of_the_batch_and_packing_it_copies_nothing(driver_scale: ModuleType) -> None:
    batch = driver_scale.Sizes(64, 8, 16).rollout(64)
    registration = registered_methods(StudentWorker)["compute_log_prob"]
    calls, _ = plan_calls("compute_log_prob", registration, 32, (batch,), {})
    for rank, call in enumerate(calls):
        share = call.args[0]
        assert set(share.batch.keys()) == {"responses", "input_ids", "attention_mask"}
        assert not share.non_tensor_batch
        addresses = {tensor.data_ptr() for tensor in share.batch.values()}
        assert addresses == {batch.batch[key][2 * rank].data_ptr() for key in share.batch.keys()}  # noqa: SIM118
        buffers: list[pickle.PickleBuffer] = []
        assert len(pickle.dumps(share, protocol=5, buffer_callback=buffers.append)) < HEADER_BYTES
        assert {torch.frombuffer(buffer.raw(), dtype=torch.uint8).data_ptr() for buffer in buffers} == addresses


def test_bytes_of_a_step_are_those_of_its_rows_for_any_number_of_workers(driver_scale: ModuleType) -> None:
    runs = [driver_scale.run_step(workers, driver_scale.Sizes(512, 8, 24)) for workers in (2, 32, 512)]
    # int64 columns: responses, input ids and attention mask; the update takes the response mask and 3 of float32 too.
    scored = 8 * (24 + 2 * 32)
    trained = scored + (8 + 3 * 4) * 24
    row_bytes = {"compute_log_prob": scored, "compute_ref_log_prob": scored, "update_actor": trained}
    for run in runs:
        for name, of_a_row in row_bytes.items():
            assert 0 <= run["calls"][name]["bytes_out"] - 512 * of_a_row < HEADER_BYTES * run["workers"]
    more = runs[-1]["bytes_per_step"] - runs[0]["bytes_per_step"]
    assert more / (4 * (512 - 2)) < HEADER_BYTES
