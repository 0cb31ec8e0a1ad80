"""Which data set class reads which files.

In: the ``data`` settings and the files. Out: a data set of the user's class where one is named, else of the class
that the files' columns call for.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from verl.utils.dataset.onerec_dataset import OneRecDataset
from verl.utils.dataset.parquet_files import column_names, expand_data_files
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.import_utils import load_extern_type

if TYPE_CHECKING:
    from verl.config import DataConfig


def get_dataset_class(data_files: str | Path | Sequence[str | Path], config: "DataConfig") -> type[RLHFDataset]:
    """``data.custom_cls`` where it is set; ``RLHFDataset`` for files with the prompt column; else ``OneRecDataset``.

    Raises ValueError where the custom class cannot be loaded or does not extend ``RLHFDataset``, whose arguments and
    ``set_epoch`` the trainer relies on.
    """
    custom = config.custom_cls
    if custom.path is not None:
        if custom.name is None:
            raise ValueError(f"data.custom_cls.path={custom.path!r} needs data.custom_cls.name, the class in it")
        chosen = load_extern_type(custom.path, custom.name)
        if not (isinstance(chosen, type) and issubclass(chosen, RLHFDataset)):
            raise ValueError(
                f"data.custom_cls.name={custom.name!r} in {custom.path} is no class that extends "
                "verl.utils.dataset.rl_dataset.RLHFDataset"
            )
        return chosen
    has_prompts = config.prompt_key in column_names(expand_data_files(data_files))
    return RLHFDataset if has_prompts else OneRecDataset


def create_rl_dataset(
    data_files: str | Path | Sequence[str | Path],
    tokenizer: PreTrainedTokenizerBase,
    config: "DataConfig",
    *,
    extend_vocab_start_token: int | None = None,
    extended_sources: Sequence[str] = (),
    dropped_rows_path: str | Path | None = None,
    max_samples: int = -1,
    tool_schemas: list[dict[str, Any]] | None = None,
) -> RLHFDataset:
    """Build the data set of ``get_dataset_class``; arguments and errors as in ``RLHFDataset``."""
    dataset_class = get_dataset_class(data_files, config)
    options = {}
    if extended_sources:
        _require_argument(dataset_class, "extended_sources")
        options["extended_sources"] = extended_sources
    return dataset_class(
        data_files,
        tokenizer,
        config,
        extend_vocab_start_token=extend_vocab_start_token,
        dropped_rows_path=dropped_rows_path,
        max_samples=max_samples,
        tool_schemas=tool_schemas,
        **options,
    )


def _require_argument(dataset_class: type[RLHFDataset], name: str) -> None:
    """Raise ValueError where a class of the user's own, written before there was this argument, does not take it."""
    parameters = inspect.signature(dataset_class).parameters
    if name not in parameters and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"data.custom_cls.name={dataset_class.__name__!r} takes no argument {name!r}, through which it would learn "
            "which prompts algorithm.distill.teachers can read; let its __init__ take **kwargs and hand them on"
        )
