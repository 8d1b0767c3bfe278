"""Random numbers without a state: a function of what they are for, the same on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(*parts: int | NDArray[Any]) -> NDArray[Any]:
    """64 random bits for each tuple of `parts`, which broadcast: whole numbers, scalar or array.

    SplitMix64's finaliser (Steele, Lea, Flood 2014), chained over the parts. numpy's own
    generators may change their streams between versions (NEP 19), and a resumed run must not.
    """
    state = np.zeros(1, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            bits = np.asarray(part).astype(np.uint64)
            z = (state ^ bits) + _GOLDEN
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = z ^ (z >> np.uint64(31))
    return state


def uniform(*parts: int | NDArray[Any]) -> NDArray[Any]:
    """Numbers in [0, 1), float64, from `mix`."""
    return (mix(*parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53
