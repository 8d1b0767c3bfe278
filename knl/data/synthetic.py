"""A learnable set of any size, with no storage: each class a smooth pattern, each sample noise."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from knl.config import Data
from knl.data.augment import centre_crop, crop_flip
from knl.data.hashing import mix
from knl.errors import InputError

_NOISE_LENGTH = 1 << 20
_PATTERN = 8  # pixels a side of a class's pattern before it is magnified
_TEST_SHARE = 10  # one test sample for so many training samples


class Synthetic:
    """`data.samples` pictures of 3 channels in `data.classes` classes."""

    channels = 3

    def __init__(self, data: Data, seed: int) -> None:
        self.classes = data.classes
        stored = data.image_size or data.crop or 32
        if stored < _PATTERN:
            key = "data.image_size" if data.image_size else "data.crop"
            raise InputError(f"{key} = {stored}: synthetic pictures have at least {_PATTERN}")
        self.pixels = data.crop or stored
        self.train_samples = data.samples
        self.test_samples = max(1, data.samples // _TEST_SHARE)
        self.damaged: dict[int, str] = {}
        self._stored, self._seed = stored, seed
        self._augments = data.augment == "crop-flip"
        # Fixed, not of the run's seed: another seed is another run on the same set.
        generator = np.random.Generator(np.random.PCG64(20170921))
        self._noise = generator.standard_normal(_NOISE_LENGTH, dtype=np.float32)

    def train_batch(self, samples: NDArray[Any], epoch: int) -> tuple[NDArray[Any], NDArray[Any]]:
        images, labels = self._make(samples)
        if self._augments:
            return crop_flip(images, self.pixels, self._seed, epoch, samples), labels
        return centre_crop(images, self.pixels), labels

    def test_batch(self, samples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        images, labels = self._make(samples + self.train_samples)
        return centre_crop(images, self.pixels), labels

    def place_of(self, sample: int) -> str:
        return f"sample {sample}"

    def _make(self, samples: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        labels = (mix(1, samples) % np.uint64(self.classes)).astype(np.int64)
        starts = mix(2, samples) % np.uint64(_NOISE_LENGTH)
        images = np.empty((len(samples), 3, self._stored, self._stored), dtype=np.float32)
        for image, label, start in zip(images, labels, starts.astype(np.int64)):
            self._fill_noise(image.reshape(-1), int(start))
            image += self._pattern(int(label))
        return images, labels

    def _fill_noise(self, out: NDArray[Any], start: int) -> None:
        """Copy the bank of noise from `start` on, round its end as often as needed."""
        done = 0
        while done < out.size:
            part = self._noise[start : start + out.size - done]
            out[done : done + part.size] = part
            done, start = done + part.size, 0

    def _pattern(self, label: int) -> NDArray[Any]:
        """[3, stored, stored]: a small random pattern of the class, magnified."""
        cells = np.arange(3 * _PATTERN * _PATTERN)
        small = np.where(mix(3, label, cells) & np.uint64(1), 1.0, -1.0).astype(np.float32)
        index = np.arange(self._stored) * _PATTERN // self._stored
        return small.reshape(3, _PATTERN, _PATTERN)[:, index[:, None], index]
