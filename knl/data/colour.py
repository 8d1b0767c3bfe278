"""Random colours: jitter as torchvision defines it, lighting as AlexNet had it.

Brightness, saturation, contrast and lighting are linear in a pixel's red, green and blue but for
the contrast's mean, so that all of them together are one matrix and one offset. Values are not
clamped to 0 to 255 between them, as torchvision does on bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knl.config import Data
from knl.data.hashing import uniform

_GREY = np.array([0.299, 0.587, 0.114])  # ITU-R 601-2, as PIL's
# Principal components of the colours of ImageNet's pixels, of 1: values, and vectors in columns
# (Krizhevsky et al. 2012; the figures of fb.resnet.torch).
_VALUES = np.array([0.2175, 0.0188, 0.0045])
_VECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)
_KINDS = ("brightness", "contrast", "saturation")
# Random numbers of a sample: three factors, three that order them, two for each of three normals.
_FIRST, _NUMBERS = 64, 12


@dataclass(frozen=True)
class Colours:
    """Factors of `_KINDS`, the order in which they apply, and light [3] that is added at last."""

    factors: tuple[float, ...]
    order: tuple[int, ...]
    light: NDArray[Any]

    def resolve(self, mean: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The matrix [3, 3] and the offset [3] for pixels of 0 to 255 with this mean [3]."""
        matrix, offset = np.eye(3), np.zeros(3)
        for kind in self.order:
            factor = self.factors[kind]
            if _KINDS[kind] == "saturation":
                change = factor * np.eye(3) + (1 - factor) * np.outer(np.ones(3), _GREY)
                matrix, offset = change @ matrix, change @ offset
                continue
            towards = 0.0  # black, or the grey of the picture as it is by now
            if _KINDS[kind] == "contrast":
                towards = _GREY @ (matrix @ mean + offset)
            matrix, offset = factor * matrix, factor * offset + (1 - factor) * towards
        return matrix, offset + 255 * self.light


def draw_colours(
    data: Data, seed: int, epoch: int, samples: NDArray[Any]
) -> list[Colours] | list[None]:
    """The colours of each sample in an epoch: factors of 1 +- colour_jitter, light of `lighting`
    standard deviations along each component."""
    if not data.colour_jitter and not data.lighting:
        return [None] * len(samples)
    numbers = np.arange(_FIRST, _FIRST + _NUMBERS)
    random = uniform(seed, epoch, samples[:, None], numbers)
    factors = 1 + data.colour_jitter * (2 * random[:, :3] - 1)
    orders = np.argsort(random[:, 3:6], axis=1)
    # Box and Muller's normals: the logarithm's argument is above 0.
    normal = np.sqrt(-2 * np.log(1 - random[:, 6:9])) * np.cos(2 * np.pi * random[:, 9:12])
    light = data.lighting * (normal * _VALUES) @ _VECTORS.T
    return [
        Colours(tuple(f), tuple(o), lit)
        for f, o, lit in zip(factors.tolist(), orders.tolist(), light)
    ]
