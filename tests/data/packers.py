"""`knl data pack` as a command, of many small shards, and what must be the same after it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from knl.data.pack.shards import PARTS

from ..mpi.launch import Job, run, started

# What is planned is planned by the command itself, not by its processes: so this reaches all.
_MANY_SHARDS = "from knl.data.pack import plan; plan._LEAST_SHARD, plan._SHARDS = 20_000, 12; "
NO_ROOM_CHECK = "from knl.data.pack import run; run._require_room = lambda *any: None; "
_MAIN = "from knl.cli import main; main()"
FORM = ("--short-side", "96")
PATIENCE_S = 60.0  # bounds a test that hangs


def command(source: Path, folder: Path, *options: str, patch: str = "") -> list[str]:
    """The command line that packs."""
    program = _MANY_SHARDS + patch + _MAIN
    arguments = ["data", "pack", str(source), str(folder), *FORM, *options]
    return [sys.executable, "-c", program, *arguments]


def pack(source: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Pack to the end, which must be a good one."""
    done = run(command(source, folder, *options), timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    return done


def refused(line: list[str], code: int) -> str:
    """The one line that a command fails with."""
    done = run(line, timeout=PATIENCE_S)
    assert done.returncode == code, done.stderr
    return one_line(done)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """What went wrong, of a command that said so in one line."""
    assert done.stdout == "" and "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "in whole shards already" not in line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@contextlib.contextmanager
def packing(source: Path, folder: Path, *options: str, patch: str = "") -> Iterator[Job]:
    """A packer in the midst of its work: a few shards are whole and most are not."""
    with started(command(source, folder, *options, patch=patch)) as job:
        while len(whole(folder)) < 3:
            assert job.process.poll() is None, job.process.communicate()
        yield job


def workers(job: Job) -> list[int]:
    """The processes that pack shards."""
    return [pid for pid in job.processes() if b"spawn_main" in _arguments(pid)]


def whole(folder: Path) -> dict[str, int]:
    """When each shard with a note, which is so whole, was written."""
    notes = (folder / PARTS).glob("*.json")
    return {note.stem: (folder / f"{note.stem}.arrow").stat().st_mtime_ns for note in notes}


def times(folder: Path) -> dict[str, int]:
    """When each shard of a finished set was written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}


def _arguments(pid: int) -> bytes:
    with contextlib.suppress(OSError):  # it has just ended
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
