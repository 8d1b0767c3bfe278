"""Watches the ranks that an mpiexec on this host started, and ends them when one of them dies.

mpiexec itself does so only once the ranks have met in MPI, and then does not tell which died first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from knl.comm.roll_call import state_of
from knl.errors import say
from knl.leftovers import remove_openmp_segments, remove_segments, segments_of

_POLL_S = 0.1
_SIGNAL_GRACE_S = 1.0  # an abort kills the ranks, too: then none is left to be ended
_STATUS_GRACE_S = 5.0  # for the others to fail by themselves
_END_S = 10.0
_START_S = 60.0  # in which rank 0 comes to MPI
_STOPPED_S = 5.0  # for which a rank has been stopped, so that it does not hear a signal
_STATE, _PARENT, _START, _STATUS = 0, 1, 19, -1  # fields of /proc/PID/stat
_SPOKEN = (1, 2, 75)  # statuses with which a rank has said why
_EARLY = 75  # stopped with nothing lost
_SHARED_LEAST = 4 << 20  # bytes that a small job takes of shared memory


@dataclass
class RanksWatch:
    """The ranks below `mpiexec`, which is not to clean up by itself."""

    mpiexec: subprocess.Popen[bytes]
    ranks: int
    pids: dict[int, int] = field(default_factory=dict)  # by rank
    ended: dict[int, int] = field(default_factory=dict)  # by rank: as waitpid has it
    segments: dict[Path, int] = field(default_factory=dict)  # in shared memory, by inode
    orders: list[int] = field(default_factory=list)  # signals, not yet passed on
    heard: list[int] = field(default_factory=list)  # signals that were passed on
    stopped_s: float = 0.0  # since when a rank is stopped

    def send_signal(self, number: int) -> None:
        """Pass a signal on to the ranks, which stop in order. Called in a signal's handler."""
        self.orders.append(number)

    def wait(self) -> tuple[int, str]:
        """mpiexec's status, and which rank died when one did: "" where the ranks speak for
        themselves."""
        status, dead = self._watch()
        remove_segments(self.segments)
        remove_openmp_segments(self.pids.values())
        return status, dead

    def _watch(self) -> tuple[int, str]:
        first_s, dead = 0.0, ""
        began = time.monotonic()
        while self.mpiexec.poll() is None:
            if len(self.pids) < self.ranks:
                self._find()
            if not self.segments and time.monotonic() - began < _START_S:
                self._note_segments()
            if reason := self._pass_orders_on():
                self._end()
                return 1, reason
            bad = {rank: status for rank, status in self._ended().items() if status != 0}
            if not bad:
                time.sleep(_POLL_S)
                continue
            first_s = first_s or time.monotonic()
            rank, status = next(iter(bad.items()))
            early = self._died_of_order(status)
            dead = dead or ("" if early else _how(rank, status))
            grace = _SIGNAL_GRACE_S if os.WIFSIGNALED(status) else _STATUS_GRACE_S
            if time.monotonic() - first_s > grace and len(self.ended) < len(self.pids):
                self._end()
                return self._status(1 if dead else os.WEXITSTATUS(status), early), dead
            time.sleep(_POLL_S)
        code = self.mpiexec.returncode
        early = any(self._died_of_order(status) for status in self._ended().values())
        # Before the ranks have met in MPI it may be gone before their ends were seen.
        early = early or bool(self.heard and not dead and code not in (0, *_SPOKEN))
        status = self._status(code, early)
        return status, dead if status not in (0, *_SPOKEN) else ""

    def _pass_orders_on(self) -> str:
        """Why the ranks cannot be waited for any more: a second SIGINT or SIGTERM, or a rank that
        is stopped, without which the others do not come to the step after which all stop. Else
        ""."""
        orders, self.orders = self.orders, []
        if orders and not self.pids:  # the ranks have not been started yet
            for name in ("SIGINT", "SIGTERM"):
                if orders.count(signal.Signals[name]) > 1:
                    return f"{name} came a second time"
            self.orders = [*orders, *self.orders]
            return ""
        for number in orders:
            if number in self.heard and number in (signal.SIGINT, signal.SIGTERM):
                return f"{signal.Signals(number).name} came a second time"
            self.heard.append(number)
            for rank, pid in self.pids.items():
                if rank not in self.ended:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
        return self._stopped_rank() if self.heard else ""

    def _stopped_rank(self) -> str:
        """Which rank has been stopped for a while; "" when none has."""
        stopped = [rank for rank, pid in self.pids.items() if state_of(pid) == "stopped"]
        if not stopped:
            self.stopped_s = 0.0
            return ""
        self.stopped_s = self.stopped_s or time.monotonic()
        if time.monotonic() - self.stopped_s < _STOPPED_S:
            return ""
        rank = stopped[0]
        return f"rank {rank} is stopped (pid {self.pids[rank]}), so the job cannot stop in order"

    def _died_of_order(self, status: int) -> bool:
        """A rank that does not listen yet has not begun to train."""
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) in self.heard

    def _status(self, status: int, early: bool) -> int:
        if not early:
            return status
        say(
            "ended by the signal before the ranks listened to it: start the same command again, it "
            "goes on from its newest checkpoint"
        )
        return _EARLY

    def _find(self) -> None:
        """The ranks are the children of mpiexec's child, which starts them in their order. One that
        is dead already has no variables left to tell its number."""
        stats = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                stats[int(process.name)] = _stat(int(process.name))
        helpers = {pid for pid, stat in stats.items() if int(stat[_PARENT]) == self.mpiexec.pid}
        found = [pid for pid, stat in stats.items() if int(stat[_PARENT]) in helpers]
        if len(found) == self.ranks:
            found.sort(key=lambda pid: (int(stats[pid][_START]), pid))
            self.pids = dict(enumerate(found))

    def _note_segments(self) -> None:
        """A rank killed while MPI starts leaves what it has made for the others."""
        for pid in self.pids.values():
            self.segments.update(segments_of(pid))

    def _ended(self) -> dict[int, int]:
        """Ranks that have ended, the first to be seen first. They stay zombies as long as others
        run, so that their status can be read."""
        for rank, pid in self.pids.items():
            if rank not in self.ended:
                with contextlib.suppress(OSError):
                    stat = _stat(pid)
                    if stat[_STATE] == "Z":
                        self.ended[rank] = int(stat[_STATUS])
        return self.ended

    def _end(self) -> None:
        """A stopped rank obeys SIGKILL alone; mpiexec ends when they have."""
        self._note_segments()
        for rank, pid in self.pids.items():
            if rank not in self.ended:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                self.mpiexec.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                self.mpiexec.send_signal(number)
        self.mpiexec.wait()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _how(rank: int, status: int) -> str:
    """How a rank ended, where it has not said so itself."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        memory = ", out of memory?" if number == signal.SIGKILL else ""
        return f"rank {rank} was killed by signal {number} ({signal.strsignal(number)}{memory})"
    code = os.WEXITSTATUS(status)
    return "" if code in _SPOKEN else f"rank {rank} ended with status {code}"


def job_status(status: int, dead: str) -> int:
    """The job's exit status from mpiexec's; tells what no rank has told. mpiexec joins the ranks'
    statuses bit by bit."""
    if dead:
        say(f"{dead}: the job was ended; {_no_room() or 'see to the cause'}, then start it again")
        return 1
    if status in (0, *_SPOKEN):
        return status
    if status != 3:  # 1 and 2: ranks have said why
        cure = f"{reason}, then " if (reason := _no_room()) else ""
        say(f"the ranks ended with status {status}: the job failed, {cure}start it again")
    return 1


def _no_room() -> str:
    """What to do where ranks cannot share memory: MPI dies of it without a word."""
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        if free < _SHARED_LEAST:
            return f"make room in /dev/shm, which has {free >> 10} KiB and MPI needs more"
    return ""
