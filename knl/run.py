"""`knl run`: starts the ranks of a node under a plan, or becomes the one that a launcher made."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

import psutil

from knl.bind import bind, bound, rank_environment
from knl.comm.world import World
from knl.config import Recipe
from knl.errors import InputError, say
from knl.launch import mpi_environment, shell_status
from knl.plan import Plan
from knl.profile import plan_of_rank
from knl.proof import Proof, prove, watch
from knl.sysfs import read_topology

_POLL_S = 0.05
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def become(
    plan: Plan,
    number: int,
    command: Sequence[str],
    environment: Mapping[str, str],
    where: str,
    verify: bool,
) -> NoReturn:
    """Turn this process into rank `number` of the plan, running `command`. Does not return.
    `where`: the plan comes from.

    Raises InputError when there is no such program.
    """
    rank = plan.ranks[number]
    program = find_program(command[0])
    if refused := bind(rank):
        say(f"rank {number}: {refused}")
    if verify:
        _start_watcher(plan, number)
    for ignored in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python, and exec would hand that on
        signal.signal(ignored, signal.SIG_DFL)
    try:
        os.execve(program, list(command), {**environment, **rank_environment(plan, rank, where)})
    except OSError as error:
        raise _cannot_start(program, error) from None


def become_planned(world: World, profile: Path | None, recipe: Recipe | None = None) -> NoReturn:
    """Start this very command again as the rank that it is, bound and in the plan's environment: an
    OpenMP runtime, an allocator and the dynamic loader read their settings only when a process
    starts. `profile`, `recipe`: as for knl.profile.plan_for."""
    environment = dict(os.environ)
    if world.launcher == "mpi":
        environment.update(mpi_environment(environment))
    plan, number, where = plan_of_rank(read_topology(), world, profile, environment, recipe)
    command = [sys.executable, "-m", "knl", *sys.argv[1:]]
    become(plan, number, command, environment, where, verify=False)


def start(
    plan: Plan,
    command: Sequence[str],
    environment: Mapping[str, str],
    where: str,
    verify: bool,
    prefix: bool,
) -> int:
    """Run `command` once for each rank of the plan; return the worst exit status, 128 + n for one
    ended by signal n. A signal to this process reaches all ranks.

    The ranks find each other by torchrun's variables (RANK, MASTER_ADDR, ...). `prefix`: put the
    rank before each line of output. Raises InputError when there is no such program.
    """
    program = find_program(command[0])
    size = len(plan.ranks)
    port = str(_free_port())
    ranks: list[subprocess.Popen[bytes]] = []
    with _signals_to(ranks):
        for rank in plan.ranks:
            number = str(rank.local_rank)
            mine: dict[str, str] = {}
            if size > 1:
                mine = {"RANK": number, "LOCAL_RANK": number, "MASTER_ADDR": "127.0.0.1"}
                mine.update(WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), MASTER_PORT=port)
            pipe = subprocess.PIPE if prefix else None
            with bound(rank) as refused:
                try:
                    process = subprocess.Popen(
                        [program, *command[1:]],
                        env={**environment, **rank_environment(plan, rank, where), **mine},
                        stdin=None if rank.local_rank == 0 else subprocess.DEVNULL,
                        stdout=pipe,
                        stderr=pipe,
                        start_new_session=True,  # a signal then reaches all that the rank started
                    )
                except OSError as error:
                    raise _cannot_start(program, error) from None
                ranks.append(process)
            if refused:
                say(f"rank {number}: {refused}")
        copiers = _copy_with_prefix(ranks) if prefix else []
        proven = _prove(plan, ranks) if verify else True
        worst = _wait(ranks)
        for copier in copiers:
            copier.join()
    return worst if proven else max(1, worst)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait for all; tell of each that fails when it does: the others may wait for it in vain."""
    running = dict(enumerate(ranks))
    worst = 0
    while running:
        for number, rank in list(running.items()):
            returned = rank.poll()
            if returned is not None:
                status = shell_status(returned)
                if status != 0 and len(ranks) > 1:
                    say(f"rank {number} ended with status {status}")
                worst = max(worst, status)
                del running[number]
        time.sleep(_POLL_S)
    return worst


def _prove(plan: Plan, ranks: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Print the proof table; end ranks that are not where the plan has them."""
    processes = {number: rank.pid for number, rank in enumerate(ranks)}
    seen = watch(plan, processes, lambda: any(rank.poll() is None for rank in ranks))
    proof = prove(plan, seen)
    _tell(proof, f"{len(ranks)} rank(s)")
    if proof.errors:
        for rank in ranks:
            _send(rank, signal.SIGTERM)
    return not proof.errors


def _start_watcher(plan: Plan, number: int) -> None:
    """A process that proves the rank which this one becomes, and ends it where it is elsewhere. It
    is a grandchild: a program that waits for all of its children should not meet it."""
    rank = psutil.Process()
    if child := os.fork():
        os.waitpid(child, 0)
        return
    if os.fork():
        os._exit(0)
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever reads the rank waits for no other
        seen = watch(plan, {number: rank.pid}, lambda: _runs(rank))
        proof = prove(plan, seen)
        _tell(proof, f"rank {number}")
        if proof.errors and _runs(rank):
            rank.terminate()
    except Exception as error:
        say(f"rank {number} is not proven: {type(error).__name__}: {error}")
    finally:
        os._exit(0)


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _tell(proof: Proof, who: str) -> None:
    lines = [proof.table(), *(f"knl: {error}" for error in proof.errors)]
    if not proof.errors:
        lines.append(f"knl: every thread of {who} is inside its CPUs")
    print("\n".join(lines), file=sys.stderr, flush=True)


def find_program(program: str) -> str:
    """Its path. Raises InputError when there is no such program."""
    found = shutil.which(program)
    if found is None:
        raise InputError(f"{program}: no such program on PATH; give its path after --")
    return found


def _cannot_start(program: str, error: OSError) -> InputError:
    return InputError(
        f"{program}: cannot be started: {error.strerror}; is it a program for this machine, or a "
        "script whose first line names its interpreter?"
    )


@contextlib.contextmanager
def _signals_to(ranks: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    def pass_on(number: int, _: object) -> None:
        for rank in ranks:
            _send(rank, number)

    # One that nohup or a script's & told to ignore stays ignored.
    passed_on = [n for n in _PASSED_ON if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in passed_on}
    try:
        yield
    except BaseException:
        for rank in ranks:
            _send(rank, signal.SIGKILL)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(rank: subprocess.Popen[bytes], number: int) -> None:
    """To the whole process group: a script's own children, too."""
    if rank.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.pid, number)


def _copy_with_prefix(ranks: Sequence[subprocess.Popen[bytes]]) -> list[threading.Thread]:
    lock = threading.Lock()

    def copy(number: int, source: IO[bytes], target: IO[bytes]) -> None:
        with source:
            for line in source:
                with lock, contextlib.suppress(BrokenPipeError):  # `| head` has read enough
                    target.write(b"[%d] " % number + line)
                    target.flush()

    copiers = []
    for number, rank in enumerate(ranks):
        for source, target in ((rank.stdout, sys.stdout.buffer), (rank.stderr, sys.stderr.buffer)):
            assert source is not None  # opened as a pipe
            copiers.append(threading.Thread(target=copy, args=(number, source, target)))
            copiers[-1].start()
    return copiers


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
