"""What a tool is: a function that the model may call, with a schema that the model reads.

A tool is built once per agent-loop worker. Every conversation that calls it gets an instance id from ``create``, passes
it to each ``execute``, and gives it back with ``release``; state of a conversation belongs under that id.

``initialize_tools_from_config`` builds the tools that a YAML file names, and calls none::

    tools:
      - class_name: my_package.my_tools.Calculator     # a BaseTool subclass by dotted path
        config: {precision: 6}                         # passed to the class
        tool_schema:                                   # what the model reads; may be left out where the class has it
          type: function
          function: {name: calculator, description: ..., parameters: {type: object, properties: {...}}}
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf
from pydantic import BaseModel

from verl.tools.schemas import OpenAIFunctionToolSchema, ToolResponse, schema_dict
from verl.utils.import_utils import load_extern_type


class BaseTool(ABC):
    """A tool by subclass: override ``execute``; ``create`` and ``release`` where there is state to keep."""

    def __init__(self, config: dict[str, Any], tool_schema: OpenAIFunctionToolSchema | dict[str, Any] | None) -> None:
        """
        Args:
            config: the tool's own options, ``config`` in the YAML.
            tool_schema: OpenAI function schema, an object or ``{"type": "function", "function": {"name": ..., ...}}``;
                None: the class gives it itself by overriding ``get_openai_tool_schema``.

        Raises:
            ValueError: the schema names no function.
        """
        self.config = config
        self.tool_schema: Any = tool_schema
        if tool_schema is None:
            self.tool_schema = self.get_openai_tool_schema()
        try:
            self.name: str = schema_dict(self.tool_schema)["function"]["name"]
        except (KeyError, TypeError) as error:
            form = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
            raise ValueError(f"{type(self).__name__}: tool_schema={self.tool_schema} must look like {form}") from error

    def get_openai_tool_schema(self) -> OpenAIFunctionToolSchema | dict[str, Any]:
        """The schema that the model reads."""
        return self.tool_schema

    async def create(self, instance_id: str | None = None, **kwargs: Any) -> tuple[str, ToolResponse]:
        """Open an instance for one conversation.

        The row's ``tools_kwargs[name]["create_kwargs"]`` come as keywords where they are named or ``**kwargs`` takes
        them, and as one mapping ``create_kwargs`` where that is named or ``**kwargs`` takes it.
        """
        return instance_id or uuid4().hex, ToolResponse()

    @abstractmethod
    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """Run one call; several of one conversation may run at once.

        What it raises is shown to the model as the call's answer.

        Returns:
            What the model reads, a reward for the call (measured only; None: none), and metrics of the tool's own.
        """

    async def calc_reward(self, instance_id: str, **kwargs: Any) -> float:
        """The reward of an instance so far, for tools that call it from ``execute``; nothing else does."""
        return 0.0

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Close an instance at the end of its conversation."""
        return


class _Entry(BaseModel, extra="forbid"):
    class_name: str
    config: dict[str, Any] | None = None
    tool_schema: OpenAIFunctionToolSchema | None = None


class _ToolsFile(BaseModel):
    tools: list[_Entry]


def initialize_tools_from_config(tools_config_file: str | Path) -> list[BaseTool]:
    """Build the tools that the file names, in its order.

    Raises:
        ValueError: the file, an entry, a class or a schema is not what it should be; the message names it.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.load(tools_config_file), resolve=True)
        entries = _ToolsFile.model_validate(content).tools
        return [_load_class(entry.class_name)(entry.config or {}, entry.tool_schema) for entry in entries]
    except (OSError, ValueError) as error:
        raise ValueError(f"multi_turn.tool_config_path={tools_config_file}: {error}") from error


def _load_class(class_name: str) -> type[BaseTool]:
    module_name, _, name = class_name.rpartition(".")
    tool_class = load_extern_type(module_name, name) if module_name else None
    if not (isinstance(tool_class, type) and issubclass(tool_class, BaseTool)):
        raise ValueError(f"class_name={class_name} is no module.Class of a verl.tools.base_tool.BaseTool")
    return tool_class
