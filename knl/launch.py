"""Starts ranks: finds the MPI, sets up what it and oneCCL need, runs mpiexec."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from knl.errors import InputError
from knl.ranks_watch import RanksWatch, job_status

# Set in a process that was started again with the libraries' environment.
_READY = "KNL_ENVIRONMENT_READY"
# Intel MPI, Open MPI 4 and 5: each would bind ranks before these bind themselves.
UNPINNED = {
    "I_MPI_PIN": "0",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


@dataclass(frozen=True)
class Mpi:
    """An MPI installation. `kind`: intel, or other (any mpiexec on PATH); `root`: Intel MPI's."""

    kind: str
    mpiexec: Path
    root: Path


def find_mpi(environment: Mapping[str, str]) -> Mpi:
    """A site's Intel MPI where a module names one, else the pip-installed one, else PATH's mpiexec.

    Raises InputError when there is none.
    """
    site = environment.get("I_MPI_ROOT")
    for root in ([Path(site)] if site else []) + [Path(sys.prefix)]:
        for name in ("mpiexec.hydra", "mpiexec"):
            if (mpiexec := root / "bin" / name).exists() and _library_folders(root):
                return Mpi("intel", mpiexec, root)
    if found := shutil.which("mpiexec", path=environment.get("PATH")):
        return Mpi("other", Path(found), Path(found).parent.parent)
    raise InputError(
        "no MPI: there is no mpiexec in this Python's environment, in I_MPI_ROOT or on PATH; "
        "pip install '.[modern]' (or '.[knl]') in knl's folder brings one, or load your site's MPI "
        "module"
    )


def mpi_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank needs in order to load MPI and oneCCL, where the user has not set it: nobody
    sources Intel's scripts for a pip-installed MPI. Empty for an MPI that is not Intel's."""
    try:
        mpi = find_mpi(environment)
    except InputError:
        return {}  # whoever needs MPI will say that it is missing
    if mpi.kind != "intel":
        return {}
    folders = _library_folders(mpi.root)
    wanted = {
        "I_MPI_ROOT": str(mpi.root),
        "MPI4PY_LIBMPI": str(folders[0] / "libmpi.so.12"),
        "CCL_ATL_TRANSPORT": "mpi",
        # Its warnings are about workers and MPI's owner, which knl decides and reports itself.
        "CCL_LOG_LEVEL": "error",
    }
    if providers := _provider_folder(mpi.root):
        wanted["FI_PROVIDER_PATH"] = str(providers)
    additions = {key: value for key, value in wanted.items() if key not in environment}
    present = environment.get("LD_LIBRARY_PATH", "").split(":")
    missing = [str(folder) for folder in folders if str(folder) not in present]
    if missing:
        additions["LD_LIBRARY_PATH"] = ":".join([*missing, *filter(None, present)])
    return additions


def become_ready() -> None:
    """Start this very command again with `mpi_environment`, once: the dynamic loader reads its path
    only when a process starts. For ranks that srun, ibrun or mpirun started."""
    additions = mpi_environment(os.environ)
    if additions and _READY not in os.environ:
        environment = {**os.environ, **additions, _READY: "1"}
        os.execve(sys.executable, [sys.executable, "-m", "knl", *sys.argv[1:]], environment)


def launch(ranks: int, arguments: Sequence[str], columns: int | None, *, planned: bool) -> int:
    """Run `knl` with `arguments` as so many ranks on this host; return their exit status.

    `columns`: width of the terminal, None where there is none. `planned`: whether the ranks will
    bind themselves by a plan. Signals that end a job reach the ranks. Raises InputError when there
    is no MPI.
    """
    watched = find_mpi(os.environ).kind == "intel"
    command, environment = ranks_command(ranks, ["-m", "knl", *arguments], os.environ, planned)
    if not planned:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    if columns:
        environment["KNL_TERMINAL_COLUMNS"] = str(columns)
    if watched:
        command.insert(1, "-disable-auto-cleanup")  # RanksWatch does it
    try:
        # In a session of its own: mpiexec would kill the ranks at a terminal's Ctrl-C.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise InputError(f"{command[0]} does not start: {error.strerror}") from None
    with process:
        copier = threading.Thread(target=_copy_result, args=(process.stdout,), daemon=True)
        copier.start()
        watch = RanksWatch(process, ranks) if watched else None
        with signals_to(watch or process):
            status, dead = watch.wait() if watch else (process.wait(), "")
        copier.join()
    return job_status(shell_status(status), dead)


def ranks_command(
    ranks: int, arguments: Sequence[str], environment: Mapping[str, str], planned: bool
) -> tuple[list[str], dict[str, str]]:
    """The command that starts Python with `arguments` as so many MPI ranks on this host, and its
    environment. `planned`: they bind themselves, and MPI is not to. Raises InputError when there is
    no MPI."""
    mpi = find_mpi(environment)
    wanted = {**environment, **mpi_environment(environment), _READY: "1"}
    for name in [name for name in wanted if name.startswith("PMI")]:
        del wanted[name]  # an outer srun's: its PMI can be used once only, and not by ranks
    if mpi.kind == "intel":
        wanted.setdefault("I_MPI_FABRICS", "shm")  # one host needs no network
        wanted.setdefault("I_MPI_HYDRA_BOOTSTRAP", "fork")
    if planned:
        wanted = {**UNPINNED, **wanted}
    # In a Slurm job Intel's mpiexec would start the ranks on the job's nodes.
    here = ["-hosts", "localhost"] if mpi.kind == "intel" else []
    return [str(mpi.mpiexec), *here, "-n", str(ranks), sys.executable, *arguments], wanted


def _copy_result(pipe: IO[bytes]) -> None:
    """Hand on what the ranks print, which is a result; not mpiexec's box about ended ranks."""
    for line in pipe:
        if line.strip() and not line.startswith(b"="):
            sys.stdout.buffer.write(line)
            sys.stdout.buffer.flush()


class _Receiver(Protocol):
    def send_signal(self, number: int, /) -> None: ...


@contextlib.contextmanager
def signals_to(receiver: _Receiver) -> Iterator[None]:
    """Pass on the signals that end a job. A terminal that goes away ends it, too."""
    ends = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    passed_on = {number: number for number in ends}
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        passed_on[signal.SIGHUP] = signal.SIGTERM
    before = {number: signal.getsignal(number) for number in passed_on}
    for number in passed_on:
        signal.signal(number, lambda got, _: receiver.send_signal(passed_on[signal.Signals(got)]))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def shell_status(returncode: int) -> int:
    """The exit status that a shell would tell: 128 + n for a process ended by signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def _library_folders(root: Path) -> list[Path]:
    """Where libmpi and libfabric are: release 2021.8 keeps libfabric in a folder of its own."""
    folders = [root / "lib", root / "lib" / "release", root / "lib" / "libfabric"]
    folders += [root / "libfabric" / "lib", root / "opt" / "mpi" / "libfabric" / "lib"]
    libraries = ("libmpi.so.12", "libfabric.so.1")
    found = [f for f in folders if any((f / library).exists() for library in libraries)]
    return found if found and (found[0] / libraries[0]).exists() else []


def _provider_folder(root: Path) -> Path | None:
    """The folder of libfabric's providers, known by the TCP one."""
    for folder in _library_folders(root):
        for candidate in (folder / "prov", folder):
            if (candidate / "libtcp-fi.so").exists():
                return candidate
    return None
