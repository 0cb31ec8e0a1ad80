"""Tools that a YAML of the registry's tests names."""

from typing import Any

from verl.tools.base_tool import BaseTool, ToolResponse


class EchoTool(BaseTool):
    """Answers with its parameters."""

    async def execute(self, instance_id: str, parameters: dict[str, Any], **kwargs: Any):
        return ToolResponse(text=f"{self.config.get('prefix', '')}{parameters}"), None, {}


class OwnSchemaTool(EchoTool):
    """Brings its schema along."""

    def get_openai_tool_schema(self) -> dict[str, Any]:
        return {"type": "function", "function": {"name": "own", "parameters": {"type": "object", "properties": {}}}}


class NoTool:
    """Not a tool."""
