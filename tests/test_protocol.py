"""DataProto: building, selecting, joining, splitting and pickling rows, on hand-made batches."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from verl.protocol import DataProto, pad_dataproto_to_divisor, unpad_dataproto


def make_batch(rows: int = 4) -> DataProto:
    """Row i: ``obs`` [2i, 2i + 1], ``name`` "row i", ``turns`` a list of i entries."""
    return DataProto.from_dict(
        tensors={"obs": torch.arange(2 * rows).view(rows, 2)},
        non_tensors={"name": [f"row {row}" for row in range(rows)], "turns": [[0] * row for row in range(rows)]},
        meta_info={"temperature": 0.5},
    )


def first_column(data: DataProto) -> list[int]:
    return data.batch["obs"][:, 0].tolist()


def test_columns_of_different_lengths_or_types_are_refused():
    with pytest.raises(ValueError, match=r"'uid' has 3 rows, but 'obs' has 2"):
        DataProto.from_dict({"obs": torch.zeros(2, 1)}, {"uid": ["a", "b", "c"]})
    wrong: Any = {"x": [1, 2]}
    for build in (DataProto.from_dict, DataProto.from_single_dict, lambda x: DataProto(non_tensor_batch=x)):
        with pytest.raises(ValueError, match="'x'"):
            build(wrong)


def test_an_int_gives_one_row():
    item = make_batch()[-1]
    assert item.batch["obs"].tolist() == [6, 7]
    assert item.non_tensor_batch == {"name": "row 3", "turns": [0, 0, 0]}


@pytest.mark.parametrize(
    "index",
    [slice(1, 4, 2), [1, 3], np.array([1, 3]), [False, True, False, True], torch.tensor([False, True, False, True])],
    ids=["slice", "list", "numpy", "bools", "torch bools"],
)
def test_every_index_selects_the_same_rows_of_all_parts(index):
    selected = make_batch()[index]
    assert first_column(selected) == [2, 6]
    assert selected.non_tensor_batch["name"].tolist() == ["row 1", "row 3"]
    assert selected.meta_info == {"temperature": 0.5}


def test_no_rows_and_rows_that_do_not_exist():
    assert len(make_batch()[[]]) == 0
    for index in ([True, False], [4]):
        with pytest.raises(IndexError):
            make_batch()[index]


def test_slices_and_selections_share_memory_but_not_meta_info():
    data = make_batch()
    for part in (data.slice(0, 2), data.select(batch_keys=["obs"])):
        part.batch["obs"][0, 0] += 1
        part.meta_info["temperature"] = 1.0
    assert data.batch["obs"][0, 0] == 2
    assert data.meta_info["temperature"] == 0.5
    copied = data.select(deepcopy=True)
    copied.batch["obs"][0, 0] = 99
    copied.non_tensor_batch["turns"][1].append(1)
    assert data.batch["obs"][0, 0] == 2
    assert data.non_tensor_batch["turns"][1] == [0]


def test_select_copies_the_named_keys_and_pop_moves_them():
    data = make_batch()
    keys: dict[str, Any] = {"batch_keys": ["obs"], "non_tensor_batch_keys": ["name"], "meta_info_keys": ["temperature"]}
    for taken in (data.select(**keys), data.pop(**keys)):
        assert first_column(taken) == [0, 2, 4, 6]
        assert list(taken.non_tensor_batch) == ["name"] and taken.meta_info == {"temperature": 0.5}
    assert list(data.batch.keys()) == [] and list(data.non_tensor_batch) == ["turns"] and data.meta_info == {}


def test_a_missing_key_is_named_with_its_producer():
    data = make_batch()
    data.require("obs", "name")
    assert data.tensor("obs") is data.batch["obs"] and data.array("name") is data.non_tensor_batch["name"]
    with pytest.raises(KeyError, match=r"'old_log_probs' \(made by: student\), 'mine'; it holds name, obs, turns"):
        data.require("obs", "old_log_probs", "mine")
    with pytest.raises(KeyError, match="'name'"):
        data.tensor("name")
    with pytest.raises(KeyError, match=r"'uid' \(made by: trainer\)"):
        data.array("uid")


def test_rename_may_exchange_two_tensors():
    data = make_batch().union(DataProto.from_dict({"act": torch.ones(4)}))
    assert data.rename(["act", "obs"], ["obs", "act"]) is data
    assert data.batch["obs"].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="as many new keys"):
        data.rename(["obs"], ["a", "b"])


def test_union_adds_keys_in_place():
    data = make_batch()
    other = DataProto.from_dict({"act": torch.ones(4)}, {"uid": list("abcd")}, {"step": 1})
    assert data.union(other) is data
    assert set(data.batch.keys()) == {"obs", "act"}
    assert set(data.non_tensor_batch) == {"name", "turns", "uid"}
    assert data.meta_info == {"temperature": 0.5, "step": 1}
    assert DataProto.from_dict(non_tensors={"uid": ["a"]}).union(DataProto.from_dict({"x": torch.ones(1)})).batch.shape


def test_union_accepts_equal_keys_nan_included():
    def rows() -> DataProto:
        return DataProto.from_dict(
            {"x": torch.tensor([1.0, float("nan")]), "flag": torch.tensor([True, False])},
            {"answer": [{"scores": np.array([1.0, np.nan])}, [torch.ones(2), float("nan"), None]]},
            {"clip": (0.1, [2, "a"])},
        )

    assert len(rows().union(rows())) == 2


@pytest.mark.parametrize(
    ("tensors", "arrays", "meta_info", "named"),
    [
        ({"obs": torch.ones(4, 2, dtype=torch.long)}, {}, {}, "tensor 'obs'"),
        ({"obs": torch.arange(8.0).view(4, 2)}, {}, {}, "tensor 'obs'"),
        ({}, {"turns": [[], [0], [0, 0], np.zeros(3)]}, {}, "array 'turns'"),
        ({}, {}, {"temperature": 1.0}, "meta_info 'temperature'"),
        ({}, {"uid": ["a", "b"]}, {}, "'uid' has 2 rows"),
    ],
    ids=["values", "dtype", "nested types", "meta_info", "length"],
)
def test_union_names_the_key_that_differs_and_leaves_the_batch_alone(tensors, arrays, meta_info, named):
    data = make_batch()
    with pytest.raises(ValueError, match=named):
        data.union(DataProto.from_dict(tensors, arrays, meta_info))
    assert first_column(data) == [0, 2, 4, 6] and list(data.non_tensor_batch) == ["name", "turns"]


def test_chunk_and_concat_are_inverse():
    data = make_batch(6)
    chunks = data.chunk(3)
    assert [first_column(chunk) for chunk in chunks] == [[0, 2], [4, 6], [8, 10]]
    again = DataProto.concat(chunks)
    assert first_column(again) == first_column(data)
    assert again.non_tensor_batch["turns"].tolist() == data.non_tensor_batch["turns"].tolist()
    assert again.meta_info == {"temperature": 0.5}


def test_chunk_refuses_a_remainder_and_split_keeps_it():
    with pytest.raises(ValueError, match="5 rows do not divide into 2 chunks"):
        make_batch(5).chunk(2)
    assert [len(part) for part in make_batch(5).split(2)] == [2, 2, 1]
    assert [part.meta_info for part in DataProto(meta_info={"step": 1}).chunk(2)] == [{"step": 1}] * 2


def test_concat_gathers_metrics_in_lists_and_names_what_disagrees():
    parts = [DataProto(meta_info={"metrics": {"loss": loss}, "step": 1}) for loss in (1.0, 2.0, [3.0, 4.0])]
    assert DataProto.concat(parts).meta_info == {"step": 1, "metrics": {"loss": [1.0, 2.0, 3.0, 4.0]}}
    with pytest.raises(ValueError, match="meta_info 'step'"):
        DataProto.concat([DataProto(meta_info={"step": 1}), DataProto(meta_info={"step": 2})])
    with pytest.raises(ValueError, match="not in all: name"):
        DataProto.concat([make_batch(), make_batch().select(non_tensor_batch_keys=["turns"])])


@pytest.mark.parametrize(("interleave", "rows"), [(True, [0, 0, 1, 1]), (False, [0, 1, 0, 1])])
def test_repeat_next_to_each_other_or_over_and_over(interleave, rows):
    repeated = make_batch(2).repeat(2, interleave)
    assert first_column(repeated) == [2 * row for row in rows]
    assert repeated.non_tensor_batch["name"].tolist() == [f"row {row}" for row in rows]


def test_reorder_changes_all_columns_or_none_and_no_other_batch():
    data = make_batch(3)
    other = data.select()
    with pytest.raises(IndexError):
        data.reorder([0, 1, 3])
    assert first_column(data) == [0, 2, 4]
    data.reorder(torch.tensor([2, 0, 1]))
    assert first_column(data) == [4, 0, 2] and data.array("name").tolist() == ["row 2", "row 0", "row 1"]
    assert first_column(other) == [0, 2, 4] and other.array("name").tolist() == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize(("rows", "divisor", "added"), [(1, 4, 3), (3, 16, 13), (7, 2, 1), (8, 4, 0), (4, 1, 0)])
def test_unpadding_undoes_padding(rows, divisor, added):
    padded, pad_size = pad_dataproto_to_divisor(make_batch(rows), divisor)
    assert pad_size == added
    assert first_column(padded) == [2 * (row % rows) for row in range(rows + added)]
    assert first_column(unpad_dataproto(padded, pad_size)) == first_column(make_batch(rows))


def test_to_moves_tensors():
    data = make_batch()
    assert data.to("meta") is data and data.batch["obs"].device.type == "meta"
    assert DataProto().to("cpu").batch is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.int32])
def test_pickle_keeps_values_and_dtypes(dtype):
    tensor = torch.tensor([[0, 1, 1], [1, 0, 2]]).to(dtype).requires_grad_(dtype == torch.float64)
    data = DataProto.from_dict({"x": tensor})
    for again in (pickle.loads(pickle.dumps(data)), copy.deepcopy(data)):
        assert torch.equal(again.batch["x"], tensor) and again.batch["x"].dtype == dtype
        assert not again.batch["x"].requires_grad
        again.batch["x"][0, 0] = 1  # its memory is its own


def test_pickle_of_empty_batches():
    assert pickle.loads(pickle.dumps(make_batch()[0:0])).batch["obs"].shape == (0, 2)
    assert pickle.loads(pickle.dumps(DataProto(meta_info={"step": 1}))).meta_info == {"step": 1}


def test_pickle_takes_a_slices_own_rows_and_copies_none():
    data = DataProto.from_dict({"x": torch.zeros(1000, 100)})
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(data.chunk(100)[0], protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 2000
    assert [len(buffer.raw()) for buffer in buffers] == [10 * 100 * 4]
    data.batch["x"][0, 0] = 7.0
    assert pickle.loads(stream, buffers=buffers).batch["x"][0, 0] == 7.0


def test_disk_round_trip(tmp_path):
    make_batch().save_to_disk(tmp_path / "batch.pkl")
    again = DataProto.load_from_disk(tmp_path / "batch.pkl")
    assert first_column(again) == [0, 2, 4, 6] and again.meta_info == {"temperature": 0.5}
    assert again.non_tensor_batch["turns"].tolist() == [[], [0], [0, 0], [0, 0, 0]]
