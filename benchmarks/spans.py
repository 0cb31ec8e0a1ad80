"""When each process of a run was at work: all of them load this file, as ``actor_rollout_ref.model.external_lib``.

Calls of the ranks, of the engines and of agent-loop workers, and the driver's steps, are written as they end, a JSON
line each, to a file per process in the folder that ``VERL_SPANS`` names. `read_spans` puts them together.
"""

import functools
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "VERL_SPANS"


class Span(NamedTuple):
    """One call. Processes of a machine share the clock of its begin and end; CPU seconds are its process's so far."""

    name: str
    process: int
    begin: float
    end: float
    cpu_begin: float
    cpu_end: float


def read_spans(folder: Path) -> list[Span]:
    """All calls of all processes, by their begin."""
    lines = [line for path in folder.glob("spans-*.jsonl") for line in path.read_text(encoding="utf-8").splitlines()]
    return sorted((Span(*json.loads(line)) for line in lines), key=lambda span: span.begin)


def seconds_covered(spans: Iterable[Span]) -> float:
    """Seconds in which at least one of them, by their begin, was under way."""
    covered, until = 0.0, 0.0
    for span in spans:
        covered += max(0.0, span.end - max(span.begin, until))
        until = max(until, span.end)
    return covered


def cpu_seconds(spans: Iterable[Span]) -> float:
    """CPU seconds of all processes, each from its first call's begin to its last one's end."""
    of_process: dict[int, tuple[float, float]] = {}
    for span in spans:
        first, last = of_process.get(span.process, (span.cpu_begin, span.cpu_end))
        of_process[span.process] = min(first, span.cpu_begin), max(last, span.cpu_end)
    return sum(last - first for first, last in of_process.values())


def _recorded(function: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
    """``function``, async or not, that writes a span of each call."""

    def write(begin: float, cpu_begin: float, arguments: tuple[Any, ...]) -> None:
        span = Span(name_of(*arguments), os.getpid(), begin, time.monotonic(), cpu_begin, time.process_time())
        with open(f"{os.environ[FOLDER]}/spans-{os.getpid()}.jsonl", "a", encoding="utf-8") as stream:
            stream.write(json.dumps(span) + "\n")

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic(), time.process_time()
        try:
            return function(*args, **kwargs)
        finally:
            write(*begin, args)

    async def call_async(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic(), time.process_time()
        try:
            return await function(*args, **kwargs)
        finally:
            write(*begin, args)

    return functools.wraps(function)(call_async if inspect.iscoroutinefunction(function) else call)


def _record() -> None:
    from verl.experimental.agent_loop.worker import AgentLoopWorker
    from verl.single_controller.ray.base import WorkerHost
    from verl.trainer.ppo.ray_trainer import RayPPOTrainer
    from verl.workers.rollout.replica import RolloutReplica

    calls: dict[type, list[str]] = {
        RolloutReplica: ["generate", "start_weight_update", "update_weights", "finish_weight_update"],
        AgentLoopWorker: ["generate_sequences"],
        RayPPOTrainer: ["train_step"],
    }
    for owner, names in calls.items():
        for name in names:
            setattr(owner, name, _recorded(getattr(owner, name), lambda *_, name=name: name))
    # Of any rank's method; its arguments are the rank, the role, the method and what it is called with.
    WorkerHost.call = _recorded(WorkerHost.call, lambda _, role, method, *rest: f"{role}.{method}")


if FOLDER in os.environ:
    _record()
