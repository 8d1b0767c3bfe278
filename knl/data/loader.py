"""Batches made ahead of the step that asks for them, by threads on the plan's loader CPUs.

Threads, not processes: a fork after MPI_Init is unsafe over Omni-Path, and all that takes time
(libjpeg-turbo, the resizing, reading) lets go of Python's lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from knl.bind import loader_cpus

Arrays = tuple[NDArray[Any], NDArray[Any]]
Batch = tuple[torch.Tensor, torch.Tensor]
_MB = 1024 * 1024


class Loader:
    """Makes batches in the layout of the model, in order: up to `ahead_mb` MiB of them and at
    least one, beside the batch that is in use. `batch_bytes`: of one batch's images."""

    def __init__(self, layout: str, batch_bytes: int, ahead_mb: float) -> None:
        cpus = loader_cpus()
        self._layout = layout
        self._ahead = max(1, int(ahead_mb * _MB) // batch_bytes)
        self._threads = ThreadPoolExecutor(
            min(len(cpus), self._ahead),
            thread_name_prefix="knl-loader",
            initializer=lambda: os.sched_setaffinity(0, cpus),
        )

    def run(self, makers: Iterable[Callable[[], Arrays]]) -> Iterator[Batch]:
        """The batch of each maker. What is raised in making one is raised when it is its turn."""
        coming = iter(makers)
        under_way: deque[Future[Batch]] = deque()
        try:
            self._fill(under_way, coming)
            while under_way:
                batch = under_way.popleft().result()
                self._fill(under_way, coming)  # before the step that this batch is for
                yield batch
        finally:
            for future in under_way:
                future.cancel()

    def _fill(
        self, under_way: deque[Future[Batch]], coming: Iterator[Callable[[], Arrays]]
    ) -> None:
        for maker in islice(coming, self._ahead - len(under_way)):
            under_way.append(self._threads.submit(self._make, maker))

    def close(self) -> None:
        """Let the threads end; batches that are not begun are dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def _make(self, maker: Callable[[], Arrays]) -> Batch:
        images, labels = maker()
        return torch.from_numpy(arranged(images, self._layout)), torch.from_numpy(labels)


def arranged(images: NDArray[Any], layout: str) -> NDArray[Any]:
    """Images [n, channels, height, width] with memory as torch's layout of that name has it.

    By NumPy, as torch would start a team of OpenMP threads for each thread that calls it.
    """
    if layout in ("contiguous", "blocked"):
        return np.ascontiguousarray(images)
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
