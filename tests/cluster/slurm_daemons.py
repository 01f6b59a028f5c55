"""The daemons of a private Slurm: munged, a controller, and a slurmd for each node.

All of it lives in one folder under /run with a configuration of its own; this machine's hosts file,
a Slurm that it may have, and its network's addresses are left alone. Its processes are known by a
mark in their environment, or by the hosts file that they see; what a test run that was killed has
left is ended by the next one.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from tests.cluster.processes import end_all, left, new_mark

__all__ = ["Daemons", "Node", "SlurmBusyError", "started", "until", "why_not"]

FOLDER = Path("/run/shardscale-slurm")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "ip", "unshare")

_CONFIGURATION = """\
ClusterName=shardscale
SlurmctldHost={host}({controller.address})
SlurmctldPort={controller.port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 2 minutes if nothing is said, and no
# less than these 5 seconds.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/%n
# What a container lacks: control groups, accounting, a service manager.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides  # a node has more cores than this machine
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MpiDefault=none
ReturnToService=2
TmpFS={folder}/tmp.%n  # the nodes' PMIx servers have the same names there
KillWait=5
UnkillableStepTimeout=10
SlurmdTimeout=6
MessageTimeout=5
MinJobAge=3600
EnforcePartLimits=ALL  # refuse what can never run
PropagateResourceLimits=NONE
"""


class SlurmBusyError(RuntimeError):
    """Another test run on this machine has its Slurm up."""


class Node(NamedTuple):
    """One node, which has four cores."""

    name: str
    address: str
    port: int


def why_not() -> str | None:
    """Why no Slurm can be started here, in one sentence, or None."""
    if os.geteuid() != 0:
        return "only root can start a Slurm"
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        packages = "slurmctld slurmd slurm-client munge libpmix-dev iproute2"
        return f"no {', '.join(missing)} here (Debian: apt-get install {packages})"
    if os.environ.get("SLURM_CONF") or Path("/etc/slurm/slurm.conf").exists():
        return "this machine has a Slurm already, which is left alone"
    return None


@contextmanager
def started(
    name: str, num_nodes: int, *, networks: bool = False, wait_s: float = 0.0
) -> Iterator[Daemons]:
    """Daemons that run, until the block is left; nothing of them or of any job is left then.

    Args:
        name: Of the cluster's folder and, with a number, of its nodes.
        num_nodes: How many there are.
        networks: Each node has a network and a host name of its own; else they share this machine's
            and have an address of its loopback each.
        wait_s: How long to wait for another test run to be done with its own.

    Raises:
        SlurmBusyError: It was not done.
    """
    folder = FOLDER / name
    FOLDER.mkdir(mode=0o755, exist_ok=True)
    with (FOLDER / f"{name}.lock").open("a") as lock:
        try:
            until(lambda: _take(lock.fileno()), "the other test run to end", wait_s)
        except TimeoutError as error:
            raise SlurmBusyError(
                f"another test run has its Slurm in {folder} up: {error}"
            ) from None
        _clean_up(folder)
        daemons = Daemons(name, folder, num_nodes, networks)
        try:
            daemons.start()
            yield daemons
        finally:
            daemons.stop()
            _clean_up(folder)


def until(holds: Callable[[], bool], what: str, limit_s: float) -> None:
    """Look again and again until something holds.

    Raises:
        TimeoutError: It did not in time.
    """
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {limit_s:g} s for {what}")
        time.sleep(0.1)


class Daemons:
    """All daemons of one cluster, and its network if it has one."""

    def __init__(self, name: str, folder: Path, num_nodes: int, networks: bool) -> None:
        self.mark = new_mark()
        self.configuration = folder / "slurm.conf"
        self._name = name
        self._folder = folder
        self._networks = networks
        network, controller = ("10.77.0", 254) if networks else ("127.0.77", 254)
        port, *ports = _free_ports(1 + num_nodes)
        self._controller = Node("controller", f"{network}.{controller}", port)
        self.nodes = [
            Node(f"{name}{number}", f"{network}.{number}", port)
            for number, port in enumerate(ports, start=1)
        ]
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        for part in ("log", "munge", "state"):
            (self._folder / part).mkdir(parents=True)
        (self._folder / "mark").write_text("=".join(*self.mark.items()))
        self._configure()
        munge = self._folder / "munge"
        (munge / "key").touch(0o600)
        (munge / "key").write_bytes(os.urandom(128))
        files = [f"--{part}-file={munge / part}" for part in ("key", "log", "pid", "seed")]
        self._run("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files)
        until((munge / "socket").exists, "munged to open its socket", 10)
        if self._networks:
            _ip("link", "add", self._bridge, "type", "bridge")
            _ip("addr", "add", f"{self._controller.address}/24", "dev", self._bridge)
            _ip("link", "set", self._bridge, "up")
        self._run("slurmctld", "-D", "-f", self.configuration)
        for node in self.nodes:
            self._start_node(node)

    def stop(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        with suppress(TimeoutError):
            until(lambda: all(p.poll() is not None for p in self._processes), "their end", 10)
        for process in self._processes:
            process.kill()
            process.communicate()
        _end_nodes(self._folder)
        end_all(self.mark)

    def jobs_processes(self) -> dict[int, str]:
        """Command lines, by pid, of what is not a daemon."""
        mine = {process.pid for process in self._processes}
        found = left(self.mark) | _in_nodes(self._folder)
        return {pid: line for pid, line in found.items() if pid not in mine}

    def ends_of_logs(self) -> str:
        logs = sorted((self._folder / "log").iterdir())
        return "\n".join(f"{log.name}:\n{log.read_text()[-500:]}" for log in logs)

    def cut(self, node: Node) -> None:
        """Take the node's network away."""
        _ip("link", "set", f"{node.name}-cable", "down")

    def mend(self, node: Node) -> None:
        """Give it back."""
        _ip("link", "set", f"{node.name}-cable", "up")

    @property
    def _bridge(self) -> str:
        return f"{self._name}-bridge"

    def _configure(self) -> None:
        host = socket.gethostname()
        known = {"controller": self._controller, "folder": self._folder, "host": host}
        lines = [_CONFIGURATION.format(**known)]
        hosts = ["127.0.0.1 localhost"]
        if not self._networks:
            hosts.append(f"127.0.0.1 {host}")
        for node in self.nodes:
            lines.append(
                f"NodeName={node.name} NodeAddr={node.address} Port={node.port} "
                f"NodeHostname={node.name if self._networks else host} CPUs=4 RealMemory=4000\n"
            )
            hosts.append(f"{node.address} {node.name}")
            for part in ("spool", "tmp"):
                (self._folder / f"{part}.{node.name}").mkdir()
        names = ",".join(node.name for node in self.nodes)
        lines.append(f"PartitionName=main Nodes={names} Default=YES MaxTime=30:00\n")
        self.configuration.write_text("".join(lines))
        (self._folder / "hosts").write_text("\n".join(hosts) + "\n")

    def _start_node(self, node: Node) -> None:
        # The nodes' names are known in here only, by a hosts file that lies over this machine's.
        script = f"mount --bind {self._folder}/hosts /etc/hosts; "
        spaces = ["--mount"]
        if self._networks:
            spaces += ["--net", "--uts"]
            script = f"read plugged_in; hostname {node.name}; {script}"
        script += f"exec slurmd -D -N {node.name} -f {self.configuration}"
        process = self._run("unshare", *spaces, "sh", "-ec", script)
        if self._networks:
            self._plug_in(node, process.pid)
            assert process.stdin is not None
            process.stdin.write(b"yes\n")
            process.stdin.flush()

    def _plug_in(self, node: Node, pid: int) -> None:
        """Lead a cable from the bridge into the node's network."""
        space, mine = f"/proc/{pid}/ns/net", os.stat("/proc/self/ns/net").st_ino
        until(lambda: os.stat(space).st_ino != mine, f"the network of {node.name}", 5)
        cable = f"{node.name}-cable"
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _ip("link", "set", cable, "master", self._bridge, "up")
        _ip("addr", "add", f"{node.address}/24", "dev", "eth0", within=space)
        _ip("link", "set", "eth0", "up", within=space)
        _ip("link", "set", "lo", "up", within=space)

    def _run(self, *command: str | Path) -> subprocess.Popen[bytes]:
        with (self._folder / "log" / "daemons").open("ab") as log:
            process = subprocess.Popen(
                command,
                env={**os.environ, **self.mark, "SLURM_CONF": str(self.configuration)},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the test run, which ends them
            )
        self._processes.append(process)
        return process


def _take(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _clean_up(folder: Path) -> None:
    """End what a test run that was killed has left, and remove the folder."""
    if (folder / "mark").exists():
        name, value = (folder / "mark").read_text().split("=")
        end_all({name: value})
    _end_nodes(folder)
    # A node's network goes with its processes, but only when its last connection has given up.
    for link in Path("/sys/class/net").glob(f"{folder.name}*"):
        if link.name.endswith(("-bridge", "-cable")):
            delete = ["ip", "link", "del", link.name]
            subprocess.run(delete, capture_output=True, timeout=10, check=False)
    shutil.rmtree(folder, ignore_errors=True)


def _end_nodes(folder: Path) -> None:
    while found := _in_nodes(folder):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _in_nodes(folder: Path) -> dict[int, str]:
    """Command lines, by pid, of what runs on the nodes of a cluster, whoever has started it.

    Slurm's own processes there write their names over their environments.
    """
    hosts = f"{folder.parent.name}/{folder.name}/hosts"
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if hosts in (process / "mountinfo").read_text():
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(process.name)] = command.strip()
    return found


def _ip(*words: str, within: str | None = None) -> None:
    enter = ["nsenter", f"--net={within}"] if within else []
    done = subprocess.run([*enter, "ip", *words], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
