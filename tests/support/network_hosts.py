"""Hosts made of Linux namespaces: own addresses on a bridge, own names, own shared memory, and a real sshd each.

They share this machine's processes, files and /tmp, as containers of one machine may. A host's name resolves to
127.0.1.1 on itself, as Debian sets it up, and there is no route out. All keys are made for the occasion, in a folder
with spaces in its name; nothing is written to ~/.ssh. Needs root, iproute2, openssh-server and rsync.
"""

import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

PACKAGES = {"sshd": "openssh-server", "ip": "iproute2", "rsync": "rsync", "nsenter": "util-linux"}
TAG = f"kv{os.getpid() % 100000}"
NETWORK = "10.213.77"
DATA = Path(__file__).resolve().parents[1] / "data" / "stand_ins"


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of the machine itself."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=check, timeout=300)


def require_tools() -> None:
    """Skip where no hosts can be made."""
    if os.geteuid() != 0:
        pytest.skip("hosts are made of network namespaces, which takes root")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = sorted({package for tool, package in PACKAGES.items() if not shutil.which(tool)})
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    probe = run("unshare", "--net", "--uts", "--mount", "true", check=False)
    if probe.returncode:
        pytest.skip(f"no namespaces can be made here: {probe.stderr.strip()}")


@dataclass
class Host:
    """One of them."""

    name: str
    address: str
    namespace: str
    folder: Path
    sshd: subprocess.Popen[bytes]

    def inside(self) -> list[str]:
        """What to put before a command to run it on this host, without ssh."""
        return ["nsenter", f"--target={self.sshd.pid}", "--net", "--mount", "--uts"]

    def processes(self) -> dict[int, str]:
        """Process ids and titles, without sshd's."""
        found = {}
        for pid in map(int, run("ip", "netns", "pids", self.namespace).stdout.split()):
            with suppress(FileNotFoundError, ProcessLookupError):
                title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                if title and "sshd" not in title:
                    found[pid] = title
        return found

    def end(self) -> None:
        """End every process of the host, and the host."""
        for pid in run("ip", "netns", "pids", self.namespace, check=False).stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        self.sshd.wait(timeout=30)
        run("ip", "netns", "delete", self.namespace, check=False)


@dataclass
class Network:
    """The hosts, their bridge, and how to reach them."""

    folder: Path
    count: int
    hosts: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.bridge = f"{TAG}br"
        self.key = self.folder / "key"  # of hosts and user alike
        Path("/run/sshd").mkdir(exist_ok=True)
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)

    def start(self) -> None:
        """Make the hosts; ``end`` has to follow, whether or not this succeeds."""
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "link", "set", self.bridge, "up")
        for number in range(1, self.count + 1):
            self._add_host(number)
        for host in self.hosts:
            self.wait_for(host)

    def wait_for(self, host: Host) -> None:
        """Until the first host gets to it by ssh."""
        deadline = time.monotonic() + 30
        while run(*self.hosts[0].inside(), "ssh", *self._ssh_words(), host.address, "true", check=False).returncode:
            assert host.sshd.poll() is None, (host.folder / "sshd.log").read_text()
            assert time.monotonic() < deadline, f"{host.name}: no ssh after 30 s"
            time.sleep(0.1)

    def unplug(self, host: Host) -> None:
        """Pull its network cable."""
        run("ip", "link", "set", f"{host.namespace}b", "down")

    def plug(self, host: Host) -> None:
        """Put the cable back, and wait until the network has noticed."""
        run("ip", "link", "set", f"{host.namespace}b", "up")
        self.wait_for(host)

    def _add_host(self, number: int) -> None:
        name, namespace, address = f"kvhost{number}", f"{TAG}n{number}", f"{NETWORK}.{number}"
        folder = self.folder / name
        folder.mkdir()
        others = [f"{NETWORK}.{other} kvhost{other}\n" for other in range(1, self.count + 1) if other != number]
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{''.join(others)}")
        (folder / "sshd_config").write_text((DATA / "sshd_config").read_text().format(key=self.key))

        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", f"{namespace}b", "type", "veth", "peer", "name", "lan0", "netns", namespace)
        run("ip", "link", "set", f"{namespace}b", "master", self.bridge, "up")
        run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "lan0")
        for interface in ("lo", "lan0"):
            run("ip", "-n", namespace, "link", "set", interface, "up")
        unshare = ["unshare", "--uts", "--mount", "--propagation", "private"]
        arguments = [name, str(folder / "hosts"), str(folder / "sshd_config")]
        with (folder / "sshd.log").open("wb") as log:
            command = ["ip", "netns", "exec", namespace, *unshare, "bash", DATA / "start_host.sh", *arguments]
            sshd = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self.hosts.append(Host(name, address, namespace, folder, sshd))

    def _ssh_words(self) -> list[str]:
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "IdentitiesOnly=yes", "BatchMode=yes"]
        return ["-F", "/dev/null", "-i", str(self.key), *(word for option in options for word in ("-o", option))]

    @property
    def ssh_opts(self) -> str:
        """SSH_OPTS for the scripts."""
        return " ".join(f"'{word}'" for word in self._ssh_words())

    def end(self) -> None:
        """End all of it; safe after half a start."""
        for host in self.hosts:
            host.end()
        for number in range(1, self.count + 1):
            # The kernel takes its time over a namespace whose connections were open, and the cable would stay so long.
            run("ip", "link", "delete", f"{TAG}n{number}b", check=False)
            run("ip", "netns", "delete", f"{TAG}n{number}", check=False)
        run("ip", "link", "delete", self.bridge, check=False)
