"""verl's decorator of traced calls, which its tools carry: nothing is traced here, and they run as they are."""

from typing import TypeVar

Function = TypeVar("Function")


def rollout_trace_op(function: Function) -> Function:
    """The function itself."""
    return function
