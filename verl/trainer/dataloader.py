"""From parquet files to batches of prompts.

In: ``DataConfig`` and a tokenizer. Out: data sets, and loaders whose position can be saved and restored.
Tokenises nothing itself: chat templates are applied by the data set (to count) and by the agent loops (to generate).
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import RandomSampler
from transformers import PreTrainedTokenizerBase

from verl.trainer.config import DataConfig
from verl.utils.dataset.factory import create_rl_dataset
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

# torchdata calls what torch has deprecated; nothing a user of either could do about it.
warnings.filterwarnings("ignore", message="'set_vital' is deprecated", category=UserWarning)


def build_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    extend_vocab_start_token: int | None = None,
    bad_rows_folder: str | Path,
    tool_schemas: list[dict[str, Any]] | None = None,
) -> tuple[RLHFDataset, RLHFDataset | None]:
    """Read the training prompts and, where ``data.val_files`` is set, the validation prompts.

    Args:
        bad_rows_folder: receives ``bad_rows_train.jsonl`` and ``bad_rows_val.jsonl``, a line per row left out.
        tool_schemas: OpenAI function schemas of the run's tools, which count towards a prompt's length.

    Raises:
        ValueError: files that cannot be read, or hold no usable prompt.
    """

    def build(part: str, files: Any, max_samples: int) -> RLHFDataset:
        return create_rl_dataset(
            files,
            tokenizer,
            config,
            extend_vocab_start_token=extend_vocab_start_token,
            bad_rows_path=Path(bad_rows_folder) / f"bad_rows_{part}.jsonl",
            max_samples=max_samples,
            tool_schemas=tool_schemas,
        )

    train = build("train", config.train_files, config.train_max_samples)
    return train, build("val", config.val_files, config.val_max_samples) if config.val_files else None


def build_train_loader(dataset: RLHFDataset, config: DataConfig) -> StatefulDataLoader:
    """Whole batches of ``data.train_batch_size`` prompts, in a new order every epoch where ``data.shuffle``.

    Raises:
        ValueError: fewer usable prompts than one batch.
    """
    if len(dataset) < config.train_batch_size:
        raise ValueError(
            f"data.train_batch_size={config.train_batch_size} is more than the {len(dataset)} usable prompts of "
            f"data.train_files={config.train_files}; lower it, or see the data summary for dropped rows"
        )
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(config.seed)) if config.shuffle else None
    return StatefulDataLoader(
        dataset,
        batch_size=config.train_batch_size,
        sampler=sampler,
        num_workers=config.dataloader_num_workers,
        drop_last=True,
        collate_fn=collate_fn,
    )


def build_val_loader(dataset: RLHFDataset, config: DataConfig) -> StatefulDataLoader:
    """All validation prompts in file order, the last batch as short as it comes."""
    return StatefulDataLoader(
        dataset,
        batch_size=config.val_batch_size or len(dataset),
        num_workers=config.dataloader_num_workers,
        drop_last=False,
        collate_fn=collate_fn,
    )
