"""Prompts: files, lengths, filters, and rehearsal prompts made of random items (``data``)."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from verl.config.schema import Count, Fraction, NullIsEmpty, Options, Texts, section

PLACEHOLDERS = ("{history}", "{item}")
TEMPLATE_ARGUMENTS = ("conversation", "tools", "add_generation_prompt", "tokenize", "return_dict")
"""Arguments of ``apply_chat_template`` that the code sets itself."""

FiniteWeight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@section()
class CustomClassConfig:
    """A class of the user's own, loaded by path."""

    path: str | None = None
    """Python file; null: the built-in data set class, or no reward function."""
    name: str | None = None
    """Name of the class or function in it."""


@section()
class PromptTemplateConfig:
    """One family of recommendation prompts."""

    user: str = ""
    """The user's turn. Every ``{item}`` in it becomes an item, every ``{history}`` several, drawn anew each time."""
    system: str | None = None
    """The turn before it, as it is; null: none."""


@section("data.synthetic_item_prompts")
class SyntheticItemPromptsConfig:
    """Prompts made of random items, scored by the student as it was (``algorithm.distill.teachers``)."""

    count: Annotated[int, Field(ge=0)] = 0
    """Prompts that join the training data; 0: none."""
    catalogue: str | None = None
    """Parquet file with a column ``sid``, a list of codes per item, to draw items from; null: any codes that the
    tokenizer has tokens for."""
    templates: Annotated[dict[str, PromptTemplateConfig], NullIsEmpty] = field(default_factory=dict)
    """By name, used in turn. Rehearsal protects only what it rehearses: one for each family of prompts that the student
    knows, in the words that it knows."""
    min_history: Count = 5
    """Fewest items of a history."""
    max_history: int = 20
    """Most items of a history."""
    source: str = "synthetic_rec"
    """The rows of a template have this source, an underscore and the template's name."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        key = "data.synthetic_item_prompts"
        if self.min_history > self.max_history:
            raise ValueError(f"{key}.min_history={self.min_history} is above max_history={self.max_history}; swap them")
        if self.count and not self.templates:
            raise ValueError(f"{key}.count={self.count} needs {key}.templates, like {{next: {{user: '{{history}}'}}}}")
        for name, template in self.templates.items():
            if not any(placeholder in template.user for placeholder in PLACEHOLDERS):
                raise ValueError(
                    f"{key}.templates.{name}.user={template.user!r} holds neither {{history}} nor {{item}}"
                )

    def source_of(self, template: str) -> str:
        """Source of the rows of a template."""
        return f"{self.source}_{template}"

    @property
    def sources(self) -> list[str]:
        """Sources of all rows."""
        return [self.source_of(name) for name in self.templates]


@section("data")
class DataConfig:
    """Where prompts come from and which of them are used."""

    train_files: Texts | None = None
    """Parquet file, folder, glob, or a list of these. Required."""
    val_files: Texts | None = None
    """The same for validation; null: no validation."""
    prompt_key: str = "prompt"
    """Column of the prompt, for data that is already a list of messages."""
    data_source_key: str = "source"
    """Column that names a row's source: the unit of per-source metrics."""
    reward_fn_key: str = "source"
    """Column passed to the reward function as ``data_source``."""
    max_prompt_length: Count = 512
    """Most tokens of a prompt, chat template included."""
    max_response_length: Count = 512
    """Most tokens of a response, over all turns."""
    train_batch_size: Count = 1024
    """Prompts per step."""
    val_batch_size: Count | None = None
    """Prompts per validation batch; null: all at once."""
    shuffle: bool = True
    """New order every epoch."""
    seed: Annotated[int, Field(ge=0), BeforeValidator(lambda seed: 1 if seed is None else seed)] = 1
    """Seed of the order and of the think draws."""
    filter_overlong_prompts: bool = False
    """Leave out prompts above ``max_prompt_length`` (counted and recorded)."""
    truncation: Literal["error", "left", "right", "middle"] = "error"
    """What happens to a prompt above the limit: an error, or which part of it is cut off."""
    enable_think: bool = False
    """Append a think switch to the last user turn."""
    think_mode: Literal["auto", "force_think", "force_nothink"] = "auto"
    """Which switch; ``auto`` draws one, or none, for each row."""
    prompt_extend_tokens: Literal["drop", "replace", "error"] = "drop"
    """Prompts that hold extended tokens: ``drop`` (counted), ``replace`` (for the teacher only) or ``error``."""
    on_bad_row: Literal["drop", "error"] = "drop"
    """Rows that cannot be used: ``drop`` (counted and recorded) or ``error``."""
    source_weights: Annotated[dict[str, FiniteWeight], NullIsEmpty] = field(default_factory=dict)
    """Share of each group of sources in every batch, by shell pattern, of which the first that fits counts
    (``{rec_*: 0.25, *: 0.75}``); empty: as the files have them. To leave rows out, leave out their file."""
    synthetic_item_prompts: SyntheticItemPromptsConfig = field(default_factory=SyntheticItemPromptsConfig)
    max_dropped_fraction: Fraction = 0.5
    """Largest share of the rows read that may be dropped, for whatever reason; above it the run stops."""
    cache_dir: str = "~/.cache/kai-verl"
    """Folder of memory-mapped copies of the data and of what was found out about its rows, shared by all runs."""
    train_max_samples: int = -1
    """Use only the first rows; -1: all."""
    val_max_samples: int = -1
    """The same for validation."""
    dataloader_num_workers: int = 0
    """Processes that prepare rows."""
    apply_chat_template_kwargs: Options = field(default_factory=dict)
    """Options of the chat template, such as ``enable_thinking``."""
    custom_cls: CustomClassConfig = field(default_factory=CustomClassConfig)

    def __post_init__(self) -> None:
        if taken := {*TEMPLATE_ARGUMENTS} & {*self.apply_chat_template_kwargs}:
            raise ValueError(
                f"data.apply_chat_template_kwargs.{taken.pop()} is set by the agent loops; leave it out (tools: "
                "actor_rollout_ref.rollout.multi_turn.tool_config_path)"
            )
        if self.synthetic_item_prompts.count and self.custom_cls.path is not None:
            raise ValueError(
                f"data.synthetic_item_prompts.count={self.synthetic_item_prompts.count} makes files of this project's "
                f"layouts, which data.custom_cls.path={self.custom_cls.path} need not read; write one with python -m "
                "recipe.onpolicy_distill.synthetic_item_prompts, name it in data.train_files, and set count to 0"
            )
