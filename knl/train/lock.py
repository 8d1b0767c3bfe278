"""A lock on a run directory: two jobs that train into one would destroy both.

A file names its owner, who writes a new number into it every few seconds. Clocks of hosts are not
compared, and no file system's own locks are needed: many clusters mount theirs without.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

import msgspec

from knl.errors import InputError, say

_BEAT_S = 5.0
_PATIENCE_S = 30.0  # in which a living owner on another host has written, whatever caches there are
_POLL_S = 1.0
_TOOL_S = 10.0


class Owner(msgspec.Struct, frozen=True):
    """Who trains into a run directory. `started`: the process's start, in ticks since the boot;
    `pids`: its space of process numbers."""

    host: str
    boot: str
    pids: str
    pid: int
    started: str
    cluster: str
    job: str
    restarts: str
    token: str
    beat: int = 0

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on host {self.host}{job}"


class Lock:
    """A run directory's lock, held. Raises InputError naming the owner where another job has it,
    OSError where it cannot be written."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.path = folder / "lock"
        self._owner = _myself(environment)
        while not self._create():
            self._require_stale()
        self._done = threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def lost(self) -> bool:
        """Whether the file is no longer this job's: removed, or taken over by another job."""
        try:
            return not os.path.samestat(self.path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True
        except OSError:
            return False  # the file system may come back

    def release(self) -> None:
        """Let the next job have it."""
        self._done.set()
        self._beats.join(_POLL_S)  # it may hang in a file system that does
        with contextlib.suppress(OSError), self._file:
            if not self.lost():
                self.path.unlink()

    def _create(self) -> bool:
        try:
            file = self.path.open("xb")
        except FileExistsError:
            return False
        try:
            file.write(msgspec.json.encode(self._owner))
            file.flush()
        except OSError:
            self.path.unlink()
            with contextlib.suppress(OSError):
                file.close()
            raise
        # Held open, so that no other file can get its number. Asked of the path it could be another
        # job's already.
        self._file = file
        return True

    def _beat(self) -> None:
        """The text only grows, so no reader finds the end of a longer one behind it."""
        number = 0
        while not self._done.wait(_BEAT_S):
            number += 1
            text = msgspec.json.encode(msgspec.structs.replace(self._owner, beat=number))
            with contextlib.suppress(OSError):
                if not self.lost():
                    with self.path.open("r+b", buffering=0) as file:
                        file.write(text)

    def _require_stale(self) -> None:
        """Remove a lock whose owner is gone. Raises InputError where it is not."""
        owner = _read(self.path)
        if owner is None:  # just being written or removed, or never finished
            time.sleep(_POLL_S)
            owner = _read(self.path)
        if owner is not None and (alive := _alive_here(owner)) is not None:
            stale = not alive
        elif owner is not None and _job_is_over(owner, self._owner):
            stale = True
        else:
            stale = self._is_silent(owner)
        if not stale:
            raise InputError(
                f"run directory {self.path.parent} is in use by {owner or 'another job'}: wait for "
                "its end or give another --run-dir"
            )
        self._put_aside(owner)

    def _is_silent(self, owner: Owner | None) -> bool:
        """Whether nothing is written for as long as a living owner would never take."""
        say(
            f"{self.path} is of {owner or 'an unknown job'}: waiting {_PATIENCE_S:g} s to see "
            "whether that still runs"
        )
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline:
            time.sleep(_POLL_S)
            if self.path.exists() and _read(self.path) != owner:
                return False
        return True

    def _put_aside(self, owner: Owner | None) -> None:
        """Another job may have come first: what is removed must be what was judged."""
        aside = self.path.with_name(f"lock.{uuid.uuid4().hex}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        found = _read(aside)
        if (found.token if found else "") != (owner.token if owner else ""):
            with contextlib.suppress(OSError):
                os.link(aside, self.path)
        aside.unlink()


def is_held(folder: Path) -> bool | None:
    """Whether a living process trains into a run directory; None where that is on another host and
    cannot be seen from here."""
    owner = _read(folder / "lock")
    return _alive_here(owner) if owner else False


def _myself(environment: Mapping[str, str]) -> Owner:
    return Owner(
        host=platform.node(),
        boot=_line("/proc/sys/kernel/random/boot_id"),
        pids=_pid_space(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        cluster=environment.get("SLURM_CLUSTER_NAME", ""),
        job=environment.get("SLURM_JOB_ID", ""),
        restarts=environment.get("SLURM_RESTART_COUNT", "0"),
        token=uuid.uuid4().hex,
    )


def _alive_here(owner: Owner) -> bool | None:
    """Whether the owner runs; None where that cannot be seen from here."""
    if owner.host != platform.node():
        return None
    if owner.boot != _line("/proc/sys/kernel/random/boot_id"):
        return False  # the host has started anew
    if owner.pids != _pid_space():
        return None
    return _started(owner.pid) == owner.started


def _job_is_over(owner: Owner, mine: Owner) -> bool:
    """Whether Slurm says so: the job is not there any more, or it is this one, queued again."""
    # Another cluster's Slurm, on the same file system, may have the same numbers.
    if not owner.job or not mine.job or owner.cluster != mine.cluster:
        return False
    if owner.job == mine.job:
        return owner.restarts != mine.restarts
    squeue = shutil.which("squeue")
    if squeue is None:
        return False
    command = [squeue, "--noheader", "--format=%T", "--jobs", owner.job]
    try:
        # By its path and without closing files: then Python spawns it, where a fork would be
        # unsafe after the start of MPI.
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TOOL_S, check=False, close_fds=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    unknown = done.returncode != 0 and "Invalid job id" in done.stderr
    return unknown or (done.returncode == 0 and not done.stdout.strip())


def _read(path: Path) -> Owner | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Owner)
    except (OSError, msgspec.MsgspecError):
        return None


def _started(pid: int) -> str:
    """When a process of this host started, in ticks since the boot; "" when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _pid_space() -> str:
    with contextlib.suppress(OSError):
        return str(Path("/proc/self/ns/pid").readlink())
    return ""


def _line(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""
