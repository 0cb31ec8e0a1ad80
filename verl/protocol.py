"""The one carrier of data between the stages of a step.

A ``DataProto`` holds the rows of a batch: tensors in ``batch``, Python objects in ``non_tensor_batch``, and facts
about the whole batch in ``meta_info``. A stage takes one and returns one with its new keys, which the trainer joins.
Pickling a ``DataProto`` sends its own rows only (a slice does not drag the tensor it was cut from along), on the CPU.
It knows nothing of Ray, models or padding of sequences. B sequences, P prompt, R response, T = P + R, K likeliest ids
of a teacher. Masks are 1 where a position counts; float tensors are 0 at padding.
"""

import pickle
from collections.abc import Mapping, Sequence
from copy import deepcopy as copy_deeply
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict


class BatchKey(NamedTuple):
    """What a key of a batch holds, which stage makes it and which ones read it."""

    dtype: str
    shape: str
    producer: str
    consumer: str


BATCH_KEYS = {
    "prompts": BatchKey("int64", "(B, P)", "rollout", "metrics (validation), dumps"),
    "responses": BatchKey("int64", "(B, R)", "rollout", "log-probs, update, reward, metrics"),
    "input_ids": BatchKey("int64", "(B, T)", "rollout", "log-probs, update"),
    "attention_mask": BatchKey("int64", "(B, T)", "rollout", "log-probs, update, reward, metrics"),
    "position_ids": BatchKey("int64", "(B, T)", "rollout", "nothing here; verl has it"),
    "response_mask": BatchKey("int64", "(B, R)", "rollout", "advantage, update, metrics"),
    "distill_special_token_mask": BatchKey("int64", "(B, R)", "rollout", "advantage, metrics, dumps"),
    "rollout_log_probs": BatchKey("float32", "(B, R)", "rollout", "advantage (importance weights), metrics"),
    "old_log_probs": BatchKey("float32", "(B, R)", "student", "advantage, update, metrics"),
    "entropys": BatchKey("float32", "(B, R)", "student", "metrics"),
    "extend_mass": BatchKey("float32", "(B, R)", "student", "metrics"),
    "ref_log_prob": BatchKey("float32", "(B, R)", "teacher", "advantage, update (KL term), metrics"),
    "divergence": BatchKey("float32", "(B, R)", "update", "dumps (divergence objectives, where rollouts are dumped)"),
    "teacher_top_ids": BatchKey("int32", "(B, R, K)", "teacher", "update (objective topk)"),
    "teacher_top_log_probs": BatchKey("float32", "(B, R, K)", "teacher", "update (objective topk)"),
    "teacher_rest_log_prob": BatchKey("float32", "(B, R)", "teacher", "update (objective topk)"),
    "teacher_input_ids": BatchKey("int64", "(B, T)", "trainer", "update (rows as teachers with own prompts read them)"),
    "teacher_attention_mask": BatchKey("int64", "(B, T)", "trainer", "update (likewise)"),
    "teacher_states": BatchKey("object", "(B,)", "teacher", "update (handles to hidden states)"),
    "token_level_scores": BatchKey("float32", "(B, R)", "reward", "advantage (KL penalty), metrics"),
    "reward_extra": BatchKey("object", "(B,)", "reward", "metrics, dumps (what it reported in addition to a score)"),
    "token_level_rewards": BatchKey("float32", "(B, R)", "advantage", "advantage, metrics"),
    "rollout_is_weights": BatchKey("float32", "(B, R)", "advantage", "update, metrics"),
    "advantages": BatchKey("float32", "(B, R)", "advantage", "update, metrics"),
    "returns": BatchKey("float32", "(B, R)", "advantage", "metrics"),
    "teacher": BatchKey("int64", "(B,)", "trainer", "teacher scores, advantage, update, metrics"),
    "teacher_knows_extended": BatchKey("object", "(B,)", "trainer", "rollout (masks), advantage, metrics"),
    "answer_row": BatchKey("int64", "(B,)", "trainer", "trainer (order of scores that were asked earlier)"),
    "uid": BatchKey("object", "(B,)", "trainer", "rollout (seeds), advantage (groups)"),
    "raw_prompt": BatchKey("object", "(B,)", "dataset", "rollout, trainer (teachers with own prompts)"),
    "prompt_ids": BatchKey("object", "(B,)", "dataset", "rollout (in place of raw_prompt, where it is there)"),
    "hints": BatchKey("object", "(B,)", "dataset", "trainer (what a teacher alone reads)"),
    "data_source": BatchKey("object", "(B,)", "dataset", "reward, metrics"),
    "source": BatchKey("object", "(B,)", "dataset", "trainer (teacher of a row), metrics"),
    "reward_model": BatchKey("object", "(B,)", "dataset", "reward"),
    "agent_name": BatchKey("object", "(B,)", "dataset", "rollout"),
    "extra_info": BatchKey("object", "(B,)", "dataset", "reward"),
    "tools_kwargs": BatchKey("object", "(B,)", "dataset", "rollout"),
    "index": BatchKey("object", "(B,)", "dataset", "trainer (uid), rollout, dumps"),
    "uuid": BatchKey("object", "(B,)", "dataset", "rollout (a user's agent loop)"),
    "has_extended": BatchKey("object", "(B,)", "dataset", "trainer (teacher of a row)"),
    "__num_turns__": BatchKey("object", "(B,)", "rollout", "reward, metrics"),
}
"""Every key that travels from stage to stage: loops write rollout keys, the driver unions what stages return. Columns
that only the rollout's own processes exchange are in ``agent_loop.base`` and ``agent_loop.worker``.

What the student scores (``old_log_probs``, ``entropys``, ``extend_mass``), the teachers' ``ref_log_prob`` of an exact
objective, and distillation's part of ``advantages`` and ``returns`` come from the update where its own pass makes them:
at trained positions, 0 elsewhere. So does ``divergence``.
"""


def _object_array(values: Any) -> np.ndarray:
    """``values`` as an array of Python objects whose first dimension is B; lists of one length stay lists."""
    if isinstance(values, np.ndarray):
        return values.astype(object, copy=False)
    return np.fromiter(values, dtype=object, count=len(values))


def _same_value(first: Any, second: Any) -> bool:
    """Deep equality that understands tensors and arrays; NaN equals NaN."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        alike = first.shape == second.shape and first.dtype == second.dtype
        # torch.equal calls two NaN different.
        return alike and bool(torch.isclose(first, second.to(first.device), rtol=0, atol=0, equal_nan=True).all())
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.shape == second.shape and all(map(_same_value, first.flat, second.flat))
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same_value(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same_value, first, second))
    arrays = isinstance(first, torch.Tensor | np.ndarray) or isinstance(second, torch.Tensor | np.ndarray)
    return not arrays and (bool(first == second) or bool(first != first and second != second))


def _join(kind: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings in one; raises ValueError where a key stands in both with different values."""
    for key in first.keys() & second.keys():
        if not _same_value(first[key], second[key]):
            raise ValueError(f"both sides hold {kind} {key!r} with different values; rename or drop one before union")
    return {**first, **second}


def merge_meta_info(infos: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Facts that agree, once; the ``metrics`` dicts as one dict of lists."""
    merged: dict[str, Any] = {}
    metrics: dict[str, list[Any]] = {}
    for info in infos:
        merged = _join("meta_info", merged, {key: value for key, value in info.items() if key != "metrics"})
        for name, value in info.get("metrics", {}).items():
            metrics.setdefault(name, []).extend(value if isinstance(value, list) else [value])
    return {**merged, "metrics": metrics} if any("metrics" in info for info in infos) else merged


def _as_list(names: str | Sequence[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _pack_tensor(tensor: torch.Tensor) -> tuple[np.ndarray, torch.dtype, torch.Size]:
    # As bytes in numpy: every dtype goes through, only the view's own rows are written, and protocol 5 copies nothing.
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy(), tensor.dtype, tensor.shape


def _unpack_tensor(buffer: np.ndarray, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    # Copied into memory of its own: the buffer may be Ray's, which is shared and read-only.
    tensor = torch.empty(shape, dtype=dtype)
    tensor.flatten().view(torch.uint8).numpy()[:] = buffer
    return tensor


@dataclass(eq=False)
class DataProtoItem:
    """One row: tensors without their first dimension, and plain Python objects."""

    batch: Any
    non_tensor_batch: dict[str, Any] = field(default_factory=dict)
    meta_info: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class DataProto:
    """Rows of a batch, and facts about the batch.

    Slices share memory with what they were cut from; index lists, ``repeat`` and ``concat`` copy. ``union``,
    ``rename``, ``reorder`` and ``to`` change the object itself and, but for ``reorder``, return it.
    """

    batch: Any = None
    """TensorDict of the tensors by key, first dimension B; None where there are no tensors."""
    non_tensor_batch: dict[str, np.ndarray] = field(default_factory=dict)
    """Object arrays by key, first dimension B."""
    meta_info: dict[str, Any] = field(default_factory=dict)
    """Anything that belongs to the batch as a whole."""

    def __post_init__(self) -> None:
        self.non_tensor_batch, self.meta_info = self.non_tensor_batch or {}, self.meta_info or {}
        self.check_consistency()

    @classmethod
    def from_dict(
        cls,
        tensors: Mapping[str, torch.Tensor] | None = None,
        non_tensors: Mapping[str, Any] | None = None,
        meta_info: dict[str, Any] | None = None,
    ) -> "DataProto":
        """Build one from tensors (B, ...) and from lists or arrays of length B."""
        tensors, non_tensors = tensors or {}, non_tensors or {}
        for key, value in tensors.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                raise ValueError(f"tensors[{key!r}] must be a tensor whose first dimension is the batch: {value!r:.80}")
        arrays = {key: _object_array(value) for key, value in non_tensors.items()}
        _check_lengths({**tensors, **arrays})
        batch = TensorDict(dict(tensors), batch_size=[len(next(iter(tensors.values())))]) if tensors else None
        return cls(batch, arrays, meta_info or {})

    @classmethod
    def from_single_dict(cls, data: Mapping[str, Any], meta_info: dict[str, Any] | None = None) -> "DataProto":
        """Build one from a dict that mixes tensors and arrays, as a collate function makes it."""
        tensors = {key: value for key, value in data.items() if isinstance(value, torch.Tensor)}
        arrays = {key: value for key, value in data.items() if isinstance(value, np.ndarray)}
        if others := data.keys() - tensors.keys() - arrays.keys():
            kinds = ", ".join(f"{key!r} is a {type(data[key]).__name__}" for key in sorted(others))
            raise ValueError(f"from_single_dict takes tensors and numpy arrays: {kinds}")
        return cls.from_dict(tensors, arrays, meta_info)

    def check_consistency(self) -> None:
        """Raise ValueError where two keys differ in length, naming both."""
        for key, value in self.non_tensor_batch.items():
            if not isinstance(value, np.ndarray):
                raise ValueError(f"non_tensor_batch[{key!r}] is a {type(value).__name__}; make it an object array")
        _check_lengths({**self._tensors(), **self.non_tensor_batch})

    def __len__(self) -> int:
        if self.batch is not None:
            return self.batch.batch_size[0]
        return len(next(iter(self.non_tensor_batch.values()), ()))

    def __getitem__(self, item: Any) -> Any:
        """An int gives a ``DataProtoItem``; a slice, a list, an array or a mask (B,) of bools gives a ``DataProto``."""
        if isinstance(item, slice):
            return self._rows(item, item)
        if isinstance(item, int | np.integer):
            row = {key: value[item] for key, value in self.non_tensor_batch.items()}
            return DataProtoItem(self.batch if self.batch is None else self.batch[int(item)], row, self.meta_info)
        return self.select_idxs(item)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "tensors": {key: _pack_tensor(value) for key, value in self._tensors().items()},
            "batch_size": None if self.batch is None else list(self.batch.batch_size),
            "non_tensor_batch": self.non_tensor_batch,
            "meta_info": self.meta_info,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {key: _unpack_tensor(*packed) for key, packed in state["tensors"].items()}
        self.batch = None if state["batch_size"] is None else TensorDict(tensors, batch_size=state["batch_size"])
        self.non_tensor_batch, self.meta_info = state["non_tensor_batch"], state["meta_info"]

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {} if self.batch is None else dict(self.batch.items())

    def _rows(self, tensor_index: Any, array_index: Any) -> "DataProto":
        batch = self.batch if self.batch is None else self.batch[tensor_index]
        arrays = {key: value[array_index] for key, value in self.non_tensor_batch.items()}
        return type(self)(batch, arrays, dict(self.meta_info))

    def _missing(self, keys: Sequence[str]) -> KeyError:
        held = ", ".join(sorted([*self._tensors(), *self.non_tensor_batch])) or "nothing"
        names = [f"{key!r} (made by: {BATCH_KEYS[key].producer})" if key in BATCH_KEYS else repr(key) for key in keys]
        return KeyError(f"the batch lacks {', '.join(names)}; it holds {held}")

    def require(self, *keys: str) -> None:
        """Raise KeyError naming each key that is absent, and the stage that produces it."""
        if missing := [key for key in keys if key not in self._tensors() and key not in self.non_tensor_batch]:
            raise self._missing(missing)

    def tensor(self, key: str) -> torch.Tensor:
        """The tensor of a key; KeyError names the key's producer."""
        if key not in self._tensors():
            raise self._missing([key])
        return self.batch[key]

    def array(self, key: str) -> np.ndarray:
        """The object array of a key; KeyError names the key's producer."""
        if key not in self.non_tensor_batch:
            raise self._missing([key])
        return self.non_tensor_batch[key]

    def slice(self, start: int | None = None, end: int | None = None, step: int | None = None) -> "DataProto":
        """The rows ``start:end:step``, sharing memory."""
        return self[slice(start, end, step)]

    def select_idxs(self, idxs: Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor) -> "DataProto":
        """Copies of the rows a list, an array or a tensor of indices names, or of those a (B,) mask of bools marks."""
        index = torch.as_tensor(idxs).cpu()
        index = index if index.dtype == torch.bool else index.long()  # an empty list came as float32
        places = torch.arange(len(self))[index]  # raises IndexError for a mask of another length
        return self._rows(places, places.numpy())

    def select(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
        deepcopy: bool = False,
    ) -> "DataProto":
        """The named keys of each part; None takes the whole part. Memory is shared unless ``deepcopy``."""
        batch, arrays, meta_info = self.batch, dict(self.non_tensor_batch), dict(self.meta_info)
        self.require(*_as_list(batch_keys), *_as_list(non_tensor_batch_keys))
        if batch is not None and batch_keys is not None:
            batch = batch.select(*_as_list(batch_keys))
        if non_tensor_batch_keys is not None:
            arrays = {key: arrays[key] for key in _as_list(non_tensor_batch_keys)}
        if meta_info_keys is not None:
            meta_info = {key: meta_info[key] for key in _as_list(meta_info_keys) if key in meta_info}
        selected = type(self)(batch, arrays, meta_info)
        return copy_deeply(selected) if deepcopy else selected

    def pop(
        self,
        batch_keys: Sequence[str] | None = None,
        non_tensor_batch_keys: Sequence[str] | None = None,
        meta_info_keys: Sequence[str] | None = None,
    ) -> "DataProto":
        """Take the named keys out and return them; None takes nothing."""
        tensor_keys, array_keys, meta_keys = map(_as_list, (batch_keys, non_tensor_batch_keys, meta_info_keys))
        self.require(*tensor_keys, *array_keys)
        tensors = {key: self.batch.pop(key) for key in tensor_keys}
        arrays = {key: self.non_tensor_batch.pop(key) for key in array_keys}
        return type(self).from_dict(tensors, arrays, {key: self.meta_info.pop(key) for key in meta_keys})

    def rename(self, old_keys: str | Sequence[str], new_keys: str | Sequence[str]) -> "DataProto":
        """Rename tensors in place."""
        old_names, new_names = _as_list(old_keys), _as_list(new_keys)
        if len(old_names) != len(new_names):
            raise ValueError(f"rename needs as many new keys as old ones: {old_names} to {new_names}")
        # All are taken out before the first is put back, so names may be swapped.
        for name, tensor in [(new, self.pop([old]).batch[old]) for old, new in zip(old_names, new_names, strict=True)]:
            self.batch[name] = tensor
        return self

    def union(self, other: "DataProto") -> "DataProto":
        """Add the other's keys in place; a key on both sides must hold the same values (ValueError names it)."""
        tensors = _join("tensor", self._tensors(), other._tensors())
        arrays = _join("array", self.non_tensor_batch, other.non_tensor_batch)
        meta_info = _join("meta_info", self.meta_info, other.meta_info)
        _check_lengths({**tensors, **arrays})
        if other.batch is not None:
            self.batch = TensorDict(tensors, batch_size=other.batch.batch_size)  # this side may have had no tensors
        self.non_tensor_batch, self.meta_info = arrays, meta_info
        return self

    def split(self, split_size: int) -> list["DataProto"]:
        """Runs of ``split_size`` rows, the last one shorter where it has to be; memory is shared."""
        return [self.slice(start, start + split_size) for start in range(0, len(self), split_size)]

    def chunk(self, chunks: int) -> list["DataProto"]:
        """``chunks`` equal runs of rows, sharing memory; ValueError where the rows do not divide."""
        if len(self) % chunks:
            raise ValueError(f"{len(self)} rows do not divide into {chunks} chunks; see pad_dataproto_to_divisor")
        size = len(self) // chunks
        return [self.slice(part * size, (part + 1) * size) for part in range(chunks)]

    @staticmethod
    def concat(data: Sequence["DataProto"]) -> "DataProto":
        """All rows in order; ``meta_info["metrics"]`` become lists, the rest must agree (ValueError names the key)."""
        if not data:
            raise ValueError("concat needs at least one DataProto")
        keys = [part._tensors().keys() | part.non_tensor_batch.keys() for part in data]
        if odd := set().union(*keys) - keys[0].intersection(*keys):
            raise ValueError(f"concat needs the same keys in every part; not in all: {', '.join(sorted(odd))}")
        tensors = {key: torch.cat([part.batch[key] for part in data]) for key in data[0]._tensors()}
        columns = ((key, [part.non_tensor_batch[key] for part in data]) for key in data[0].non_tensor_batch)
        arrays = {key: np.concatenate(parts) for key, parts in columns}
        return type(data[0]).from_dict(tensors, arrays, merge_meta_info([part.meta_info for part in data]))

    def repeat(self, repeat_times: int = 2, interleave: bool = True) -> "DataProto":
        """Every row ``repeat_times`` times: next to each other where ``interleave``, else the batch over and over."""
        index = torch.arange(len(self))
        return self.select_idxs(index.repeat_interleave(repeat_times) if interleave else index.repeat(repeat_times))

    def reorder(self, indices: Sequence[int] | torch.Tensor) -> None:
        """Put row ``indices[i]`` at place i, in place, key by key: there are never two copies of the batch."""
        index = torch.arange(len(self))[torch.as_tensor(indices).cpu()]  # raises before anything has changed
        self.non_tensor_batch = {key: value[index.numpy()] for key, value in self.non_tensor_batch.items()}
        if self.batch is not None:
            tensors, self.batch = self._tensors(), None
            self.batch = TensorDict({key: tensors.pop(key)[index] for key in list(tensors)}, batch_size=[len(index)])

    def to(self, device: torch.device | str) -> "DataProto":
        """Move the tensors, in place."""
        if self.batch is not None:
            self.batch = self.batch.to(device)
        return self

    def save_to_disk(self, filepath: str | Path) -> None:
        """Write everything to one file, by pickle."""
        with open(filepath, "wb") as stream:
            pickle.dump(self, stream, protocol=5)

    @staticmethod
    def load_from_disk(filepath: str | Path) -> "DataProto":
        """Read a file of ``save_to_disk``. Pickle runs what it reads: only files you trust."""
        with open(filepath, "rb") as stream:
            return pickle.load(stream)


def _check_lengths(columns: Mapping[str, Any]) -> None:
    first = next(iter(columns), "")
    for key, column in columns.items():
        if len(column) != len(columns[first]):
            raise ValueError(f"{key!r} has {len(column)} rows, but {first!r} has {len(columns[first])}")


def pad_dataproto_to_divisor(data: DataProto, size_divisor: int) -> tuple[DataProto, int]:
    """Repeat rows from the front until the length divides; returns the batch and how many rows were added."""
    pad_size = -len(data) % size_divisor
    if pad_size == 0:
        return data, 0
    # Goes around more than once where there are fewer rows than are added.
    return data.select_idxs(np.arange(len(data) + pad_size) % len(data)), pad_size


def unpad_dataproto(data: DataProto, pad_size: int) -> DataProto:
    """Drop the last ``pad_size`` rows, sharing memory."""
    return data.slice(0, len(data) - pad_size) if pad_size else data
