"""What Ray needs to know about the machine this runs on: ``ADDRESS INTERFACE CPUS GPUS``, one line.

    python scripts/node_facts.py [--node-ip ADDRESS|INTERFACE] [--name NAME] [--peer HOST]
        [--reach HOST:PORT] [--port N]

The address is the first of these that exists: ``--node-ip``; what ``--name`` (this machine in the hostfile) stands for,
if that is an address of this machine's network; where the route to ``--peer`` leaves from; where the default route
does; the loopback. CPUs are those that this process may use (affinity, cgroup quota), GPUs those that ``nvidia-smi``
lists and ``CUDA_VISIBLE_DEVICES`` leaves; NUM_CPUS and NUM_GPUS in the environment win.

``--port`` must be free on that address, and ``--reach`` must answer there; else the reason goes to stderr, and the exit
status is 1.
"""

import argparse
import ipaddress
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil

REACH_S = 10.0
ELSEWHERE = "198.51.100.1"
"""An address for documentation, which lies behind every default route."""


def interfaces() -> dict[str, str]:
    """This machine's addresses and the interface of each."""
    return {
        entry.address.split("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }


def resolve(name: str) -> list[str]:
    """Addresses that a name stands for."""
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    except OSError:
        return []


def is_address(text: str | None) -> bool:
    """Whether this is an address rather than a name."""
    try:
        ipaddress.ip_address(text or "")
    except ValueError:
        return False
    return True


def route_from(peer: str) -> str | None:
    """The address that packets to ``peer`` leave from; sends nothing."""
    for address in resolve(peer):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            return str(probe.getsockname()[0])
    return None


def choose_address(node_ip: str | None, name: str | None, peer: str | None, own: dict[str, str]) -> str:
    """See the module.

    Raises:
        ValueError: ``node_ip`` is nothing of this machine.
    """
    if node_ip:
        if node_ip in own:
            return node_ip
        # An interface's IPv4 address before its IPv6 ones, and none that is valid on one link alone.
        found = [address for address, interface in own.items() if interface == node_ip]
        usable = sorted(
            (ip for ip in map(ipaddress.ip_address, found) if not ip.is_link_local), key=lambda ip: ip.version
        )
        if not usable:
            raise ValueError(f"NODE_IP={node_ip} is neither an address nor an interface here; there are {own}")
        return str(usable[0])
    for address in resolve(name) if name else []:
        if address in own and not ipaddress.ip_address(address).is_loopback:
            return address
    return (route_from(peer) if peer else None) or route_from(ELSEWHERE) or "127.0.0.1"


def cpu_count() -> int:
    """CPUs that this process may use."""
    cpus = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cpus = min(cpus, max(1, int(limit) // int(period)))
    return cpus


def gpu_count() -> int:
    """GPUs that Ray may hand out."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    count = sum(line.startswith("GPU") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    devices = (device.strip() for device in visible.split(","))
    return min(count, len(list(itertools.takewhile(lambda device: device not in ("", "-1"), devices))))


def check_port(port: int) -> None:
    """Raise ValueError if something listens on the port, at whichever address."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ValueError(f"port {port} is in use by another program ({error.strerror}); set RAY_PORT") from error


def check_reach(address: str) -> None:
    """Raise ValueError if nothing answers there."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except OSError as error:
        raise ValueError(
            f"this host cannot reach the head at {address} ({error}); a firewall, or NODE_IP on a network that the "
            "hosts do not share"
        ) from error


def main() -> int:
    """Check, then print the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--node-ip")
    parser.add_argument("--name")
    parser.add_argument("--peer")
    parser.add_argument("--reach")
    parser.add_argument("--port", type=int)
    args = parser.parse_args()
    try:
        own = interfaces()
        # An address can only be that of the head; an interface is one of every host.
        others = args.reach and is_address(args.node_ip) and args.node_ip not in own
        address = choose_address(None if others else args.node_ip, args.name, args.peer, own)
        if args.port:
            check_port(args.port)
        if args.reach:
            check_reach(args.reach)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    cpus = os.environ.get("NUM_CPUS") or cpu_count()
    gpus = os.environ.get("NUM_GPUS") or gpu_count()
    print(address, own.get(address, "lo"), cpus, gpus)
    return 0


if __name__ == "__main__":
    sys.exit(main())
