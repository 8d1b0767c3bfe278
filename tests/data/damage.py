"""Packed sets that are damaged for a moment, and what they were."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from knl.data.packed_set import META, read_index, read_meta

fuzzed = settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
places = st.floats(0, 1, exclude_max=True)
bits = st.integers(0, 7)
KINDS = pytest.mark.parametrize("kind", ["jpeg", "raw"])


class Where(NamedTuple):
    """A record: split, number in it, file and number in that, and its bytes there."""

    split: str
    number: int
    file: str
    record: int
    bytes: range


def records_in(folder: Path) -> list[Where]:
    """All records of a whole set."""
    found = []
    for name, split in read_meta(folder).splits.items():
        rows = read_index(folder, name, split)
        for number, (shard, start, length, _, _) in enumerate(rows.tolist()):
            first = int(np.argmax(rows["shard"] == shard))
            span = range(start, start + length)
            found.append(Where(name, number, split.shards[shard].file, number - first, span))
    return found


def hit(folder: Path, file: str, places: Iterable[int]) -> list[Where]:
    """The records that have one of these bytes of a file."""
    return [
        where
        for where in records_in(folder)
        if where.file == file and any(place in where.bytes for place in places)
    ]


def files_of(folder: Path, *, meta: bool = False) -> list[str]:
    """Shards and indices, and meta.json as well."""
    found = [p.name for p in folder.iterdir() if p.suffix in (".arrow", ".npy")]
    return sorted([*found, META] if meta else found)


@contextlib.contextmanager
def changed(path: Path, data: bytes | None) -> Iterator[None]:
    """A file has other bytes, or is missing."""
    before = path.read_bytes()
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    """With one bit flipped."""
    changed = bytearray(data)
    changed[place] ^= 1 << bit
    return bytes(changed)


def copies(sets: Path, to: Path) -> Path:
    """Sets to damage."""
    for kind in ("jpeg", "raw"):
        shutil.copytree(sets / kind, to / kind)
    return to
