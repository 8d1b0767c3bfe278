"""`knl run --hostfile`: ranks on several hosts through mpiexec, for clusters without Slurm."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from knl.errors import FailedError, InputError
from knl.launch import UNPINNED, Mpi, find_mpi, mpi_environment, shell_status, signals_to

_HOST = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::([1-9][0-9]{0,3}))?")
_BY_SSH = {
    "intel": {"I_MPI_HYDRA_BOOTSTRAP": "ssh"},
    "mpich": {"HYDRA_LAUNCHER": "ssh"},
    "openmpi": {"OMPI_MCA_plm": "rsh"},
}
# Open MPI hands on its own variables alone.
_HANDED_ON = re.compile(r"(KNL|OMP|KMP|GOMP|CCL|FI|MPI4PY|MALLOC|PYTHON)_?\w*|(LD_LIBRARY_)?PATH")


@dataclass(frozen=True)
class Host:
    """A line of a hostfile. `slots`: ranks that it takes, 0 where the line does not say."""

    name: str
    slots: int
    line: int


def read_hosts(path: Path) -> list[Host]:
    """The hosts of a file with `host` or `host:slots` a line; # begins a comment.

    Raises InputError with the number of a line that is neither, or names a host again.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) else "is not a text file"
        raise InputError(f"--hostfile {path}: {what}; give a file with a host a line") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = _HOST.fullmatch(text)
        if found is None:
            raise InputError(
                f"{path}, line {number}: {text!r}: must be host or host:slots with 1 to 9999 slots"
            )
        name = found.group(1)
        if name in hosts:
            raise InputError(
                f"{path}, line {number}: {name} is on line {hosts[name].line} already; write it "
                "once, with its ranks as host:slots"
            )
        hosts[name] = Host(name, int(found.group(2) or 0), number)
    if not hosts:
        raise InputError(f"{path}: names no host; write one a line")
    return list(hosts.values())


def with_ranks(path: Path, hosts: Sequence[Host], wanted: int | None, usual: int) -> list[Host]:
    """The hosts with as many slots as there will be ranks: `wanted`, else what the file says, else
    `usual`. Raises InputError where more are wanted than a host takes."""
    for host in hosts:
        if wanted is not None and 0 < host.slots < wanted:
            raise InputError(
                f"-n {wanted}: {path}, line {host.line} gives {host.name} {host.slots} slots; "
                "raise that or leave -n out"
            )
    return [replace(host, slots=wanted or host.slots or usual) for host in hosts]


def run_on_hosts(
    hosts: Sequence[Host],
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    options: Sequence[str],
    prefix: bool,
) -> int:
    """Run `knl run OPTIONS -- command` as `slots` ranks on each host; return their exit status,
    128 + n where they were ended by signal n.

    The first SIGTERM or SIGINT to this process reaches the ranks as SIGUSR1, on which a training
    stops with a checkpoint: mpiexec hands that one on, and kills at the others. A second one ends
    the ranks. Raises InputError when there is no MPI, FailedError when mpiexec does not start.
    """
    mpi = find_mpi(environment)
    kind = _kind(mpi)
    wanted = {**UNPINNED, **_BY_SSH[kind], **environment, **mpi_environment(environment)}
    for name in [name for name in wanted if name.startswith("PMI")]:
        del wanted[name]  # of an outer launch
    rank = [sys.executable, "-m", "knl", "run", *options, "--", *command]
    with tempfile.NamedTemporaryFile("w", prefix="knl-hosts-", encoding="utf-8") as file:
        form = "{} slots={}\n" if kind == "openmpi" else "{}:{}\n"
        file.writelines(form.format(host.name, host.slots) for host in hosts)
        file.flush()
        ranks = sum(host.slots for host in hosts)
        launcher = [str(mpi.mpiexec), *_options(kind, file.name, prefix, wanted), "-n", str(ranks)]
        try:
            process = subprocess.Popen(
                [*launcher, *rank],
                env=wanted,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # a terminal's Ctrl-C is for this process to hand on
            )
        except OSError as error:
            raise FailedError(f"{mpi.mpiexec} does not start: {error.strerror}") from None
        orders = _Orders(process)
        with process, signals_to(orders):
            status = shell_status(process.wait())
    if orders.heard and status not in (0, 1, 2, 75):
        return 128 + orders.heard[0]
    return status


def _kind(mpi: Mpi) -> str:
    """intel, openmpi or mpich, which each have options of their own."""
    if mpi.kind == "intel":
        return mpi.kind
    shown = subprocess.run([str(mpi.mpiexec), "--version"], capture_output=True, text=True).stdout
    return "openmpi" if "Open" in shown else "mpich"


def _options(kind: str, file: str, prefix: bool, environment: Mapping[str, str]) -> list[str]:
    if kind != "openmpi":
        return ["-machinefile", file, *(["-l"] if prefix else [])]
    options = ["--hostfile", file, *(["--tag-output"] if prefix else [])]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    for name in environment:
        if _HANDED_ON.fullmatch(name):
            options += ["-x", name]
    return options


@dataclass
class _Orders:
    """Hands signals on to mpiexec."""

    mpiexec: subprocess.Popen[bytes]
    heard: list[int] = field(default_factory=list)

    def send_signal(self, number: int) -> None:
        ends = number in (signal.SIGTERM, signal.SIGINT)
        first = number not in self.heard
        self.heard.append(number)
        self.mpiexec.send_signal(signal.SIGUSR1 if ends and first else number)
