"""A real Slurm of many nodes on one machine, for tests.

One slurmctld and N slurmd (nodes ``c1`` to ``cN``, shaped like a Xeon Phi 7250) share this host.
Nothing has a fixed name or port, so several clusters can run side by side.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster: its private folder, its node names, what its commands need."""

    folder: Path
    nodes: tuple[str, ...]
    environment: Mapping[str, str]

    def run(
        self, *command: str, timeout: float = 60.0, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with ``env`` added; raise TimeoutExpired after ``timeout`` seconds."""
        full = {**self.environment, **env}
        return subprocess.run(
            command, env=full, input="", capture_output=True, text=True, timeout=timeout
        )

    def batch(self, *options: str, timeout: float = 120.0) -> int:
        """Submit a script and wait for its end: its exit status. sbatch --wait looks every 10 s."""
        submitted = self.run("sbatch", "--parsable", *options)
        assert submitted.returncode == 0, submitted.stderr
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            shown = self.run("scontrol", "show", "job", "-o", submitted.stdout.strip()).stdout
            if re.search(r"JobState=(COMPLETED|FAILED)", shown):
                return int(re.findall(r"ExitCode=(\d+)", shown)[0])
            time.sleep(0.1)
        raise TimeoutError(f"{' '.join(options)} is not over after {timeout:.0f} s")


@contextlib.contextmanager
def slurm_cluster(nodes: int, root: Path) -> Iterator[SlurmCluster]:
    """Start a cluster of ``nodes`` nodes in a fresh folder below ``root``; end it on leaving.

    Raises ``RuntimeError`` that quotes the logs when the cluster does not come up.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir=root)).resolve()
    if len(str(folder)) > 70:  # Slurm puts Unix sockets below it; their paths end at 107
        raise RuntimeError(f"folder {folder} is too long for Unix sockets: use a shorter root")
    names = tuple(f"c{index}" for index in range(1, nodes + 1))
    outer = ("SLURM_", "SBATCH_", "SRUN_")  # the tests may themselves run in a job
    clean = {name: value for name, value in os.environ.items() if not name.startswith(outer)}
    conf = folder / "slurm.conf"
    cluster = SlurmCluster(folder, names, {**clean, "SLURM_CONF": str(conf)})
    with _munge_socket() as munge, _held_ports(nodes + 1) as ports:
        conf.write_text(_configuration(cluster, ports, munge))
        try:
            for name in ("slurmctld", *names):
                start_daemon(cluster, name)
            wait_until_idle(cluster, timeout=30.0 + 0.2 * nodes)
            yield cluster
        finally:
            _stop(cluster)


def _configuration(cluster: SlurmCluster, ports: list[int], munge: str) -> str:
    """Return slurm.conf; config_overrides lets a node have 272 CPUs on any machine. A job that is
    queued again waits until its credential has expired."""
    names, slurmd_ports = ",".join(cluster.nodes), ",".join(map(str, ports[1:]))
    return f"""\
ClusterName=knl
SlurmctldHost={socket.gethostname().split(".")[0]}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthInfo=socket={munge},cred_expire={10 + len(cluster.nodes) // 4}
StateSaveLocation={cluster.folder}
SlurmdSpoolDir={cluster.folder}/%n
SlurmctldPidFile={cluster.folder}/slurmctld.pid
SlurmdPidFile={cluster.folder}/%n.pid
SlurmctldLogFile={cluster.folder}/slurmctld.log
SlurmdLogFile={cluster.folder}/%n.log
MpiDefault=pmi2
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
KillWait=5
SlurmdTimeout={10 + len(cluster.nodes)}
ReturnToService=2
NodeName=DEFAULT CPUs=272 Sockets=1 CoresPerSocket=68 ThreadsPerCore=4 Feature=knl,quad,cache
NodeName={names} Port=[{slurmd_ports}] NodeHostname=localhost NodeAddr=127.0.0.1
PartitionName=normal Nodes=ALL Default=YES MaxTime=2880 State=UP
PartitionName=large Nodes=ALL MaxTime=2880 State=UP
PartitionName=skx Nodes=ALL MaxTime=2880 State=UP
"""


@contextlib.contextmanager
def _held_ports(count: int) -> Iterator[list[int]]:
    """Yield free ports below the ephemeral range, held against other clusters until the end."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        while len(ports) < count:
            port = random.randrange(10000, 32768)
            holder = held.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                holder.bind(("", port))  # fails on a port that anybody has
                # From now on a daemon, which sets this too, may listen beside the holder.
                holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                ports.append(port)
        yield ports


@contextlib.contextmanager
def _munge_socket() -> Iterator[str]:
    """Yield the socket of the machine's munged, or else of a private one, ended afterwards."""
    system = "/run/munge/munge.socket.2"
    if subprocess.run(["munge", "-n", "-S", system], capture_output=True).returncode == 0:
        yield system
        return
    # Private, as another test run may outlive this one; in /run, as pytest closes its folders.
    folder = Path(tempfile.mkdtemp(prefix="knl-munge-", dir="/run"))
    try:
        shutil.chown(folder, "munge", "munge")
        folder.chmod(0o755)
        flags = [f"--{name}-file={folder}/{name}" for name in ("pid", "log", "seed")]
        command = ["munged", f"--socket={folder}/socket", *flags]
        subprocess.run(command, user="munge", group="munge", extra_groups=[], check=True)
        yield f"{folder}/socket"
    finally:
        _end(_pids([folder / "pid"]))
        shutil.rmtree(folder)


def start_daemon(cluster: SlurmCluster, name: str) -> None:
    """Start one daemon; it goes to the background by itself and writes its pid file."""
    command = ["slurmctld"] if name == "slurmctld" else ["slurmd", "-N", name]
    started = cluster.run(*command, "-f", cluster.environment["SLURM_CONF"])
    if started.returncode != 0:
        said = " | ".join(started.stderr.splitlines()[-4:])
        raise RuntimeError(f"{' '.join(command)} failed: {said}; {_tail(cluster, name)}")


def wait_until_idle(cluster: SlurmCluster, timeout: float) -> None:
    """Wait at most ``timeout`` seconds for every node to be idle."""
    deadline = time.monotonic() + timeout
    late = list(cluster.nodes)
    while late:
        if time.monotonic() > deadline:
            tails = f"{_tail(cluster, 'slurmctld')}; {_tail(cluster, late[0])}"
            raise RuntimeError(f"{late} not idle after {timeout:.0f} s: {tails}")
        time.sleep(0.1)
        idle = cluster.run("sinfo", "-h", "--Node", "--states=idle", "--format=%N").stdout.split()
        late = [name for name in cluster.nodes if name not in idle]


def _tail(cluster: SlurmCluster, name: str) -> str:
    """Quote the end of one daemon's log in one line."""
    log = cluster.folder / f"{name}.log"
    lines = log.read_text().splitlines()[-4:] if log.exists() else ["(not written)"]
    return f"{log} ends in: {' | '.join(lines)}"


def _stop(cluster: SlurmCluster) -> None:
    """End the jobs, the daemons, then whatever else of this cluster is left."""
    controller = cluster.folder / "slurmctld.pid"
    if any(map(_is_running, _pids([controller]))):
        with contextlib.suppress(subprocess.TimeoutExpired):
            cluster.run("scancel", "--user=root", timeout=10.0)
            deadline = time.monotonic() + 10.0
            while time.monotonic() < deadline and cluster.run("squeue", "-h", timeout=5.0).stdout:
                time.sleep(0.1)
    _end(_pids([controller, *(cluster.folder / f"{name}.pid" for name in cluster.nodes)]))
    # The path of slurm.conf is this cluster's alone, so the variable marks its processes.
    mark = f"SLURM_CONF={cluster.environment['SLURM_CONF']}".encode()
    left = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if mark in (process / "environ").read_bytes().split(b"\0"):
                left.append(int(process.name))
    _end(left)


def _pids(files: list[Path]) -> list[int]:
    return [int(word) for file in files if file.exists() for word in file.read_text().split()]


def _end(pids: list[int], patience: float = 5.0) -> None:
    """End processes with SIGTERM and, after ``patience`` seconds, with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in filter(_is_running, pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + patience
        while any(map(_is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)


def _is_running(pid: int) -> bool:
    """Tell whether a process exists and is not a zombie that waits for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
