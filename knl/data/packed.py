"""A packed set to train on: records to batches, with damaged ones replaced and counted."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from knl.config import Data
from knl.data.packed_set import Meta, Record, Records, open_records, read_meta
from knl.data.picture import LEAST_SIDE, decode, show, size_of
from knl.data.views import TrainViews, View, centre_crop
from knl.errors import FailedError, InputError, say

TRAIN, TEST = "train", "val"
_REPLACED, _LEFT_OUT = "another of its batch takes its place", "it is left out of the test"
# The view of record number i of a batch, when the picture is of height x width.
_Views = Callable[[int, int, int], View]


class PackedDataset:
    """The splits train and val of a packed set. Raises InputError when it is not one, or cannot be
    what the recipe wants.

    `damaged`: the training records that could not be read so far, and why. Each is replaced by
    another of its batch, which is of its lane, seen through its own view: whatever rank finds it
    does the same.
    """

    channels = 3

    def __init__(self, data: Data, seed: int) -> None:
        if not data.path:
            raise InputError(
                "data.name = 'packed': needs data.path, a folder that knl data pack made: --set "
                "data.path=DIR; --set data.name=synthetic tries the recipe's speed without its data"
            )
        folder = Path(data.path)
        self.meta = read_meta(folder)
        self.classes = len(self.meta.classes)
        self._data, self._seed = _resolved(data, self.meta, folder), seed
        self.pixels = self._data.crop
        self.train = open_records(folder, self.meta, TRAIN)
        self.test = open_records(folder, self.meta, TEST)
        self.train_samples, self.test_samples = len(self.train), len(self.test)
        self.damaged: dict[int, str] = {}
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._memory = _Memory()

    def place_of(self, sample: int) -> str:
        """Where a training sample is, for a reader."""
        return self.train.place(sample)

    def train_batch(self, samples: NDArray[Any], epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        views = TrainViews(self._data, self._seed, epoch, samples)
        return self._batch(self.train, samples, views.at)

    def test_batch(self, samples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        def centre(_: int, height: int, width: int) -> View:
            return View(height, width, centre_crop(height, width, self._data))

        return self._batch(self.test, samples, centre, replace=False)

    def _batch(
        self, records: Records, numbers: NDArray[Any], views: _Views, *, replace: bool = True
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Images as a view [n, 3, pixels, pixels] of memory in which colours lie together. Damaged
        ones are replaced or left out."""
        images = self._memory.take((len(numbers), self.pixels, self.pixels, 3))
        read = records.read(numbers)
        faults = [self._show(r, i, views, images[i]) for i, r in enumerate(read)]
        labels = np.array([record.label for record in read], dtype=np.int64)
        good = [i for i, fault in enumerate(faults) if not fault]
        for i, fault in enumerate(faults):
            if not fault:
                continue
            self._note(records, int(numbers[i]), fault, replace)
            if not replace:
                continue
            if not good:
                raise FailedError(
                    f"{records.place(int(numbers[i]))}: {fault}, and no other record of its batch "
                    "can be read: run knl data verify"
                )
            stand_in = good[int(np.searchsorted(good, i)) % len(good)]  # the next in the batch
            labels[i] = read[stand_in].label
            self._show(read[stand_in], i, views, images[i])
        if not replace and len(good) < len(read):
            images, labels = images[good], labels[good]
        return images.transpose(0, 3, 1, 2), labels

    def _show(self, record: Record, index: int, views: _Views, out: NDArray[Any]) -> str:
        """Fill `out` with a record's view. Returns why it cannot be done, "" where it can."""
        if record.fault:
            return record.fault
        if self.meta.kind == "raw":
            side = self.meta.side
            if len(record.data) != side * side * 3:
                return f"{len(record.data)} bytes, not {side} x {side} x 3"
            picture = np.frombuffer(record.data, dtype=np.uint8).reshape(side, side, 3)
            show(picture, views(index, side, side), out)
            return ""
        try:
            view = views(index, *size_of(record.data))
            show(decode(record.data, view, self.pixels), view, out)
        except ValueError as error:
            return f"does not decode: {error}"
        return ""

    def _note(self, records: Records, number: int, fault: str, replaced: bool) -> None:
        place = records.place(number)
        with self._lock:
            if place in self._told:
                return
            self._told.add(place)
            if records is self.train:
                self.damaged[number] = fault
        say(f"{place}: {fault}; " + (_REPLACED if replaced else _LEFT_OUT))


class _Memory:
    """Memory of batches that nobody holds any more, to be used again: new memory costs a fault for
    each of its pages, a quarter of the time that a raw batch takes."""

    def __init__(self) -> None:
        self._free: deque[NDArray[Any]] = deque()

    def take(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """float32 of this shape, with anything in it; safe in any thread."""
        size = math.prod(shape)
        try:
            block = self._free.pop()
        except IndexError:
            block = np.empty(size, dtype=np.float32)
        if block.size < size:
            block = np.empty(size, dtype=np.float32)
        # Every view of it, a tensor's too, keeps this array alive.
        array = np.frombuffer(block.data, dtype=np.float32, count=size)
        weakref.finalize(array, self._free.append, block)
        return array.reshape(shape)


def _resolved(data: Data, meta: Meta, folder: Path) -> Data:
    """The recipe's section with the sizes that it leaves to the set. Raises InputError naming the
    key that does not fit."""
    if meta.kind == "raw" and data.image_size not in (0, meta.side):
        raise InputError(
            f"data.image_size = {data.image_size}: {folder} has raw records of {meta.side} pixels; "
            f"set {meta.side} or 0"
        )
    size = data.image_size or meta.side
    if not size:
        raise InputError(
            f"data.image_size = 0: {folder} has JPEGs of many sizes; set what their short sides "
            "are shrunk to before data.crop is cut (256 for a crop of 224)"
        )
    crop = data.crop or size
    if not LEAST_SIDE <= crop <= size:
        raise InputError(f"data.crop = {crop}: must be {LEAST_SIDE} to {size}, the short side")
    return msgspec.structs.replace(data, image_size=size, crop=crop)
