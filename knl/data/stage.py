"""Copies what a node reads of a packed set to storage of its own.

The copies are sparse: as long as the shards and with the same bytes at the same places, but only
those of records that are needed, so they are read like the shards themselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from knl.data.lanes import Lanes
from knl.data.packed_set import Records, runs_of

_BLOCK = 1 << 22
# Of the free space: what others may write meanwhile, and the file system's own.
_SPARE = 0.05
_PREFIX, _LOCK = "knl-stage-", "lock"


class NotStaged(Exception):
    """Why a set is read in place."""


def needed_records(lanes: Lanes, mine: Iterable[int], steps: range) -> NDArray[Any]:
    """Which records these lanes read within these steps of the run, ascending."""
    mine = list(mine)
    needed = np.zeros(lanes.samples, dtype=bool)
    each = lanes.steps_per_epoch
    for epoch in range(steps.start // each, -(-steps.stop // each)):
        first = max(0, steps.start - epoch * each)
        last = min(each, steps.stop - epoch * each)
        for lane in mine:
            needed[lanes.run(epoch, lane, first, last)] = True
    return np.flatnonzero(needed)


@dataclass(frozen=True)
class Copy:
    """A folder with copies. `lock`: tells others on the node that it is in use."""

    folder: Path
    lock: IO[bytes]

    def remove(self) -> None:
        """What has it open reads on."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.lock.close()


def stage(records: Records, needed: NDArray[Any], place: Path) -> Copy:
    """Copy the needed records into a new folder below `place`. Raises NotStaged, leaving nothing,
    where there is no room or the copy fails."""
    rows = records.index[needed]
    size = int(rows["length"].sum())
    try:
        _remove_orphans(place)
        free = shutil.disk_usage(place).free
        if size > free * (1 - _SPARE):
            raise NotStaged(f"{size / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free in {place}")
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        copy = Copy(folder, (folder / _LOCK).open("wb"))
        fcntl.flock(copy.lock, fcntl.LOCK_EX)
    except OSError as error:
        raise NotStaged(f"{place}: {error.strerror}") from None
    try:
        for number, shard in enumerate(records.split.shards):
            mine = rows[rows["shard"] == number]
            _copy(records.folder / shard.file, folder / shard.file, shard.bytes, _spans(mine))
    except OSError as error:
        copy.remove()
        raise NotStaged(f"{error.filename or folder}: {error.strerror}") from None
    return copy


def _remove_orphans(place: Path) -> None:
    """Copies of jobs that were killed while they copied: nobody holds their locks."""
    for folder in place.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _spans(rows: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """Begin and end of bytes that lie together."""
    for first, last in runs_of(rows):
        yield int(rows["start"][first]), int(rows["start"][last - 1] + rows["length"][last - 1])


def _copy(source: Path, target: Path, size: int, spans: Iterable[tuple[int, int]]) -> None:
    with source.open("rb", buffering=0) as here, target.open("xb", buffering=0) as there:
        os.truncate(there.fileno(), size)
        for begin, end in spans:
            here.seek(begin)
            there.seek(begin)
            while begin < end and (block := here.read(min(_BLOCK, end - begin))):
                there.write(block)
                begin += len(block)
