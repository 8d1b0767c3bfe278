"""Which part of a stored picture a network sees, and how: a function of (seed, epoch, sample).

Boxes are (left, top, width, height) in pixels of the stored picture. `data.image_size` and
`data.crop` are above 0 here: `knl.data.packed` fills them in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knl.config import Data
from knl.data.colour import Colours, draw_colours
from knl.data.hashing import uniform

# torchvision's RandomResizedCrop: share of the picture's area, aspect ratio, tries.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
_TRIES = 10
# Which random number is for what, of those that a sample has in an epoch.
_TOP, _LEFT, _FLIP = 1, 2, 3
_TRY = 8  # two for each try
_NUMBERS = _TRY + 2 * _TRIES

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """A part of a picture of height x width, mirrored or not, in other colours or not."""

    height: int
    width: int
    box: Box
    flip: bool = False
    colours: Colours | None = None


class TrainViews:
    """The views of `samples` in an epoch; number i of them is `at(i, height, width)`."""

    def __init__(self, data: Data, seed: int, epoch: int, samples: NDArray[Any]) -> None:
        self._data = data
        numbers = np.arange(_NUMBERS)
        self._random = uniform(seed, epoch, samples[:, None], numbers)
        self._colours = draw_colours(data, seed, epoch, samples)

    def at(self, index: int, height: int, width: int) -> View:
        random, colours = self._random[index], self._colours[index]
        if self._data.augment == "none":
            return View(height, width, centre_crop(height, width, self._data), False, colours)
        crop = resized_crop if self._data.augment == "random-resized-crop" else plain_crop
        flip = bool(random[_FLIP] < 0.5)
        return View(height, width, crop(height, width, self._data, random), flip, colours)


def centre_crop(height: int, width: int, data: Data) -> Box:
    """The middle `crop` pixels of a picture whose short side is `image_size`."""
    side = min(height, width) * data.crop / data.image_size
    return (width - side) / 2, (height - side) / 2, side, side


def plain_crop(height: int, width: int, data: Data, random: NDArray[Any]) -> Box:
    """A square anywhere in the picture, of `crop` pixels where the short side is `image_size`."""
    crop, scale = data.crop, min(height, width) / data.image_size
    # Whole pixels of the picture at that size, as if it had been resized before it is cropped.
    top = int(random[_TOP] * (round(height / scale) - crop + 1))
    left = int(random[_LEFT] * (round(width / scale) - crop + 1))
    side = crop * scale
    return min(left * scale, width - side), min(top * scale, height - side), side, side


def resized_crop(height: int, width: int, data: Data, random: NDArray[Any]) -> Box:
    """A part of 8 to 100 % of the area, 3:4 to 4:3, anywhere; after ten that do not fit, the
    largest middle part with such an aspect. torchvision's definition of RandomResizedCrop."""
    area = height * width
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for k in range(_TRY, _NUMBERS, 2):
        target = area * (AREA[0] + random[k] * (AREA[1] - AREA[0]))
        aspect = math.exp(low + random[k + 1] * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(random[_TOP] * (height - h + 1)), int(random[_LEFT] * (width - w + 1))
            return float(left), float(top), float(w), float(h)
    w = min(width, round(height * ASPECT[1]))
    h = min(height, round(width / ASPECT[0]))
    return float((width - w) // 2), float((height - h) // 2), float(w), float(h)
