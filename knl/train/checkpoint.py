"""The file of a checkpoint: safetensors, whose metadata begins with a checksum of all the rest.

    8 bytes      length of the head, little-endian
    head, JSON   {"__metadata__": {"blake2b": "...", "bytes": "...", "knl": "..."},
                  NAME: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}
    data         the tensors, one after another

`knl` holds the `State` as JSON. The network's tensors have the names of its state_dict, the
optimiser's momentum the same behind "momentum/". Nothing is executed to read one. The checksum is
taken over the whole file, head too, with zeros in its own place; nothing of a file is believed, or
even parsed, before it is right.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import msgspec
import numpy as np
from numpy.typing import NDArray

from knl.errors import DamagedError, FailedError
from knl.files import sync_folder

SCHEMA = 1
MOMENTUM = "momentum/"
_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_DTYPES = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8", "U8": "|u1"}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_DIGITS = 32  # hexadecimal, of the checksum
_BEGIN = b'{"__metadata__":{"blake2b":"'
_SIZE = b'","bytes":"'
_SIZE_DIGITS = 15
_DIGEST_AT = 8 + len(_BEGIN)
_SIZE_AT = _DIGEST_AT + _DIGITS + len(_SIZE)
_HEAD_END = _SIZE_AT + _SIZE_DIGITS

Tensors = Mapping[str, NDArray[Any]]


class Mark(msgspec.Struct, frozen=True):
    """An evaluation, after so many steps."""

    step: int
    top1: float
    top5: float
    loss: float


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is besides its tensors. `order`: parameters' numbers as gradients arrive;
    `ranks`: that wrote it; `samples`: of the training set; `skipped`: steps whose update was left
    out; `evaluation`: the last one; `best`: that of the highest top-1."""

    schema: int = SCHEMA
    step: int
    epoch: float
    recipe: dict[str, Any]
    ranks: int
    samples: int
    order: list[int]
    weights_crc32: str
    skipped: int = 0
    evaluation: Optional[Mark] = None  # noqa: UP045
    best: Optional[Mark] = None  # noqa: UP045
    versions: dict[str, str] = {}
    written: str = ""


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A run at the end of a step. `tensors`: by name, on rank 0 alone."""

    state: State
    tensors: Tensors

    @property
    def weights(self) -> dict[str, NDArray[Any]]:
        """The network's state_dict."""
        return {n: array for n, array in self.tensors.items() if not n.startswith(MOMENTUM)}


def name_of(step: int) -> str:
    """Of the file of a checkpoint at the end of this step, counted from 1."""
    return f"step-{step:08d}.safetensors"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name; -1 for another file."""
    found = _NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def listed(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, the newest first."""
    with contextlib.suppress(FileNotFoundError):
        return sorted((p for p in folder.iterdir() if step_of(p) >= 0), key=step_of, reverse=True)
    return []


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write it so that the name appears with the whole content or not at all, even where the
    machine stops. Raises OSError; what was there before stays."""
    path = folder / name_of(checkpoint.state.step)
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}.tmp"
    arrays = {name: _plain(array) for name, array in checkpoint.tensors.items()}
    head = _head(checkpoint.state, arrays)
    digest = _digest(head, *map(_bytes, arrays.values()))
    head[_DIGEST_AT : _DIGEST_AT + _DIGITS] = digest.encode()
    try:
        with temporary.open("xb", buffering=0) as file:
            for part in (memoryview(head), *map(_bytes, arrays.values())):
                _write_all(file, part)
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(folder)
    return path


def read(path: Path) -> Checkpoint:
    """Raises DamagedError naming the file and what is wrong with it, FailedError where it cannot be
    read now or is another version's; never anything else."""
    try:
        raw = bytearray(path.read_bytes())
    except OSError as error:
        raise FailedError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    if problem := _problem(raw):
        raise DamagedError(f"checkpoint {path} is damaged: {problem}")
    try:
        return _parse(raw)
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Whole, but not as this version writes it.
        raise FailedError(
            f"checkpoint {path} is none that this version of knl reads: {error}"
        ) from None


def remove_temporaries(folder: Path) -> None:
    """What writers that were killed have left."""
    for path in folder.glob(".step-*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


def _problem(raw: bytearray) -> str:
    """What is wrong with a file's bytes; "" when they are as they were written."""
    if not raw:
        return "it is empty"
    begins = raw[8:_DIGEST_AT] == _BEGIN and raw[_DIGEST_AT + _DIGITS : _SIZE_AT] == _SIZE
    size = bytes(raw[_SIZE_AT:_HEAD_END])
    if not begins or not re.fullmatch(rb"\d{15}", size):
        short = len(raw) < _HEAD_END and _BEGIN.startswith(raw[8:_DIGEST_AT])
        return f"it ends after {len(raw)} bytes" if short else "its head is not a checkpoint's"
    if int(size) != len(raw):
        return f"it has {len(raw)} of {int(size)} bytes"
    noted = bytes(raw[_DIGEST_AT : _DIGEST_AT + _DIGITS])
    raw[_DIGEST_AT : _DIGEST_AT + _DIGITS] = b"0" * _DIGITS
    found = _digest(raw)
    return "" if found.encode() == noted else "its content does not fit its checksum"


def _parse(raw: bytearray) -> Checkpoint:
    length = struct.unpack("<Q", raw[:8])[0]
    table = json.loads(bytes(raw[8 : 8 + length]))
    metadata = table.pop("__metadata__")
    schema = json.loads(metadata["knl"])["schema"]
    if schema != SCHEMA:
        raise ValueError(f"its schema is {schema}, not {SCHEMA}")
    state = msgspec.json.decode(metadata["knl"].encode(), type=State)
    entries = msgspec.convert(table, dict[str, _Entry])
    tensors: dict[str, NDArray[Any]] = {}
    end = 0
    for name, entry in entries.items():
        dtype, (begin, stop) = np.dtype(_DTYPES[entry.dtype]), entry.data_offsets
        count = math.prod(entry.shape)
        if (
            begin != end
            or stop - begin != count * dtype.itemsize
            or min(entry.shape, default=0) < 0
        ):
            raise ValueError(f"{name} is out of place")
        flat = np.frombuffer(raw, dtype, count, 8 + length + begin)
        tensors[name], end = flat.reshape(entry.shape), stop
    if 8 + length + end != len(raw):
        raise ValueError("there is more behind the last tensor")
    return Checkpoint(state, tensors)


def _head(state: State, arrays: Tensors) -> bytearray:
    """Length and JSON, with zeros for the checksum."""
    entries: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        code = _CODES[array.dtype]
        entries[name] = {"dtype": code, "shape": array.shape, "data_offsets": (begin, end)}
    zeros = b"0" * _DIGITS
    rest = b'","knl":' + json.dumps(msgspec.json.encode(state).decode()).encode() + b"}"
    for name, entry in entries.items():
        rest += b"," + json.dumps(name).encode() + b":" + json.dumps(entry).encode()
    rest += b"}"
    length = len(_BEGIN) + _DIGITS + len(_SIZE) + _SIZE_DIGITS + len(rest)
    padding = -(8 + length) % 64  # tensors begin where a cache line does
    size = f"{8 + length + padding + end:0{_SIZE_DIGITS}d}".encode()
    text = _BEGIN + zeros + _SIZE + size + rest + b" " * padding
    return bytearray(struct.pack("<Q", len(text)) + text)


def _plain(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array).reshape(array.shape)


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _digest(*parts: Any) -> str:
    total = hashlib.blake2b(digest_size=_DIGITS // 2)
    for part in parts:
        total.update(part)
    return total.hexdigest()


def _write_all(file: Any, part: memoryview) -> None:
    for chunk in _chunks(part):
        written = 0
        while written < len(chunk):
            written += file.write(chunk[written:])


def _chunks(part: memoryview) -> Iterator[memoryview]:
    """In pieces, so that a full disk is noticed early."""
    size = 16 << 20
    for start in range(0, len(part), size):
        yield part[start : start + size]
