"""The driver's Ray: a cluster that is there, or one of this run's own.

In: the arguments of ``ray.init`` and what to add to them. Out: a connection, and an error that tells the fix.
"""

import os
from collections.abc import Mapping
from typing import Any

import ray

QUIET_PROCESSES = {"TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of every Ray process: threads that spin while they wait make a busy machine ten times slower."""


def start_session(ray_init: Mapping[str, Any]) -> None:
    """Connect to the cluster that ``ray_init`` names, or start Ray here.

    Raises:
        ValueError: no Ray answers, or an argument cannot be used.
    """
    try:
        ray.init(**session_arguments(ray_init))
    except ConnectionError as error:
        raise ValueError(
            f"no Ray answers at ray_kwargs.ray_init.address; start it: init_ray_cluster.sh HOSTFILE ({error})"
        ) from error
    except ValueError as error:
        raise ValueError(f"ray_kwargs.ray_init={dict(ray_init)}: {error}") from error


def session_arguments(ray_init: Mapping[str, Any]) -> dict[str, Any]:
    """``ray_init`` over our defaults: no dashboard on a run of its own, quiet processes."""
    given = dict(ray_init)
    runtime_env = dict(given.pop("runtime_env", {}))
    env_vars = {**QUIET_PROCESSES, **runtime_env.pop("env_vars", {})}
    defaults: dict[str, Any] = {} if "address" in given else {"include_dashboard": False}
    return {**defaults, **given, "runtime_env": {**runtime_env, "env_vars": env_vars}}


def end_session(timeline_folder: str | None) -> None:
    """Disconnect, and end a Ray of this run's own with all its processes.

    Args:
        timeline_folder: receives Ray's timeline first; None: none.
    """
    if timeline_folder:
        os.makedirs(timeline_folder, exist_ok=True)
        ray.timeline(filename=os.path.join(timeline_folder, "timeline.json"))
    ray.shutdown()
