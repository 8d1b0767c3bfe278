"""Sets of pictures by the name that a recipe gives them: what to train on, and what to test on."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from knl.config import Data
from knl.errors import InputError


class Dataset(Protocol):
    """Pictures and labels. A batch is float32 [n, channels, pixels, pixels] and int64 [n].

    `damaged`: training samples that could not be read so far, each with the reason.
    """

    classes: int
    channels: int
    pixels: int
    train_samples: int
    test_samples: int
    damaged: dict[int, str]

    def train_batch(self, samples: NDArray[Any], epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The samples with these numbers, as augmented in this epoch."""

    def test_batch(self, samples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Samples that are never trained on; without those that are damaged."""

    def place_of(self, sample: int) -> str:
        """Where a training sample is stored."""


def open_dataset(data: Data, seed: int) -> Dataset:
    """Open the set. Raises InputError when it is not there or cannot be what the recipe wants."""
    if data.name == "packed":
        from knl.data.packed import PackedDataset

        return PackedDataset(data, seed)
    for key in ("colour_jitter", "lighting"):
        if getattr(data, key):
            raise InputError(
                f"data.{key} = {getattr(data, key):g}: must be 0 for data.name = {data.name!r}; "
                "packed sets alone have it"
            )
    if data.augment == "random-resized-crop":
        raise InputError(
            f"data.augment = 'random-resized-crop': not for data.name = {data.name!r}; "
            "must be one of none, crop-flip"
        )
    if data.name == "synthetic":
        from knl.data.synthetic import Synthetic

        return Synthetic(data, seed)
    from knl.data.arrays import ArrayDataset, read_digits, read_fashion_mnist

    read = read_digits if data.name == "digits" else read_fashion_mnist
    return ArrayDataset(data, seed, *read(data.path))
