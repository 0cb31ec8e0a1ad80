"""Files that are whole or not there, and safetensors files written piece by piece."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.file_faults import disk_full_text

from verl.utils.durable_files import file_sizes, flush_tree, write_durably
from verl.utils.safetensors_stream import TensorInfo, write_safetensors


def test_a_replaced_file_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "step.txt"
    write_durably(path, "2\n")
    with disk_full_text(0), pytest.raises(OSError, match="File too large"):
        write_durably(path, "4\n")
    assert path.read_text() == "2\n"
    write_durably(path, b"6\n")
    assert path.read_text() == "6\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["step.txt"], "nothing is left beside it"


def test_sizes_are_told_by_path_over_all_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"123")
    (tmp_path / "y").write_bytes(b"")
    flush_tree(tmp_path)
    assert file_sizes(tmp_path) == {"a/x": 3, "y": 0}


def test_the_library_reads_what_was_streamed(tmp_path: Path) -> None:
    tensors = {
        "embedding": torch.randn(5, 3),
        "half": torch.randn(4, 2).bfloat16().t(),  # not laid out in order
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "flags": torch.tensor([True, False]),
    }
    infos = [TensorInfo(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()]
    path = tmp_path / "model.safetensors"
    write_safetensors(path, infos, lambda info: tensors[info.name])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}, "transformers asks for it"
