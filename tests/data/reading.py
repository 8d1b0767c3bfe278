"""What training reads of a packed set, batch by batch, and what it must be after damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knl.config import Data
from knl.data.packed import PackedDataset
from knl.errors import FailedError

BATCH = 8
Batches = dict[int, Any]  # images and labels, or None where no record of it can be read


class Clean(dict):
    """Batches by kind, which Hypothesis need not print."""

    def __repr__(self) -> str:
        return "clean"


def opened(folder: Path, augment: str = "none") -> PackedDataset:
    """A set to train on."""
    size = 24 if folder.name == "raw" else 40
    data = Data(name="packed", path=str(folder), image_size=size, crop=size - 8, augment=augment)
    return PackedDataset(data, seed=3)


def numbers(dataset: PackedDataset) -> list[NDArray[Any]]:
    """The training samples, batch by batch."""
    count = dataset.train_samples
    return [np.arange(first, min(first + BATCH, count)) for first in range(0, count, BATCH)]


def batches(dataset: PackedDataset, order: int = 1) -> Batches:
    """Of all training samples: images and labels by number of the batch, or None where no record
    of it can be read."""
    found = {}
    for number, samples in list(enumerate(numbers(dataset)))[::order]:
        try:
            images, labels = dataset.train_batch(samples, epoch=1)
        except FailedError as error:
            assert "\n" not in str(error) and "run knl data verify" in str(error)
            found[number] = None
            continue
        assert images.shape == (len(samples), 3, dataset.pixels, dataset.pixels)
        assert np.isfinite(images).all() and labels.dtype == np.int64
        assert ((labels >= 0) & (labels < dataset.classes)).all()
        found[number] = images.copy(), labels
    return found


def same(one: Batches, other: Batches) -> bool:
    """To the bit."""
    return one.keys() == other.keys() and all(
        (a is None and b is None) or (np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1]))
        for a, b in ((one[number], other[number]) for number in one)
    )


def noted(whole: Batches, broken: set[int]) -> set[int]:
    """Which of these damaged samples are: of a batch without a good one the first alone."""
    lost = {n for n, (_, labels) in whole.items() if broken.issuperset(of(n, len(labels)))}
    return {sample for sample in broken if sample // BATCH not in lost or sample % BATCH == 0}


def of(number: int, count: int) -> range:
    """The samples of a batch."""
    return range(number * BATCH, number * BATCH + count)


def replaced(whole: Batches, broken: set[int]) -> Batches:
    """What batches must be when these samples are damaged: the next good one is in their place."""
    wanted = {}
    for number, (images, labels) in whole.items():
        good = [i for i, sample in enumerate(of(number, len(labels))) if sample not in broken]
        if not good:
            wanted[number] = None
            continue
        takes = [next((g for g in good if g >= i), good[0]) for i in range(len(labels))]
        wanted[number] = images[takes], labels[takes]
    return wanted
