"""What a tool is described by and what it answers: function schemas in OpenAI's form, under verl's names.

Keys that a class does not name (``items`` of an array, ``default``, ...) are kept, for the model has to read them.
"""

from typing import Any

from pydantic import BaseModel, Field


class _Schema(BaseModel, extra="allow"):
    pass


class OpenAIFunctionPropertySchema(_Schema):
    """One parameter; without a type where it is a choice of several (``anyOf``)."""

    type: str | list[str] | None = None
    description: str | None = None
    enum: list[Any] | None = None


class OpenAIFunctionParametersSchema(_Schema):
    """The parameters of a function."""

    type: str
    properties: dict[str, OpenAIFunctionPropertySchema]
    required: list[str] = Field(default_factory=list)


class OpenAIFunctionSchema(_Schema):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: OpenAIFunctionParametersSchema | None = None
    strict: bool = False


class OpenAIFunctionToolSchema(_Schema):
    """A tool as the model reads it."""

    type: str
    function: OpenAIFunctionSchema


class ToolResponse(BaseModel, extra="forbid"):
    """What the model reads after a call: text alone."""

    text: str | None = None


def schema_dict(schema: OpenAIFunctionToolSchema | dict[str, Any]) -> dict[str, Any]:
    """A tool's schema in the form that chat templates take, with the keys that were given and no others."""
    return schema.model_dump(exclude_unset=True, exclude_none=True) if isinstance(schema, BaseModel) else schema
