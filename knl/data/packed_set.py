"""A packed set on disk: a few large files that hold all pictures of a set, and where each is.

    meta.json              what is in it: classes, splits, shards, checksums (`Meta`)
    train-00000.arrow ...  shards: Arrow IPC files of about 1 GB (`knl.data.pack.shards`)
    train.index.npy        one row a record (`INDEX`): shard, place, length, label, checksum
    val-00000.arrow, val.index.npy
    rejected.jsonl         what was not taken, and why
    contact-sheet.png      some of it, to look at

Training reads records by the index alone, at their places in the shards: a damaged byte costs the
records that it is in, and a file that shrinks under a run an error and not the process, as it would
when mapped. Anyone else may map the shards with pyarrow.
"""

from __future__ import annotations

import io
import os
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta as Range
from numpy.typing import NDArray

from knl.errors import InputError

META, REJECTED, SHEET = "meta.json", "rejected.jsonl", "contact-sheet.png"
SCHEMA = 1
INDEX = np.dtype(
    [("shard", "<i4"), ("start", "<i8"), ("length", "<i4"), ("label", "<i4"), ("crc32", "<u4")]
)

_Count = Annotated[int, Range(ge=0)]


class Shard(msgspec.Struct, frozen=True):
    """A file of a split. `crc32`: of all its bytes."""

    file: str
    records: _Count
    bytes: _Count
    crc32: _Count


class Split(msgspec.Struct, frozen=True):
    """Records to train on or to test on. `per_class`: how many of each class."""

    records: _Count
    index: str
    index_crc32: _Count
    per_class: list[_Count]
    shards: list[Shard]


class Meta(msgspec.Struct, frozen=True):
    """What meta.json holds. `side`: pixels of a raw record's sides, of a JPEG's short side, 0 for
    JPEGs as they came; `quality`: of JPEGs that were encoded; `rejected`: pictures not taken;
    `clumped`: how often neighbours are of one class, over how often chance would have it; `crc32`:
    of all that with 0 in this place."""

    schema: int
    kind: Literal["jpeg", "raw"]
    side: _Count
    quality: _Count
    source: str
    classes: list[str]
    splits: dict[str, Split]
    rejected: _Count
    clumped: float
    crc32: _Count = 0

    def checksum(self) -> int:
        """What `crc32` must be."""
        return zlib.crc32(msgspec.json.encode(msgspec.structs.replace(self, crc32=0)))


def read_meta(folder: Path) -> Meta:
    """Raises InputError where there is no packed set, or it is not as it was packed."""
    path = folder / META
    try:
        meta = msgspec.json.decode(path.read_bytes(), type=Meta)
    except FileNotFoundError:
        raise InputError(
            f"{path} not found: data.path must be a folder that knl data pack made and finished"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged: {error}; pack the set again") from None
    if meta.schema != SCHEMA:
        raise InputError(f"{path}: schema = {meta.schema}: this version reads {SCHEMA}")
    if meta.crc32 != meta.checksum():
        raise InputError(f"{path} is damaged (checksum): copy it or pack the set again")
    for split in meta.splits.values():
        _require_plain([split.index, *(shard.file for shard in split.shards)], path)
    return meta


def read_index(folder: Path, name: str, split: Split) -> NDArray[Any]:
    """The rows of a split, `INDEX` [records]. Raises InputError naming the file."""
    path = folder / split.index
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if zlib.crc32(data) != split.index_crc32:
        raise InputError(f"{path} is damaged (checksum): pack the set again")
    index = np.load(io.BytesIO(data), allow_pickle=False)
    if index.dtype != INDEX or index.shape != (split.records,):
        raise InputError(f"{path}: {index.shape} rows, {META} says {split.records} of {name}")
    return index


@dataclass(frozen=True)
class Record:
    """One record as it was read. `fault`: why it cannot be used, "" where it can."""

    data: memoryview
    label: int
    fault: str = ""


@dataclass
class Records:
    """The records of one split, read in runs of neighbours. Safe to use from several threads."""

    folder: Path
    split: Split
    index: NDArray[Any]
    _files: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        return len(self.index)

    def read(self, numbers: NDArray[Any]) -> list[Record]:
        """The records with these numbers, each checked against its checksum."""
        rows = self.index[numbers]
        return [record for first, last in runs_of(rows) for record in self._run(rows[first:last])]

    def place(self, number: int) -> str:
        """Where a record is, for a reader: shard, and number within it."""
        shard = int(self.index["shard"][number])
        first = int(np.searchsorted(self.index["shard"], shard))
        return f"{self.folder / self.split.shards[shard].file} record {number - first}"

    def move(self, folder: Path) -> None:
        """Read from copies of the shards, which are all opened now and may lose their names. Raises
        OSError, and goes on as before, where one cannot be opened."""
        copies: dict[int, int] = {}
        try:
            for number, shard in enumerate(self.split.shards):
                copies[number] = os.open(folder / shard.file, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            for file in copies.values():
                os.close(file)
            raise
        with self._lock:
            before, self._files = self._files, copies
        for file in before.values():
            os.close(file)

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def _run(self, rows: NDArray[Any]) -> Iterator[Record]:
        """Neighbours in a file, by one read."""
        begin, end = int(rows["start"][0]), int(rows["start"][-1]) + int(rows["length"][-1])
        try:
            data, why = memoryview(self._read(int(rows["shard"][0]), begin, end - begin)), ""
        except OSError as error:
            if len(rows) > 1:  # one bad sector is not the fault of its neighbours
                for number in range(len(rows)):
                    yield from self._run(rows[number : number + 1])
                return
            data, why = memoryview(b""), error.strerror or "cannot be read"
        for _, start, length, label, crc32 in rows.tolist():
            part = data[start - begin : start - begin + length]
            fault = why or ("file too short" if len(part) < length else "")
            if not fault and record_crc32(part, label) != crc32:
                fault = "checksum"
            yield Record(part, label, fault)

    def _read(self, shard: int, start: int, length: int) -> bytes:
        file = self._file(shard)
        parts: list[bytes] = []
        while length > 0 and (part := os.pread(file, length, start)):
            parts.append(part)
            start, length = start + len(part), length - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _file(self, shard: int) -> int:
        with self._lock:
            if shard not in self._files:
                path = self.folder / self.split.shards[shard].file
                self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[shard]


def open_records(folder: Path, meta: Meta, name: str) -> Records:
    """A split to read from. Raises InputError where it is not there or a shard is not as it was
    packed (missing, of another size)."""
    if name not in meta.splits:
        raise InputError(
            f"{folder} has no split {name!r}, only {', '.join(meta.splits) or 'none'}: pack a "
            "folder that holds train and val"
        )
    split = meta.splits[name]
    if not split.records:
        raise InputError(f"{folder}: split {name!r} is empty: pack it from pictures")
    for shard in split.shards:
        path = folder / shard.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"shard {path}: {error.strerror}") from None
        if size != shard.bytes:
            raise InputError(
                f"shard {path}: {size} bytes, was packed with {shard.bytes}: copy or pack it again"
            )
    return Records(folder, split, read_index(folder, name, split))


def record_crc32(data: Any, label: int) -> int:
    """The checksum of a record: of its bytes and its label."""
    return zlib.crc32(label.to_bytes(4, "little", signed=True), zlib.crc32(data))


def runs_of(rows: NDArray[Any]) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) of rows that follow one another in a file."""
    follows = (rows["start"][1:] == rows["start"][:-1] + rows["length"][:-1]) & (
        rows["shard"][1:] == rows["shard"][:-1]
    )
    edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(rows)]
    return ((first, last) for first, last in zip(edges[:-1], edges[1:]) if last > first)


def _require_plain(names: list[str], path: Path) -> None:
    for name in names:
        if Path(name).name != name or name.startswith("."):
            raise InputError(f"{path}: {name!r}: not the name of a file beside it")
