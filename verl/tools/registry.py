"""Tools by name, from a YAML file::

    tools:
      - class_name: my_package.my_tools.Calculator     # a BaseTool subclass by dotted path
        config: {precision: 6}                         # passed to the class
        tool_schema:                                   # what the model reads; may be left out where the class has it
          type: function
          function: {name: calculator, description: ..., parameters: {type: object, properties: {...}}}

A YAML path in; built tools out. Nothing is called here.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from verl.tools.base_tool import BaseTool
from verl.utils.import_utils import load_extern_type

_ENTRY_KEYS = {"class_name", "config", "tool_schema"}


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
    tool_class = _load_class(entry["class_name"], where)
    return tool_class(entry.get("config") or {}, entry.get("tool_schema"))


def _load_class(dotted_path: str, where: str) -> type[BaseTool]:
    module_name, _, name = dotted_path.rpartition(".")
    if not module_name:
        raise ValueError(f"{where}: class_name={dotted_path} names no module; give module.Class")
    try:
        found = load_extern_type(module_name, name)
    except ValueError as error:
        raise ValueError(f"{where}: class_name={dotted_path} cannot be loaded: {error}") from error
    if not (isinstance(found, type) and issubclass(found, BaseTool)):
        raise ValueError(f"{where}: class_name={dotted_path} is no subclass of verl.tools.base_tool.BaseTool")
    return found
