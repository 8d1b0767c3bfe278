"""Random views of pictures, as a function of (seed, epoch, sample): the same on every rank."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from knl.data.hashing import uniform

_TOP, _LEFT, _FLIP = 1, 2, 3  # which random number


def crop_flip(
    images: NDArray[Any], crop: int, seed: int, epoch: int, samples: NDArray[Any]
) -> NDArray[Any]:
    """A random crop of `crop` pixels a side, mirrored half of the time.

    `images`: [n, channels, height, width]; `samples`: the n sample numbers.
    Returns [n, channels, crop, crop].
    """
    count, channels, height, width = images.shape
    top = (uniform(seed, epoch, samples, _TOP) * (height - crop + 1)).astype(int)
    left = (uniform(seed, epoch, samples, _LEFT) * (width - crop + 1)).astype(int)
    flip = uniform(seed, epoch, samples, _FLIP) < 0.5
    views = np.empty((count, channels, crop, crop), dtype=images.dtype)
    for i in range(count):
        view = images[i, :, top[i] : top[i] + crop, left[i] : left[i] + crop]
        views[i] = view[:, :, ::-1] if flip[i] else view
    return views


def centre_crop(images: NDArray[Any], crop: int) -> NDArray[Any]:
    """The middle `crop` pixels a side of [n, channels, height, width]."""
    top, left = (images.shape[2] - crop) // 2, (images.shape[3] - crop) // 2
    return images[:, :, top : top + crop, left : left + crop]
