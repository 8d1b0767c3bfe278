"""Segments in /dev/shm that a process which is about to be killed would leave behind.

Intel MPI's start makes one under a random name and removes the name when all ranks have come.
libiomp5 keeps one under the number of its process until that ends in order.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

# Its own names alone: a user's files may lie and be mapped there as well.
_SEGMENT = re.compile(r"/dev/shm/Intel_MPI_\w+")


def segments_of(pid: int | str) -> dict[Path, int]:
    """The segments of Intel MPI that a process ("self": this one) has mapped, each with its inode,
    by which it is known to be the same when it is removed."""
    found: dict[Path, int] = {}
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and _SEGMENT.fullmatch(fields[5]):
                found[Path(fields[5])] = int(fields[4])
    return found


def remove_segments(segments: Mapping[Path, int]) -> None:
    """Remove those that still have a name."""
    for path, inode in segments.items():
        with contextlib.suppress(OSError):
            if path.stat().st_ino == inode:
                path.unlink()


def remove_openmp_segments(pids: Iterable[int]) -> None:
    """Remove libiomp5's of those of these processes that are gone."""
    for pid in pids:
        if not Path(f"/proc/{pid}").exists():
            path = Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}")
            with contextlib.suppress(OSError):  # mostly there is none
                path.unlink()
