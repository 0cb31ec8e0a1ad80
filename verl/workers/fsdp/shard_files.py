"""``shards/`` on the disk: torch's distributed checkpoints, written with clear errors and read without running code.

In:  a folder. Out: a writer and a reader for ``torch.distributed.checkpoint``, and the description of what lies there.
Tensors are read with ``weights_only`` by torch itself; its description of them is a pickle, of which only the classes
that it is made of are let in. What torch stores beside tensors it would unpickle whole: descriptions that name such
entries are refused. Not here: what is saved, and when.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

DESCRIPTION = ".metadata"
_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},  # Python 3.13
}


class ShardWriter(dcp.FileSystemWriter):
    """Says why it could not write: torch's archives report a full disk as an unexpected position."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """As the base class does, with the system's own error where writing failed."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            first = error.__context__
            while first is not None and not isinstance(first, OSError):
                first = first.__context__
            if first is None:
                raise
            raise first from None


class ShardReader(dcp.FileSystemReader):
    """Reads the description of the shards without running what else a pickle may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description.

        Raises:
            ValueError: it is damaged, or holds what no description is made of.
        """
        path = Path(self.path) / DESCRIPTION
        try:
            metadata = _DescriptionUnpickler(io.BytesIO(path.read_bytes())).load()
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"{path} is no description of shards: {error}") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def read_shards(tensors: dict[str, torch.Tensor], shards: Path, *, no_dist: bool = False) -> None:
    """Fill tensors, by key, with what the shards hold of them; without ``no_dist`` all ranks together.

    Raises:
        ValueError: a shard cannot be read; every rank raises it.
    """
    try:
        dcp.load(tensors, storage_reader=ShardReader(shards), no_dist=no_dist)
    except CheckpointException as error:  # no Exception, which callers of theirs and Ray would let through
        raise ValueError(f"{shards} cannot be read ({cause_of(error)}); take an earlier checkpoint") from error


def cause_of(error: BaseException) -> str:
    """An error in one line; of one that all ranks raise together, what first went wrong."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items())
        return f"{type(error).__name__} on rank {rank}: {_first_line(error)}"
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


class _DescriptionUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _CLASSES.get(module_name, ()):
            raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, which is not read")
        return super().find_class(module_name, global_name)


def stored_tensors(shards: Path) -> dict[str, TensorStorageMetadata]:
    """The tensors in ``shards/`` by key.

    Raises:
        ValueError: there is no such folder, or its writing was not finished.
    """
    if not (shards / DESCRIPTION).is_file():
        raise ValueError(f"{shards.parent} holds no whole {shards.name}/; choose another checkpoint")
    entries = ShardReader(shards).read_metadata().state_dict_metadata
    return {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
