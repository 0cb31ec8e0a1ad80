"""What is read out of one row before any token is counted.

In: cells of a row. Out: ``PromptRow``, and cells as mappings or text. Which columns hold what is the data set's
business.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.utils.dataset.onerec_messages import BadRowError, Message
from verl.utils.dataset.parquet_files import Row

LOOPS_WITHOUT_TOOLS = ("single_turn_agent",)
"""Values of ``agent_name`` whose prompts list no tools, whatever tools there are."""


@dataclass
class PromptRow:
    """What a data set reads out of one row; errors of ``tools_kwargs`` are those of ``mapping_of``."""

    messages: list[Message]
    ground_truth: Any = None
    style: str = "rule"
    extra_info: dict[str, Any] = field(default_factory=dict)

    @property
    def tools_kwargs(self) -> dict[str, Any]:
        """Options of the row's tools, by tool name."""
        return mapping_of(self.extra_info.get("tools_kwargs"), "tools_kwargs")


def mapping_of(value: Any, column: str) -> dict[str, Any]:
    """A cell that should hold a mapping: a struct, JSON text of an object, or nothing.

    Raises:
        BadRowError: with reason ``unreadable_<column>``.
    """
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRowError(f"unreadable_{column}", f"{column} is a text that is no JSON: {error}") from error
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise BadRowError(f"unreadable_{column}", f"{column} is a {type(value).__name__}, not a mapping")
    return dict(value)


def lists_tools(row: Row) -> bool:
    """Whether the row's agent loop lists the tools in the prompt; rows that name no loop count as if it did."""
    return row.get("agent_name") not in LOOPS_WITHOUT_TOOLS


def text_of(cell: Any) -> str:
    """A cell for people to read: a text as it is, bytes decoded as far as they go, nothing as an empty text."""
    if cell is None:
        return ""
    return cell.decode("utf-8", errors="backslashreplace") if isinstance(cell, bytes) else str(cell)
