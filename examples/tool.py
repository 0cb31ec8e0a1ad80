"""A tool that the model may call: a calculator. tool.yaml beside it names it and says what the model reads about it.

    python -m examples.tiny actor_rollout_ref.rollout.multi_turn.tool_config_path=examples/tool.yaml

The model calls it with {"expression": "2 * (3 + 4)"}. What the tool answers is read by the model and never trained on,
and so is an error that it raises; agent_loop/tool_errors counts these.
"""

import ast
import operator
from collections.abc import Callable
from typing import Any

from verl.tools.base_tool import BaseTool
from verl.tools.schemas import ToolResponse

OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def value_of(node: ast.AST) -> float:
    """The value of a parsed expression. Nothing of the model's text is run: other syntax raises ValueError."""
    match node:
        case ast.Expression(body=inner):
            return value_of(inner)
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -value_of(inner)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](value_of(left), value_of(right))
    raise ValueError("an expression has numbers, brackets and + - * / alone")


class Calculator(BaseTool):
    """One object serves all conversations of a process; state of a conversation belongs under its ``instance_id``."""

    async def execute(
        self, instance_id: str, parameters: dict[str, Any], **kwargs: Any
    ) -> tuple[ToolResponse, float | None, dict[str, Any]]:
        """What the model reads, a reward (measured only; None: none), and metrics."""
        value = value_of(ast.parse(str(parameters["expression"]).strip(), mode="eval"))
        return ToolResponse(text=f"{value:.{self.config['digits']}g}"), None, {}
