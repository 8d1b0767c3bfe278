"""Rivals timed in turn, so that what else the machine does hits all alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from statistics import median


def in_turn(
    rivals: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, in so many rounds after `warmup` uncounted ones. Each round has another
    order: what one leaves in the caches helps or hinders all others alike."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    order, generator = list(rivals), random.Random(0)
    for number in range(warmup + rounds):
        generator.shuffle(order)
        for name in order:
            began = time.perf_counter()
            rivals[name]()
            taken = time.perf_counter() - began
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each rival's seconds."""
    return {name: median(values) for name, values in seconds.items()}
