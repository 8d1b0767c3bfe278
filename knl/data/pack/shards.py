"""Writes one shard of a packed set: an Arrow IPC file, and beside it a note of what is in it.

Columns: `image` (binary: a JPEG; or of fixed size: uint8 [side, side, 3]), `label` (int32), `key`
(where the picture came from), `crc32` (of image and label).
"""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from knl.data.pack.convert import Form, Rejected, convert
from knl.data.pack.sources import Item, Reader
from knl.data.packed_set import INDEX, Shard, record_crc32
from knl.errors import FailedError
from knl.files import replace_file, sync_folder

PARTS = "parts"  # notes of shards until the set is finished
_BATCH_BYTES = 16 << 20  # of pictures in a record batch
_BLOCK = 1 << 22


class Note(msgspec.Struct, frozen=True):
    """What is known of a whole shard. `rejected`: keys and reasons; `per_class`: how many."""

    shard: Shard
    rejected: list[dict[str, str]]
    per_class: list[int]


def note_path(folder: Path, name: str) -> Path:
    """Where the note of shard `name` is; it is written last."""
    return folder / PARTS / f"{name}.json"


def index_path(folder: Path, name: str) -> Path:
    """Where the shard's rows of the index are (`INDEX`)."""
    return folder / PARTS / f"{name}.npy"


def read_note(folder: Path, name: str) -> Note | None:
    """The note of a shard, or None where it is not whole."""
    try:
        note = msgspec.json.decode(note_path(folder, name).read_bytes(), type=Note)
        whole = (folder / note.shard.file).stat().st_size == note.shard.bytes
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return note if whole and index_path(folder, name).exists() else None


def write_shard(
    folder: Path,
    name: str,
    items: Sequence[Item],
    reader: Reader,
    form: Form,
    classes: int,
    taken: Callable[[bool], None],
) -> None:
    """Pack `items` into folder/NAME.arrow; `taken` is called after each with whether it was.

    Raises FailedError where another packer is at it, OSError where the disk is full.
    """
    rejected: list[dict[str, str]] = []
    counts = [0] * classes
    with _temporary(folder, name) as (path, file):
        if read_note(folder, name) is not None:
            return  # another packer has just done it
        records = _records(items, reader, form, classes, rejected, taken)
        with pa.ipc.new_file(file, _schema(form)) as writer:
            for batch in _batches(records, form):
                writer.write_batch(batch)
        file.flush()
        os.fsync(file.fileno())
        index, crc32 = _index_of(path)
        for label, count in zip(*np.unique(index["label"], return_counts=True)):
            counts[label] = int(count)
        shard = Shard(f"{name}.arrow", len(index), path.stat().st_size, crc32)
        with replace_file(index_path(folder, name)) as rows:
            np.save(rows, index)
        path.replace(folder / shard.file)
    sync_folder(folder)
    with replace_file(note_path(folder, name)) as out:
        out.write(msgspec.json.encode(Note(shard, rejected, counts)))


def _records(
    items: Sequence[Item],
    reader: Reader,
    form: Form,
    classes: int,
    rejected: list[dict[str, str]],
    taken: Callable[[bool], None],
) -> Iterator[tuple[bytes, int, str, int]]:
    """Image, label, key and checksum of each item that can be taken."""
    for item in items:
        try:
            if not 0 <= item.label < classes:
                what = "no label" if item.label < 0 else f"label {item.label}: not below {classes}"
                raise Rejected(what)
            try:
                source = reader.read(item)
            except OSError as error:
                raise Rejected(f"cannot be read: {error.strerror or error}") from None
            image = convert(source, form)
        except Rejected as why:
            rejected.append({"key": item.key, "reason": str(why)})
            taken(False)
            continue
        yield image, item.label, item.key, record_crc32(image, item.label)
        taken(True)


def _schema(form: Form) -> pa.Schema:
    image = pa.binary(form.side * form.side * 3) if form.raw else pa.binary()
    fields = [("image", image), ("label", pa.int32()), ("key", pa.string()), ("crc32", pa.uint32())]
    kind = f"uint8 [{form.side}, {form.side}, 3]" if form.raw else "JPEG"
    return pa.schema(fields, metadata={"image": kind})


def _batches(
    records: Iterator[tuple[bytes, int, str, int]], form: Form
) -> Iterator[pa.RecordBatch]:
    schema, rows, size = _schema(form), [], 0
    for row in records:
        rows.append(row)
        size += len(row[0])
        if size >= _BATCH_BYTES:
            yield _batch(rows, schema)
            rows, size = [], 0
    if rows:
        yield _batch(rows, schema)


def _batch(rows: list[tuple[bytes, int, str, int]], schema: pa.Schema) -> pa.RecordBatch:
    columns = [pa.array(column, field.type) for column, field in zip(zip(*rows), schema)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _index_of(path: Path) -> tuple[NDArray[Any], int]:
    """The rows of the index of a shard as it stands on disk, with shard 0, and its checksum."""
    with pa.memory_map(str(path)) as file:
        whole = file.read_buffer()
        crc32 = 0
        for start in range(0, whole.size, _BLOCK):
            crc32 = zlib.crc32(whole[start : start + _BLOCK], crc32)
        reader = pa.ipc.open_file(pa.BufferReader(whole))
        parts = [
            _rows_of(reader.get_batch(number), whole.address)
            for number in range(reader.num_record_batches)
        ]
    return np.concatenate([np.empty(0, INDEX), *parts]), crc32


def _rows_of(batch: pa.RecordBatch, base: int) -> NDArray[Any]:
    image = batch.column("image")
    rows = np.zeros(batch.num_rows, INDEX)
    if pa.types.is_fixed_size_binary(image.type):
        width = image.type.byte_width
        rows["start"] = image.buffers()[1].address - base + width * np.arange(batch.num_rows)
        rows["length"] = width
    else:
        offsets = np.frombuffer(image.buffers()[1], np.int32, batch.num_rows + 1)
        rows["start"] = image.buffers()[2].address - base + offsets[:-1].astype(np.int64)
        rows["length"] = np.diff(offsets)
    rows["label"] = batch.column("label").to_numpy()
    rows["crc32"] = batch.column("crc32").to_numpy()
    return rows


def _is_mine(path: Path, file: IO[bytes]) -> bool:
    """Whether this packer alone has the file, and it is still the one of that name."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks; parts do not share shards
    return _is_named(path, file)  # or finished and renamed since it was opened


def _is_named(path: Path, file: IO[bytes]) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


@contextmanager
def _temporary(folder: Path, name: str) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file of this packer alone, gone afterwards unless it was renamed. What a killed one left
    is written over: its lock went with it."""
    path = folder / f".{name}.arrow.tmp"
    with path.open("ab") as file:
        if not _is_mine(path, file):
            raise FailedError(
                f"{path}: another packer is writing it: let it end, or give each its own --part"
            )
        file.truncate(0)
        file.seek(0)
        try:
            yield path, file
        finally:
            if _is_named(path, file):  # and not renamed
                path.unlink(missing_ok=True)
