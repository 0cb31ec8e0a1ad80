"""DataProto: building, picking, joining, splitting and pickling rows, on hand-made batches."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch

from verl.protocol import BATCH_KEYS, DataProto, DataProtoItem, pad_dataproto_to_divisor, unpad_dataproto


def make_batch(rows: int = 4) -> DataProto:
    """Row i: ``obs`` [2i, 2i + 1], ``name`` "row i", ``turns`` a list of i entries."""
    return DataProto.from_dict(
        tensors={"obs": torch.arange(2 * rows).view(rows, 2)},
        non_tensors={"name": [f"row {row}" for row in range(rows)], "turns": [[0] * row for row in range(rows)]},
        meta_info={"temperature": 0.5},
    )


def first_column(data: DataProto) -> list[int]:
    return data.batch["obs"][:, 0].tolist()


def test_lists_of_one_length_stay_lists():
    data = DataProto.from_dict(non_tensors={"raw_prompt": [[{"role": "user"}], [{"role": "user"}]]})
    assert data.non_tensor_batch["raw_prompt"].shape == (2,)
    assert data.non_tensor_batch["raw_prompt"].dtype == object
    assert data[1].non_tensor_batch["raw_prompt"] == [{"role": "user"}]


def test_length_comes_from_either_part():
    assert len(make_batch(3)) == 3
    assert len(DataProto.from_dict(non_tensors={"uid": ["a", "b"]})) == 2
    absent: Any = None
    assert len(DataProto(batch=absent, non_tensor_batch=absent, meta_info=absent)) == 0


def test_different_lengths_are_named():
    with pytest.raises(ValueError, match=r"'uid' has 3 rows, but 'obs' has 2"):
        DataProto.from_dict({"obs": torch.zeros(2, 1)}, {"uid": ["a", "b", "c"]})
    data = make_batch(2)
    data.non_tensor_batch["uid"] = np.array(["a"], dtype=object)
    with pytest.raises(ValueError, match=r"'uid' has 1 rows, but 'obs' has 2"):
        data.check_consistency()


def test_what_is_no_column_is_refused():
    no_column: Any = {"x": [1, 2]}
    with pytest.raises(ValueError, match=r"tensors\['x'\] must be a tensor"):
        DataProto.from_dict(no_column)
    with pytest.raises(ValueError, match=r"non_tensor_batch\['x'\] is a list"):
        DataProto(non_tensor_batch=no_column)
    with pytest.raises(ValueError, match=r"'x' is a list"):
        DataProto.from_single_dict(no_column)


def test_from_single_dict_sorts_by_type():
    data = DataProto.from_single_dict({"obs": torch.zeros(2, 1), "label": np.array([7, 8])}, meta_info={"step": 3})
    assert list(data.batch.keys()) == ["obs"]
    assert data.non_tensor_batch["label"].tolist() == [7, 8]
    assert data.meta_info == {"step": 3}


def test_an_int_gives_one_row():
    item = make_batch()[-1]
    assert isinstance(item, DataProtoItem)
    assert item.batch["obs"].tolist() == [6, 7]
    assert item.non_tensor_batch == {"name": "row 3", "turns": [0, 0, 0]}


@pytest.mark.parametrize(
    "index",
    [
        slice(1, 4, 2),
        [1, 3],
        np.array([1, 3]),
        torch.tensor([1, 3]),
        [False, True, False, True],
        np.array([False, True, False, True]),
        torch.tensor([False, True, False, True]),
    ],
    ids=["slice", "list", "numpy", "torch", "bools", "numpy bools", "torch bools"],
)
def test_every_index_picks_the_same_rows_of_all_parts(index):
    picked = make_batch()[index]
    assert first_column(picked) == [2, 6]
    assert picked.non_tensor_batch["name"].tolist() == ["row 1", "row 3"]
    assert picked.meta_info == {"temperature": 0.5}


def test_odd_indices():
    assert len(make_batch()[[]]) == 0
    with pytest.raises(IndexError, match=r"a mask of shape \(2,\) does not fit 4 rows"):
        make_batch()[[True, False]]
    with pytest.raises(IndexError):
        make_batch()[[4]]


def test_slice_shares_memory_and_keeps_its_own_meta_info():
    data = make_batch()
    part = data.slice(0, 2)
    part.batch["obs"][0, 0] = 99
    part.meta_info["temperature"] = 1.0
    assert data.batch["obs"][0, 0] == 99
    assert data.meta_info["temperature"] == 0.5


def test_select_takes_named_keys():
    data = make_batch()
    selected = data.select(batch_keys=["obs"], non_tensor_batch_keys=["name"], meta_info_keys=[])
    assert list(selected.non_tensor_batch) == ["name"]
    assert selected.meta_info == {}
    assert list(data.select(batch_keys=[]).batch.keys()) == []
    selected.batch["obs"][0, 0] = 99
    assert data.batch["obs"][0, 0] == 99


def test_select_deepcopy_shares_nothing():
    data = make_batch()
    selected = data.select(deepcopy=True)
    selected.batch["obs"][0, 0] = 99
    selected.non_tensor_batch["turns"][1].append(1)
    assert data.batch["obs"][0, 0] == 0
    assert data.non_tensor_batch["turns"][1] == [0]


def test_a_missing_key_is_named_with_its_producer():
    data = make_batch()
    with pytest.raises(KeyError, match=r"'old_log_probs' \(made by: student\), 'mine'; it holds name, obs, turns"):
        data.require("obs", "old_log_probs", "mine")
    with pytest.raises(KeyError, match=r"'ref_log_prob' \(made by: teacher\)"):
        data.tensor("ref_log_prob")
    with pytest.raises(KeyError, match="'name'"):
        data.tensor("name")
    with pytest.raises(KeyError, match=r"'uid' \(made by: trainer\)"):
        data.array("uid")
    with pytest.raises(KeyError, match=r"'responses' \(made by: rollout\)"):
        data.select(batch_keys=["responses"])


def test_present_keys_are_returned():
    data = make_batch()
    data.require("obs", "name")
    assert data.tensor("obs") is data.batch["obs"]
    assert data.array("name") is data.non_tensor_batch["name"]


def test_the_table_covers_the_contract():
    masks = ["response_mask", "distill_special_token_mask", "attention_mask", "position_ids"]
    tokens = ["prompts", "responses", "input_ids"]
    values = ["old_log_probs", "ref_log_prob", "rollout_log_probs", "advantages", "returns"]
    objects = ["uid", "raw_prompt", "data_source", "source", "reward_model", "__num_turns__"]
    contract = [*tokens, *masks, *values, *objects]
    assert set(contract) <= BATCH_KEYS.keys()
    assert BATCH_KEYS["prompts"] == ("int64", "(B, P)", "rollout", "reward, dumps")
    for key, row in BATCH_KEYS.items():
        assert row.dtype in ("int64", "int32", "float32", "object"), key
        assert row.shape in ("(B, P)", "(B, R)", "(B, T)", "(B,)", "(B, R, K)"), key
        assert row.producer in ("dataset", "trainer", "rollout", "student", "teacher", "reward", "advantage"), key
        assert row.consumer, key


def test_pop_moves_keys_out():
    data = make_batch()
    popped = data.pop(batch_keys=["obs"], non_tensor_batch_keys=["name"], meta_info_keys=["temperature"])
    assert first_column(popped) == [0, 2, 4, 6]
    assert popped.meta_info == {"temperature": 0.5}
    assert list(data.batch.keys()) == []
    assert list(data.non_tensor_batch) == ["turns"]
    assert data.meta_info == {}


def test_rename_tensors():
    data = make_batch()
    assert data.rename("obs", "state") is data
    assert list(data.batch.keys()) == ["state"]
    data.union(DataProto.from_dict({"act": torch.ones(4)})).rename(["act", "state"], ["state", "act"])
    assert data.batch["state"].tolist() == [1, 1, 1, 1]
    with pytest.raises(ValueError, match="as many new keys"):
        data.rename(["state"], ["a", "b"])


def test_union_adds_keys_in_place():
    data = make_batch()
    other = DataProto.from_dict({"act": torch.ones(4)}, {"uid": list("abcd")}, {"step": 1})
    assert data.union(other) is data
    assert set(data.batch.keys()) == {"obs", "act"}
    assert set(data.non_tensor_batch) == {"name", "turns", "uid"}
    assert data.meta_info == {"temperature": 0.5, "step": 1}


def test_union_gives_tensors_to_a_batch_without():
    data = DataProto.from_dict(non_tensors={"uid": ["a", "b"]})
    data.union(DataProto.from_dict({"act": torch.ones(2)}))
    assert data.batch.batch_size == torch.Size([2])


def test_union_of_equal_keys_passes_nan_included():
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
        ({}, {"name": ["row 0", "row 1", "row 2", "other"]}, {}, "array 'name'"),
        ({}, {"turns": [[], [0], [0, 0], [0, 0, 1]]}, {}, "array 'turns'"),
        ({}, {"turns": [[], [0], [0, 0], np.zeros(3)]}, {}, "array 'turns'"),
        ({}, {}, {"temperature": 1.0}, "meta_info 'temperature'"),
    ],
    ids=["values", "dtype", "strings", "nested", "nested types", "meta_info"],
)
def test_union_names_the_key_that_differs(tensors, arrays, meta_info, named):
    with pytest.raises(ValueError, match=named):
        make_batch().union(DataProto.from_dict(tensors, arrays, meta_info))


def test_union_refuses_another_length_and_leaves_the_batch_alone():
    data = make_batch()
    with pytest.raises(ValueError, match="'uid' has 2 rows"):
        data.union(DataProto.from_dict(non_tensors={"uid": ["a", "b"]}))
    assert "uid" not in data.non_tensor_batch


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


def test_chunks_of_facts_alone():
    parts = DataProto(meta_info={"step": 1}).chunk(2)
    assert [part.meta_info for part in parts] == [{"step": 1}, {"step": 1}]


def test_concat_gathers_metrics_in_lists():
    parts = [DataProto(meta_info={"metrics": {"loss": loss}, "step": 1}) for loss in (1.0, 2.0, [3.0, 4.0])]
    assert DataProto.concat(parts).meta_info == {"step": 1, "metrics": {"loss": [1.0, 2.0, 3.0, 4.0]}}


def test_concat_names_what_disagrees():
    with pytest.raises(ValueError, match="meta_info 'step'"):
        DataProto.concat([DataProto(meta_info={"step": 1}), DataProto(meta_info={"step": 2})])
    with pytest.raises(ValueError, match="not in all: name"):
        DataProto.concat([make_batch(), make_batch().select(non_tensor_batch_keys=["turns"])])
    with pytest.raises(ValueError, match="at least one"):
        DataProto.concat([])


def test_repeat_next_to_each_other_or_over_and_over():
    data = make_batch(2)
    assert first_column(data.repeat(2, interleave=True)) == [0, 0, 2, 2]
    tiled = data.repeat(2, interleave=False)
    assert first_column(tiled) == [0, 2, 0, 2]
    assert tiled.non_tensor_batch["name"].tolist() == ["row 0", "row 1"] * 2


def test_reorder_in_place():
    data = make_batch(3)
    data.reorder(torch.tensor([2, 0, 1]))
    assert first_column(data) == [4, 0, 2]
    assert data.non_tensor_batch["name"].tolist() == ["row 2", "row 0", "row 1"]


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("divisor", [1, 2, 4, 16])
def test_unpadding_undoes_padding(rows, divisor):
    data = make_batch(rows)
    padded, pad_size = pad_dataproto_to_divisor(data, divisor)
    assert len(padded) % divisor == 0
    assert pad_size < divisor
    assert first_column(padded) == [2 * (row % rows) for row in range(rows + pad_size)]
    assert first_column(unpad_dataproto(padded, pad_size)) == first_column(data)


def test_a_reorder_that_cannot_be_changes_nothing_and_shares_nothing_with_others():
    data = DataProto.from_dict({"x": torch.arange(3), "y": torch.arange(3)}, {"uid": list("abc")})
    other = data.select()
    with pytest.raises(IndexError):
        data.reorder([0, 1, 3])
    assert data.batch["x"].tolist() == data.batch["y"].tolist() == [0, 1, 2]
    data.reorder([2, 1, 0])
    assert data.batch["y"].tolist() == [2, 1, 0] and data.array("uid").tolist() == ["c", "b", "a"]
    assert other.batch["y"].tolist() == [0, 1, 2] and other.array("uid").tolist() == ["a", "b", "c"]


def test_padding_nothing_is_nothing():
    assert pad_dataproto_to_divisor(DataProto(), 4)[1] == 0


def test_to_moves_tensors():
    data = make_batch()
    assert data.to("meta") is data
    assert data.batch["obs"].device.type == "meta"
    assert DataProto().to("cpu").batch is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.int32])
def test_pickle_keeps_values_and_dtypes(dtype):
    data = DataProto.from_dict(
        {"x": torch.tensor([[0, 1, 1], [1, 0, 2]]).to(dtype), "one": torch.zeros(2, dtype=dtype)}
    )
    again = pickle.loads(pickle.dumps(data))
    assert again.batch["x"].dtype == dtype
    assert torch.equal(again.batch["x"], data.batch["x"])
    again.batch["x"][0, 0] = 1


def test_pickle_of_empty_batches():
    assert len(pickle.loads(pickle.dumps(make_batch()[0:0]))) == 0
    assert pickle.loads(pickle.dumps(make_batch()[0:0])).batch["obs"].shape == (0, 2)
    assert pickle.loads(pickle.dumps(DataProto(meta_info={"step": 1}))).meta_info == {"step": 1}


def test_pickle_of_a_slice_holds_its_own_rows_only():
    data = DataProto.from_dict({"x": torch.zeros(1000, 100)})
    whole, part = len(pickle.dumps(data)), len(pickle.dumps(data.chunk(100)[0]))
    assert part < whole / 50


def test_pickle_hands_large_tensors_over_without_a_copy():
    data = DataProto.from_dict({"x": torch.zeros(1000, 100)})
    buffers: list[pickle.PickleBuffer] = []
    stream = pickle.dumps(data, protocol=5, buffer_callback=buffers.append)
    assert len(stream) < 2000
    assert [len(buffer.raw()) for buffer in buffers] == [1000 * 100 * 4]
    data.batch["x"][0, 0] = 7.0
    assert pickle.loads(stream, buffers=buffers).batch["x"][0, 0] == 7.0


def test_tensors_that_need_gradients_arrive_without():
    data = DataProto.from_dict({"x": torch.ones(2, requires_grad=True)})
    assert not copy.deepcopy(data).batch["x"].requires_grad


def test_disk_round_trip(tmp_path):
    make_batch().save_to_disk(tmp_path / "batch.pkl")
    again = DataProto.load_from_disk(tmp_path / "batch.pkl")
    assert first_column(again) == [0, 2, 4, 6]
    assert again.non_tensor_batch["turns"].tolist() == [[], [0], [0, 0], [0, 0, 0]]
    assert again.meta_info == {"temperature": 0.5}
