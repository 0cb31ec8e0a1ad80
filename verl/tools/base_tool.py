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

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import OmegaConf

from verl.utils.import_utils import load_extern_type

_ENTRY_KEYS = {"class_name", "config", "tool_schema"}


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
            What the model reads, a reward for the call (measured only; None: none), and metrics of the tool's own.
        """

    async def release(self, instance_id: str, **kwargs: Any) -> None:
        """Close an instance at the end of its conversation."""
        return


def initialize_tools_from_config(tools_config_file: str | Path) -> list[BaseTool]:
    """Build the tools that the file names, in its order.

    Raises:
        ValueError: the file, an entry, a class or a schema is not what it should be; the message names it.
    """
    path = Path(tools_config_file)
    if not path.is_file():
        raise ValueError(f"multi_turn.tool_config_path={path}: there is no such file; give a YAML that names the tools")
    content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    if not isinstance(content, dict) or not isinstance(content.get("tools"), list) or not content["tools"]:
        raise ValueError(f"{path}: expected a list of tools under the key 'tools'")
    tools = [_build(entry, f"{path}: tools[{number}]") for number, entry in enumerate(content["tools"])]
    names = [tool.name for tool in tools]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{path}: several tools are called {', '.join(repeated)}; every tool needs a name of its own")
    return tools


def _build(entry: Any, where: str) -> BaseTool:
    if not isinstance(entry, dict) or not isinstance(entry.get("class_name"), str):
        raise ValueError(f"{where}: expected a mapping with class_name, config and tool_schema, not {entry!r}")
    unknown = sorted(set(entry) - _ENTRY_KEYS)
    if unknown:
        raise ValueError(f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_ENTRY_KEYS))}")
    where += f": class_name={entry['class_name']}"
    module_name, _, name = entry["class_name"].rpartition(".")
    if not module_name:
        raise ValueError(f"{where} names no module; give module.Class")
    try:
        tool_class = load_extern_type(module_name, name)
    except ValueError as error:
        raise ValueError(f"{where} cannot be loaded: {error}") from error
    if not (isinstance(tool_class, type) and issubclass(tool_class, BaseTool)):
        raise ValueError(f"{where} is no subclass of verl.tools.base_tool.BaseTool")
    return tool_class(entry.get("config") or {}, entry.get("tool_schema"))
