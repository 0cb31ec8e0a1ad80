"""Wait until a Ray cluster has its nodes; runs on its head.

    python scripts/ray_nodes.py --address HOST:PORT [--wait S --cpus N --gpus N NODE_ADDRESS...]

Prints ``have 2 of 3 nodes, ...`` whenever that changes, then a line ``node ADDRESS CPUS GPUS`` for each node that is
there. After S seconds a line ``missing ADDRESS`` for each that is not, and exit status 1.
"""

import argparse
import logging
import sys
import time
from typing import Any

import ray


def alive() -> dict[str, dict[str, Any]]:
    """Resources of the living nodes by address."""
    return {node["NodeManagerAddress"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def total(nodes: dict[str, dict[str, Any]], kind: str) -> int:
    """Sum of one resource."""
    return int(sum(resources.get(kind, 0) for resources in nodes.values()))


def main() -> int:
    """Wait, print, and say whether all is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--cpus", type=int, default=0)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("expected", nargs="*")
    args = parser.parse_args()
    ray.init(address=args.address, logging_level=logging.ERROR, log_to_driver=False)
    deadline, shown = time.monotonic() + args.wait, ""
    while True:
        nodes = alive()
        missing = [address for address in args.expected if address not in nodes]
        cpus, gpus = total(nodes, "CPU"), total(nodes, "GPU")
        line = f"have {len(args.expected) - len(missing)} of {len(args.expected)} nodes, {cpus} of {args.cpus} CPUs"
        line += f", {gpus} of {args.gpus} GPUs" if args.gpus else ""
        if args.expected and line != shown:
            print(shown := line, flush=True)
        complete = not missing and cpus >= args.cpus and gpus >= args.gpus
        if complete or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    for address, resources in sorted(nodes.items()):
        print("node", address, int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))
    for address in missing:
        print("missing", address)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
