"""What a tool is: a function that the model may call, with a schema that the model reads.

A tool is built once per agent-loop worker. Every conversation that calls it gets an instance id from ``create``, passes
it to each ``execute``, and gives it back with ``release``; state of a conversation belongs under that id.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any
from uuid import uuid4


@dataclass(frozen=True)
class ToolResponse:
    """What the model reads after a call."""

    text: str | None = None


class BaseTool(ABC):
    """A tool by subclass: override ``execute``; ``create`` and ``release`` where there is state to keep."""

    def __init__(self, config: dict[str, Any], tool_schema: dict[str, Any] | None) -> None:
        """
        Args:
            config: the tool's own options, ``config`` in the YAML.
            tool_schema: OpenAI function schema, ``{"type": "function", "function": {"name": ..., ...}}``; None: the
                class gives it itself by overriding ``get_openai_tool_schema``.

        Raises:
            ValueError: the schema names no function.
        """
        self.config = config
        self.tool_schema = tool_schema if tool_schema is not None else self.get_openai_tool_schema()
        function = self.tool_schema.get("function")
        if self.tool_schema.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
            raise ValueError(
                f"tool_schema of {type(self).__name__} is {self.tool_schema}; it must look like "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
            )
        self.name: str = function["name"]

    def get_openai_tool_schema(self) -> dict[str, Any]:
        """The schema as the model sees it."""
        if not hasattr(self, "tool_schema"):
            raise ValueError(f"{type(self).__name__} has no tool_schema: give one in the YAML, or override this method")
        return copy.deepcopy(self.tool_schema)

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        """Open an instance for one conversation; ``kwargs`` are the row's ``tools_kwargs[name]["create_kwargs"]``."""
        return instance_id or uuid4().hex, ToolResponse()

    @abstractmethod
    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """Run one call; several of one conversation may run at once.

        What it raises is shown to the model as the call's answer.

        Returns:
            What the model reads, a reward for the call (measured only; None: none), and figures of the tool's own.
        """

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Close an instance at the end of its conversation."""
        return
