"""Memory that the ranks of a node share: a segment a rank, which all of them map.

A segment has no name (an unlinked file in /dev/shm, opened by the others through /proc), so none is
ever left behind.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from knl.comm.bootstrap import Bootstrap

_SHARED = Path("/dev/shm")
_SLOT_BYTES = 128  # node_sum.cpp's Slot
_TOKEN_BYTES = 16
_NONE = "none: "  # what a rank without a segment tells before the reason
PAGE = 4096


class NodeUnavailable(Exception):
    """Why the ranks of a node cannot share memory."""


class Segments:
    """Float32 buffers of `sizes` on each of the node's `ranks`, of which this is `rank`. Every rank
    of the world makes them with the same sizes. Raises NodeUnavailable on every one alike.

    `slots`, `buffers`: for each buffer the addresses of the ranks' counters (node_sum.cpp) and
    memory; `tensors`: this rank's own; `rounds`: how often each was summed.
    """

    def __init__(
        self, bootstrap: Bootstrap, ranks: Sequence[int], rank: int, sizes: Sequence[int]
    ) -> None:
        self.sizes = list(sizes)
        self._memories = memories = _map_all(bootstrap, ranks, rank, sizes)
        own = ranks.index(rank)
        self.rounds = [0] * len(sizes)
        starts = _starts(sizes)
        self.tensors = [
            torch.frombuffer(memories[own], dtype=torch.float32, count=size, offset=start)
            for size, start in zip(sizes, starts)
        ]
        bases = [np.frombuffer(memory, dtype=np.uint8).ctypes.data for memory in memories]
        table = np.array(bases, dtype=np.uint64)
        self.slots = [table + np.uint64(PAGE + n * _SLOT_BYTES) for n in range(len(sizes))]
        self.buffers = [table + np.uint64(start) for start in starts]

    def missing(self, slot: int) -> list[int]:
        """Places on the node whose rank has not filled the buffer in this round."""
        at = PAGE + slot * _SLOT_BYTES
        filled = [int(np.frombuffer(m, np.uint64, 1, at)[0]) for m in self._memories]
        return [place for place, count in enumerate(filled) if count < self.rounds[slot]]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where in a segment each buffer starts, in bytes: behind the token and the slots, on pages."""
    at = PAGE + _rounded(len(sizes) * _SLOT_BYTES)
    starts = []
    for size in sizes:
        starts.append(at)
        at += _rounded(4 * size)
    return starts


def _rounded(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _map_all(
    bootstrap: Bootstrap, ranks: Sequence[int], rank: int, sizes: Sequence[int]
) -> list[mmap.mmap]:
    """The segments of all ranks of the node, mapped. Raises NodeUnavailable on every rank alike."""
    size = _starts(sizes)[-1] + _rounded(4 * sizes[-1])
    memories: list[mmap.mmap] = []
    token = secrets.token_bytes(_TOKEN_BYTES)
    try:
        _require_room(bootstrap, size * len(ranks))
        with tempfile.TemporaryFile(dir=_SHARED) as file:
            file.truncate(size)
            own = _mapped(file.fileno(), size)
            own[:_TOKEN_BYTES] = token
            # Touched here, so that the pages are this rank's: near its cores, and there for sure.
            torch.frombuffer(own, dtype=torch.uint8, offset=PAGE, count=size - PAGE).zero_()
            names = bootstrap.gather(f"/proc/{os.getpid()}/fd/{file.fileno()} {token.hex()}")
            memories, problem = _map_others(names, ranks, rank, own, size)
            problems = bootstrap.gather(problem)  # and all have mapped it
    except OSError as error:
        problem = f"{_SHARED}: {error.strerror or error}"
        bootstrap.gather(_NONE + problem)
        problems = bootstrap.gather(problem)
    for text in problems:
        if text:
            raise NodeUnavailable(text)
    return memories


def _require_room(bootstrap: Bootstrap, size: int) -> None:
    """Raise NodeUnavailable on every rank where one finds too little: all look before anyone takes
    some. Memory that is not there would end a process when it is touched."""
    free = shutil.disk_usage(_SHARED).free
    problem = f"{_SHARED}: {free >> 20} MiB free, {size >> 20} needed" if free < size else ""
    for text in bootstrap.gather(problem):
        if text:
            raise NodeUnavailable(text)


def _map_others(
    names: Sequence[str], ranks: Sequence[int], rank: int, own: mmap.mmap, size: int
) -> tuple[list[mmap.mmap], str]:
    """The node's segments in the order of ranks, and what went wrong."""
    memories: list[mmap.mmap] = []
    for other in ranks:
        if other == rank:
            memories.append(own)
            continue
        if names[other].startswith(_NONE):
            return [], names[other][len(_NONE) :]
        path, _, token = names[other].partition(" ")
        try:
            file = os.open(path, os.O_RDWR)
            try:
                memories.append(_mapped(file, size))
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            return [], f"the segment of rank {other} cannot be mapped ({error})"
        if memories[-1][:_TOKEN_BYTES].hex() != token:
            return [], f"{path} is not the segment of rank {other}: do ranks share their processes?"
    return memories, ""


def _mapped(file: int, size: int) -> mmap.mmap:
    memory = mmap.mmap(file, size)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
