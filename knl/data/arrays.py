"""Small sets that fit in memory: scikit-learn's digits, and Fashion-MNIST from its IDX files."""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knl.config import Data
from knl.data.augment import centre_crop, crop_flip
from knl.data.hashing import mix
from knl.errors import InputError

# Where Debian's package dataset-fashion-mnist puts the files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Split:
    """Pictures, float32 [n, 1, height, width] of zero mean and unit spread, and labels, int64."""

    images: NDArray[Any]
    labels: NDArray[Any]


class ArrayDataset:
    """A train and a test split in memory."""

    channels = 1
    classes = 10

    def __init__(self, data: Data, seed: int, train: Split, test: Split) -> None:
        stored = train.images.shape[-1]
        if data.image_size not in (0, stored):
            raise InputError(f"data.image_size = {data.image_size}: {data.name} has {stored} or 0")
        if data.crop > stored:
            raise InputError(
                f"data.crop = {data.crop}: must be 0 to {stored}, the pixels a side of {data.name}"
            )
        self.pixels = data.crop or stored
        self.train_samples, self.test_samples = len(train.labels), len(test.labels)
        self.damaged: dict[int, str] = {}
        self._train, self._test, self._seed = train, test, seed
        self._augments = data.augment == "crop-flip"

    def train_batch(self, samples: NDArray[Any], epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        images, labels = self._train.images[samples], self._train.labels[samples]
        if self._augments:
            return crop_flip(images, self.pixels, self._seed, epoch, samples), labels
        return centre_crop(images, self.pixels), labels

    def test_batch(self, samples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        return centre_crop(self._test.images[samples], self.pixels), self._test.labels[samples]

    def place_of(self, sample: int) -> str:
        return f"sample {sample}"


def read_digits(path: str) -> tuple[Split, Split]:
    """1,797 handwritten digits of 8x8 pixels (UCI, in scikit-learn); every fifth of a fixed shuffle
    is for testing: 1,437 and 360.

    Reads scikit-learn's file without importing it, as it would bring a second OpenMP runtime.
    Raises InputError when it is not installed.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise InputError("data.name = 'digits': is in scikit-learn; pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    images, labels = table[:, :-1], table[:, -1]
    order = np.argsort(mix(np.arange(len(labels))), kind="stable")
    tests = order[::5]
    trains = np.setdiff1d(order, tests)
    images = images.reshape(-1, 1, 8, 8)
    mean, spread = images[trains].mean(), images[trains].std()
    return (
        _split(images[trains], labels[trains], mean, spread),
        _split(images[tests], labels[tests], mean, spread),
    )


def read_fashion_mnist(path: str) -> tuple[Split, Split]:
    """60,000 and 10,000 pictures of clothes, 28x28 (Xiao et al. 2017), from a folder of IDX files.

    Raises InputError naming the file that is missing or damaged.
    """
    folder = Path(path) if path else FASHION_MNIST
    parts = {
        name: (
            read_idx(folder / f"{name}-images-idx3-ubyte", 3),
            read_idx(folder / f"{name}-labels-idx1-ubyte", 1),
        )
        for name in ("train", "t10k")
    }
    for name, (images, labels) in parts.items():
        if len(images) != len(labels) or labels.max(initial=0) > 9:
            raise InputError(
                f"{folder}: {name}: {len(images)} pictures and {len(labels)} labels, must be equal "
                f"in number and labels 0 to 9 (highest {labels.max(initial=0)})"
            )
    pixels, other = parts["train"][0], parts["t10k"][0]
    if not pixels.size or pixels.shape[1] != pixels.shape[2] or pixels.shape[1:] != other.shape[1:]:
        raise InputError(
            f"{folder}: pictures of {pixels.shape} to train and {other.shape} to test: "
            "must be square, of one size, and at least one"
        )
    mean, spread = pixels.mean(), max(float(pixels.std()), 1e-6)
    train, test = (
        _split(images[:, None], labels, mean, spread) for images, labels in parts.values()
    )
    return train, test


def read_idx(path: Path, dimensions: int) -> NDArray[Any]:
    """An IDX file of bytes, plain or with .gz behind its name, as uint8 of `dimensions`.

    Raises InputError naming the file.
    """
    packed = path.with_name(path.name + ".gz")
    try:
        raw = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{path}[.gz] not found: set data.path to the folder with the IDX files "
            "(on Debian: apt install dataset-fashion-mnist)"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}[.gz] cannot be read: {error}") from None
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes([0, 0, 8, dimensions]):
        raise InputError(f"{path}: not an IDX file of bytes in {dimensions} dimension(s)")
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise InputError(f"{path}: {len(raw) - header} bytes of data, its header says {shape}")
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _split(images: NDArray[Any], labels: NDArray[Any], mean: float, spread: float) -> Split:
    scaled = ((images - np.float32(mean)) / np.float32(spread)).astype(np.float32)
    return Split(scaled, labels.astype(np.int64))
