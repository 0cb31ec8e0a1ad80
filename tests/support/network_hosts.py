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

SSHD_CONFIG = """\
HostKey "{folder}/host_key"
AuthorizedKeysFile "{authorized}"
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""
# In namespaces of its own: the name, the names of the others, shared memory; then sshd until it is ended.
START_HOST = """\
set -e
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs -o size=4g tmpfs /dev/shm
exec "$(command -v sshd)" -D -e -f "$3"
"""


def run(*command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of the machine itself."""
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=check, timeout=300)


def require_tools() -> None:
    """Skip where no hosts can be made; install what is missing where that is allowed."""
    if os.geteuid() != 0:
        pytest.skip("hosts are made of network namespaces, which takes root")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    missing = sorted({package for tool, package in PACKAGES.items() if not shutil.which(tool)})
    if missing:
        if not shutil.which("apt-get"):
            pytest.skip(f"needs {', '.join(missing)}, and there is no apt-get to install them with")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            done = subprocess.run(["apt-get", "-q", *command], env=environment, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"apt-get {command[0]} failed, and {', '.join(missing)} is missing: {done.stderr[-300:]}")
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
        self.key = self.folder / "user_key"
        self.known_hosts = self.folder / "known_hosts"
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
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key")
        authorized = folder / "authorized_keys"
        shutil.copy(self.key.with_suffix(".pub"), authorized)
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder, authorized=authorized))
        with self.known_hosts.open("a") as known:
            key = (folder / "host_key.pub").read_text().split()
            known.write(f"{name},{address} {key[0]} {key[1]}\n")

        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", f"{namespace}b", "type", "veth", "peer", "name", "lan0", "netns", namespace)
        run("ip", "link", "set", f"{namespace}b", "master", self.bridge, "up")
        run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", "lan0")
        for interface in ("lo", "lan0"):
            run("ip", "-n", namespace, "link", "set", interface, "up")
        unshare = ["unshare", "--uts", "--mount", "--propagation", "private"]
        arguments = [name, str(folder / "hosts"), str(folder / "sshd_config")]
        with (folder / "sshd.log").open("wb") as log:
            sshd = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *unshare, "bash", "-c", START_HOST, "-", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.hosts.append(Host(name, address, namespace, folder, sshd))

    def _ssh_words(self) -> list[str]:
        options = [f'UserKnownHostsFile="{self.known_hosts}"', "IdentitiesOnly=yes", "BatchMode=yes"]
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
