"""`knl run --hostfile`: ranks on several hosts through mpiexec, for clusters without Slurm."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from knl.comm.watchdog import start_timeout
from knl.errors import FailedError, InputError, say
from knl.launch import UNPINNED, Mpi, find_mpi, mpi_environment, shell_status, signals_to

_HOST = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::([1-9][0-9]{0,3}))?")
# In a Slurm job each would start its ranks by srun. A rank that fails is this module's to judge.
_OF_KIND = {
    "intel": {"I_MPI_HYDRA_BOOTSTRAP": "ssh"},
    "mpich": {"HYDRA_LAUNCHER": "ssh"},
    "openmpi": {"OMPI_MCA_plm": "rsh", "OMPI_MCA_orte_abort_on_non_zero_status": "0"},
}
# Open MPI hands on its own variables alone.
_HANDED_ON = re.compile(r"(KNL|OMP|KMP|GOMP|CCL|FI|MPI4PY|MALLOC|PYTHON)_?\w*|(LD_LIBRARY_)?PATH")
_GRACE_S = 5.0  # for the other ranks to end by themselves when one has failed
_END_S = 5.0
_POLL_S = 0.1
# mpiexec does not tell how each rank ended, its own status depends on who ended first, and Intel's
# of 2021.8 waits for ever for a host that ssh does not reach; so a shell around the rank tells. It
# outlives the signal, which goes to the whole group.
_TELL = """\
trap : USR1
rank=${{PMI_RANK-$OMPI_COMM_WORLD_RANK}}
echo "{mark} $rank started" >&2
"$@"
status=$?
[ $status = 0 ] || echo "{mark} $rank $status" >&2
exit $status
"""
_SPOKEN = (1, 2, 75)  # statuses with which a rank has said why


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
    """Run `knl run OPTIONS -- command` as `slots` ranks on each host; return the worst exit status,
    128 + n for a rank ended by signal n. Where a rank fails and the others go on, they are ended.

    A signal that ends a job reaches the ranks as SIGUSR1, on which a training stops with a
    checkpoint: mpiexec hands on that one, and kills the ranks at others or dies of them. A second
    SIGTERM or SIGINT ends the ranks. Raises InputError when there is no MPI, FailedError when
    mpiexec does not start the ranks.
    """
    limit_s = start_timeout()
    mpi = find_mpi(environment)
    kind = _kind(mpi)
    wanted = {**UNPINNED, **_OF_KIND[kind], **environment, **mpi_environment(environment)}
    for name in [name for name in wanted if name.startswith("PMI")]:
        del wanted[name]  # of an outer launch
    mark = f"knl-rank-{uuid.uuid4().hex}"
    rank = ["sh", "-c", _TELL.format(mark=mark), "sh", sys.executable, "-m", "knl", "run"]
    with tempfile.NamedTemporaryFile("w", prefix="knl-hosts-", encoding="utf-8") as file:
        form = "{} slots={}\n" if kind == "openmpi" else "{}:{}\n"
        file.writelines(form.format(host.name, host.slots) for host in hosts)
        file.flush()
        ranks = sum(host.slots for host in hosts)
        launcher = [str(mpi.mpiexec), *_options(kind, file.name, prefix, wanted), "-n", str(ranks)]
        try:
            process = subprocess.Popen(
                [*launcher, *rank, *options, "--", *command],
                env=wanted,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is for this process to hand on
            )
        except OSError as error:
            raise FailedError(f"{mpi.mpiexec} does not start: {error.strerror}") from None
        with process:
            return _Job(process, mark, limit_s).wait()


def _kind(mpi: Mpi) -> str:
    """intel, openmpi or mpich, which each have options of their own."""
    if mpi.kind == "intel":
        return mpi.kind
    shown = subprocess.run([str(mpi.mpiexec), "--version"], capture_output=True, text=True).stdout
    return "openmpi" if "Open" in shown else "mpich"


def _options(kind: str, file: str, prefix: bool, environment: Mapping[str, str]) -> list[str]:
    if kind != "openmpi":
        return ["-machinefile", file, "-disable-auto-cleanup", *(["-l"] if prefix else [])]
    options = ["--hostfile", file, *(["--tag-output"] if prefix else [])]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    for name in environment:
        if _HANDED_ON.fullmatch(name):
            options += ["-x", name]
    return options


@dataclass
class _Job:
    """Ranks below `mpiexec`, and what their shells tell behind `mark` on its stderr."""

    mpiexec: subprocess.Popen[bytes]
    mark: str
    limit_s: float  # in which ranks start
    started: bool = False
    ended: dict[int, int] = field(default_factory=dict)  # status by rank, of those that failed
    heard: list[int] = field(default_factory=list)
    first_s: float = 0.0  # when the first one failed
    ending: bool = False

    def send_signal(self, number: int) -> None:
        """Called in a signal's handler."""
        again = number in self.heard and number in (signal.SIGTERM, signal.SIGINT)
        self.heard.append(number)
        self.ending = self.ending or again
        self.mpiexec.send_signal(signal.SIGTERM if again else signal.SIGUSR1)

    def wait(self) -> int:
        """The job's exit status."""
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        began = time.monotonic()
        with signals_to(self):
            while self.mpiexec.poll() is None:
                if not self.started and time.monotonic() - began > self.limit_s:
                    self._end()
                if self.first_s and time.monotonic() - self.first_s > _GRACE_S:
                    self._end()
                time.sleep(_POLL_S)
        reader.join(_END_S)
        for status in sorted(set(self.ended.values()) - set(_SPOKEN)):
            ranks = [str(rank) for rank, other in sorted(self.ended.items()) if other == status]
            say(f"ended with status {status}: rank {', '.join(ranks)}")
        status = shell_status(self.mpiexec.returncode)
        if self.ended:
            return max(self.ended.values())
        if self.heard and status != 0:
            return 128 + self.heard[-1]
        if not self.started:
            limit = f" in {self.limit_s:g} s (KNL_START_TIMEOUT_S)" if self.ending else ""
            raise FailedError(
                f"no rank has started{limit}: can each host of the hostfile be reached by ssh "
                "without a password, and does it have this folder and this Python?"
            )
        return status

    def _read(self) -> None:
        """Hand on what the ranks write, but for their shells' own lines."""
        assert self.mpiexec.stderr is not None  # opened as a pipe
        told = re.compile(
            rf"(\[[\d,]+\](<stderr>:)?\s*)?{self.mark} (\d+) (started|\d+)\s*".encode()
        )
        for line in self.mpiexec.stderr:
            for _, _, rank, what in told.findall(line):
                self.started = True
                if what != b"started" and not self.ending:
                    self.ended[int(rank)] = int(what)
                    self.first_s = self.first_s or time.monotonic()
            if rest := told.sub(b"", line):
                with contextlib.suppress(OSError):  # `| head` has read enough
                    sys.stderr.buffer.write(rest)
                    sys.stderr.buffer.flush()

    def _end(self) -> None:
        self.ending = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            self.mpiexec.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.mpiexec.wait(timeout=_END_S)
                return
