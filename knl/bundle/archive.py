"""Writes entries as a .tar.gz: the same bytes for the same files, compressed by all threads."""

from __future__ import annotations

import os
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, cast

from knl.bundle.contents import FOLDER, Entry

_BLOCK = 4 << 20
# Of libtorch_cpu.so level 1 leaves 0.39 and takes a third of the time of level 6, which leaves
# 0.34: measured on 2 cores.
_LEVEL = 1
_GZIP = 31  # zlib's number for gzip's format with the largest window


def write_archive(
    file: IO[bytes], entries: Iterable[Entry], advance: Callable[[int], None]
) -> None:
    """Write all entries below FOLDER; `advance` is told the bytes of each file that is in."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        packed = _Gzip(file, threads)
        with tarfile.open(
            fileobj=cast("IO[bytes]", packed), mode="w", format=tarfile.GNU_FORMAT
        ) as tar:
            for entry in entries:
                _add(tar, entry)
                advance(entry.size)
        packed.finish()


def _add(tar: tarfile.TarFile, entry: Entry) -> None:
    header = tarfile.TarInfo(f"{FOLDER}/{entry.name}")
    header.mode, header.mtime = entry.mode, entry.mtime
    if entry.link:
        header.type, header.linkname = tarfile.SYMTYPE, entry.link
        tar.addfile(header)
        return
    header.size = entry.size
    with entry.source.open("rb") as source:
        tar.addfile(header, source)


class _Gzip:
    """A file that compresses its blocks side by side: members of gzip's format one after another
    are one file of it."""

    def __init__(self, file: IO[bytes], threads: ThreadPoolExecutor) -> None:
        self._file, self._threads = file, threads
        self._block = bytearray()
        self._position = 0
        self._waiting: deque[Future[bytes]] = deque()
        self._most = 2 * len(os.sched_getaffinity(0))

    def write(self, data: bytes) -> int:
        self._block += data
        self._position += len(data)
        if len(self._block) >= _BLOCK:
            self._submit()
        return len(data)

    def tell(self) -> int:
        return self._position

    def finish(self) -> None:
        """Compress and write what is left."""
        self._submit()
        while self._waiting:
            self._file.write(self._waiting.popleft().result())

    def _submit(self) -> None:
        self._waiting.append(self._threads.submit(_compress, bytes(self._block)))
        self._block.clear()
        if len(self._waiting) > self._most:
            self._file.write(self._waiting.popleft().result())


def _compress(block: bytes) -> bytes:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
    return packer.compress(block) + packer.flush()
