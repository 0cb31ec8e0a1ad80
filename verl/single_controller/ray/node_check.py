"""Asking every node of a cluster, before anything heavy starts there, what it holds.

In: what each node has to have. Out: nothing, or one ValueError that says what is missing or differs where. One task per
node, all at once, without a claim on CPUs or GPUs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.cloudpickle import register_pickle_by_value, unregister_pickle_by_value
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.single_controller.ray import node_report
from verl.single_controller.ray.node_report import NeededPath, NodeReport, compare, join_problems, read_node

ANSWER_S = 120.0
"""Seconds a node has to start a process and answer."""


def check_nodes_hold(
    needed: Mapping[str, Sequence[NeededPath]], node_ips: Mapping[str, str], packages: Sequence[str]
) -> None:
    """Compare every node with the driver.

    Args:
        needed: by node id, what its processes will read.
        node_ips: address of each of these nodes.
        packages: keys of ``node_report.DISTRIBUTIONS`` whose versions count.

    Raises:
        ValueError: the nodes, what is wrong there, and the fix.
    """
    all_paths = sorted({need.path for needs in needed.values() for need in needs})
    driver = NodeReport(**read_node(all_paths, packages))
    # What is nowhere on the driver is a name on a hub: the nodes fetch it themselves, as the driver did.
    wanted = {node: [need for need in needs if driver.files[need.path] is not None] for node, needs in needed.items()}
    answers = _ask({node: [need.path for need in needs] for node, needs in wanted.items()}, packages)
    found = {
        node_ips[node]: [answer] if isinstance(answer, str) else compare(driver, answer, wanted[node])
        for node, answer in answers.items()
    }
    if problems := join_problems(found):
        raise ValueError(f"the cluster is not ready for this run:\n{problems}")


def _ask(paths: Mapping[str, Sequence[str]], packages: Sequence[str]) -> dict[str, NodeReport | str]:
    """By node id its report, or why there is none."""
    # By value: a node may have no such module, or an older one.
    register_pickle_by_value(node_report)
    try:
        task: Any = ray.remote(num_cpus=0, max_retries=0)(read_node)
        calls = {
            node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
                list(wanted), list(packages)
            )
            for node, wanted in paths.items()
        }
    finally:
        unregister_pickle_by_value(node_report)
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=ANSWER_S)
    return {node: _answer(call) for node, call in calls.items()}


def _answer(call: Any) -> NodeReport | str:
    try:
        return NodeReport(**ray.get(call, timeout=1))
    except RayError as error:
        reason = " ".join(str(getattr(error, "cause", None) or error).split())
        return (
            f"it could not be asked ({type(error).__name__}: {reason[:300]}); see that its Ray is well, or leave it out"
        )
