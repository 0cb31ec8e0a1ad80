"""Rehearsal prompts without recommendation data (``data.synthetic_item_prompts``)."""

from dataclasses import dataclass, field

PLACEHOLDERS = ("{history}", "{item}")


@dataclass
class PromptTemplateConfig:
    """One family of recommendation prompts."""

    user: str = ""
    """The user's turn. Every ``{item}`` in it becomes an item, every ``{history}`` several, drawn anew each time."""
    system: str | None = None
    """The turn before it, as it is; null: none."""


@dataclass
class SyntheticItemPromptsConfig:
    """Prompts made of random items, for the student as it was to judge (``algorithm.distill.teachers``)."""

    count: int = 0
    """Prompts that join the training data; 0: none."""
    catalogue: str | None = None
    """Parquet file with a column ``sid``, a list of codes per item, to draw items from; null: any codes that the
    tokenizer has tokens for."""
    templates: dict[str, PromptTemplateConfig] = field(default_factory=dict)
    """By name, used in turn. Rehearsal protects only what it rehearses: one for each family of prompts that the student
    knows, in the words that it knows."""
    min_history: int = 5
    """Fewest items of a history."""
    max_history: int = 20
    """Most items of a history."""
    source: str = "synthetic_rec"
    """The rows of a template have this source, an underscore and the template's name."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        key = "data.synthetic_item_prompts"
        if self.count < 0:
            raise ValueError(f"{key}.count={self.count} must not be negative")
        if not 1 <= self.min_history <= self.max_history:
            raise ValueError(
                f"{key}.min_history={self.min_history} must lie between 1 and {key}.max_history={self.max_history}"
            )
        if self.count and not self.templates:
            raise ValueError(
                f"{key}.count={self.count} needs {key}.templates, such as "
                "{next: {user: 'history: {history}'}, caption: {user: 'caption: {item}'}}"
            )
        for name, template in self.templates.items():
            if not any(placeholder in template.user for placeholder in PLACEHOLDERS):
                raise ValueError(
                    f"{key}.templates.{name}.user={template.user!r} holds neither {' nor '.join(PLACEHOLDERS)}, where "
                    "items would stand"
                )

    def source_of(self, template: str) -> str:
        """Source of the rows of a template."""
        return f"{self.source}_{template}"

    @property
    def sources(self) -> list[str]:
        """Sources of all rows."""
        return [self.source_of(name) for name in self.templates]
