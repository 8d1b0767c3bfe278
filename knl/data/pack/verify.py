"""`knl data verify`: whether every byte of a packed set is as it was packed, and can be used."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import simplejpeg

from knl.data.packed_set import Meta, Record, Records, Shard, Split, read_index
from knl.errors import InputError

_BLOCK = 1 << 22
_TOGETHER = 64  # records read at once


class Fault(NamedTuple):
    """What is wrong with a shard, or with one of its records."""

    split: str
    shard: str
    record: int | None
    reason: str


def verify(folder: Path, meta: Meta, done: Callable[[int], None]) -> list[Fault]:
    """Every fault of a set. `done` is called with the number of records that were looked at."""
    faults: list[Fault] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for name, split in meta.splits.items():
            try:
                records = Records(folder, split, read_index(folder, name, split))
            except InputError as error:
                faults.append(Fault(name, split.index, None, str(error)))
                continue
            looks = [
                threads.submit(_verify_shard, records, meta, name, number, done)
                for number in range(len(split.shards))
            ]
            for look in looks:
                faults += look.result()
            records.close()
    return faults


def _verify_shard(
    records: Records, meta: Meta, split: str, number: int, done: Callable[[int], None]
) -> list[Fault]:
    shard = records.split.shards[number]
    rows = np.flatnonzero(records.index["shard"] == number)
    path = records.folder / shard.file
    try:
        size, crc32 = path.stat().st_size, _crc32_of(path)
    except OSError as error:
        return [Fault(split, shard.file, None, error.strerror or "cannot be read")]
    faults = list(_record_faults(records, meta, split, shard, rows.tolist(), done))
    if size != shard.bytes:
        reason = f"{size} bytes, was packed with {shard.bytes}"
        faults.insert(0, Fault(split, shard.file, None, reason))
    elif crc32 != shard.crc32 and not faults:
        reason = "checksum of the file, outside its records (Arrow's own bytes, keys)"
        faults.append(Fault(split, shard.file, None, reason))
    elif crc32 == shard.crc32:
        # Only of a whole file: what Arrow makes of damaged ones is its own affair.
        faults += [Fault(split, shard.file, None, r) for r in _arrow_faults(path, shard)]
    return faults


def _record_faults(
    records: Records,
    meta: Meta,
    split: str,
    shard: Shard,
    rows: list[int],
    done: Callable[[int], None],
) -> Iterator[Fault]:
    for start in range(0, len(rows), _TOGETHER):
        some = rows[start : start + _TOGETHER]
        for place, record in enumerate(records.read(np.array(some)), start):
            if reason := record.fault or _unusable(record, meta):
                yield Fault(split, shard.file, place, reason)
        done(len(some))


def _unusable(record: Record, meta: Meta) -> str:
    if not 0 <= record.label < len(meta.classes):
        return f"label {record.label}: must be 0 to {len(meta.classes) - 1}"
    if meta.kind == "raw":
        wanted = meta.side * meta.side * 3
        return f"{len(record.data)} bytes, not {wanted}" if len(record.data) != wanted else ""
    try:
        simplejpeg.decode_jpeg(record.data)
    except ValueError as error:
        return f"does not decode: {error}"
    return ""


def _arrow_faults(path: Path, shard: Shard) -> Iterator[str]:
    """Whether others can read the shard, as Arrow."""
    try:
        with pa.memory_map(str(path)) as file:
            reader = pa.ipc.open_file(file)
            batches = range(reader.num_record_batches)
            rows = sum(reader.get_batch(number).num_rows for number in batches)
    except pa.ArrowException as error:
        yield f"is not Arrow: {' '.join(str(error).split())}"
        return
    if rows != shard.records:
        yield f"{rows} records in Arrow's eyes, {shard.records} in meta.json's"


def _crc32_of(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            crc32 = zlib.crc32(block, crc32)
    return crc32


def count_records(splits: dict[str, Split]) -> int:
    """Of all splits."""
    return sum(split.records for split in splits.values())
