"""Prompts: files, lengths, filters (``data``)."""

import math
from dataclasses import dataclass, field
from typing import Any

from verl.config.synthetic_items import SyntheticItemPromptsConfig

TEMPLATE_ARGUMENTS = ("conversation", "tools", "add_generation_prompt", "tokenize", "return_dict")
"""Arguments of ``apply_chat_template`` that the code sets itself."""


@dataclass
class CustomClassConfig:
    """A class of the user's own, loaded by path."""

    path: str | None = None
    """Python file; null: the built-in one."""
    name: str | None = None
    """Name of the class or function in it."""


@dataclass
class DataConfig:
    """Where prompts come from and which of them are used."""

    train_files: str | list[str] | None = None
    """Parquet file, folder, glob, or a list of these. Required."""
    val_files: str | list[str] | None = None
    """The same for validation; null: no validation."""
    prompt_key: str = "prompt"
    """Column of the prompt, for data that is already a list of messages."""
    data_source_key: str = "source"
    """Column that names a row's source: the unit of per-source metrics."""
    reward_fn_key: str = "source"
    """Column passed to the reward function as ``data_source``."""
    max_prompt_length: int = 512
    """Most tokens of a prompt, chat template included."""
    max_response_length: int = 512
    """Most tokens of a response, over all turns."""
    train_batch_size: int = 1024
    """Prompts per step."""
    val_batch_size: int | None = None
    """Prompts per validation batch; null: all at once."""
    shuffle: bool = True
    """New order every epoch."""
    seed: int = 1
    """Seed of the order and of the think draws."""
    filter_overlong_prompts: bool = False
    """Leave out prompts above ``max_prompt_length`` (counted and recorded)."""
    truncation: str = "error"
    """What happens to a prompt above the limit: ``error``, ``left``, ``right`` or ``middle``."""
    return_raw_chat: bool = True
    """Keep the messages; agent loops need them, so False is refused."""
    enable_think: bool = False
    """Append a think switch to the last user turn."""
    think_mode: str = "auto"
    """``auto`` (drawn), ``force_think`` or ``force_nothink``."""
    prompt_extend_tokens: str = "drop"
    """Prompts that hold extended tokens: ``drop`` (counted), ``replace`` (for the teacher only) or ``error``."""
    on_bad_row: str = "drop"
    """Rows that cannot be used: ``drop`` (counted and recorded) or ``error``."""
    source_weights: dict[str, float] = field(default_factory=dict)
    """Share of each group of sources in every batch, by shell pattern, of which the first that fits counts
    (``{rec_*: 0.25, *: 0.75}``); empty: as the files have them."""
    synthetic_item_prompts: SyntheticItemPromptsConfig = field(default_factory=SyntheticItemPromptsConfig)
    max_dropped_fraction: float = 0.5
    """Largest share of the rows read that may be dropped, for whatever reason; above it the run stops."""
    cache_dir: str = "~/.cache/kai-verl"
    """Folder of memory-mapped copies of the data and of what was found out about its rows, shared by all runs."""
    train_max_samples: int = -1
    """Use only the first rows; -1: all."""
    val_max_samples: int = -1
    """The same for validation."""
    dataloader_num_workers: int = 0
    """Processes that prepare rows."""
    apply_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Options of the chat template, such as ``enable_thinking``."""
    custom_cls: CustomClassConfig = field(default_factory=CustomClassConfig)

    def __post_init__(self) -> None:
        choices = {
            "truncation": ("error", "left", "right", "middle"),
            "think_mode": ("auto", "force_think", "force_nothink"),
            "prompt_extend_tokens": ("drop", "replace", "error"),
            "on_bad_row": ("drop", "error"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name}={getattr(self, name)!r} is not one of {', '.join(allowed)}")
        least = {"max_prompt_length": 1, "max_response_length": 1, "train_batch_size": 1, "seed": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least {bound}")
        if self.val_batch_size is not None and self.val_batch_size < 1:
            raise ValueError(f"data.val_batch_size={self.val_batch_size} must be at least 1, or null for one batch")
        if not 0 <= self.max_dropped_fraction <= 1:
            raise ValueError(f"data.max_dropped_fraction={self.max_dropped_fraction} is no share from 0 to 1")
        for name in TEMPLATE_ARGUMENTS:
            if name in self.apply_chat_template_kwargs:
                raise ValueError(
                    f"data.apply_chat_template_kwargs.{name}={self.apply_chat_template_kwargs[name]!r} is set by the "
                    "agent loops; leave it out (tools: actor_rollout_ref.rollout.multi_turn.tool_config_path)"
                )
        self._check_source_weights()
        self._check_synthetic_prompts()
        if not self.return_raw_chat:
            raise ValueError("data.return_raw_chat=False: agent loops need the messages; set it to True")

    def _check_source_weights(self) -> None:
        for pattern, weight in self.source_weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(
                    f"data.source_weights.{pattern}={weight} must be a number above 0; leave rows out by leaving out "
                    "their file"
                )

    def _check_synthetic_prompts(self) -> None:
        if self.synthetic_item_prompts.count and self.custom_cls.path is not None:
            raise ValueError(
                f"data.synthetic_item_prompts.count={self.synthetic_item_prompts.count} makes files of this project's "
                f"layouts, which data.custom_cls.path={self.custom_cls.path} need not read; write one with python -m "
                "recipe.onpolicy_distill.synthetic_item_prompts, name it in data.train_files, and set count to 0"
            )
