"""Rivals timed in turn, so that what else the machine does hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median


def in_turn(
    rivals: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call: A B C, A B C, ... for so many rounds after `warmup` uncounted ones."""
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for number in range(warmup + rounds):
        for name, action in rivals.items():
            began = time.perf_counter()
            action()
            taken = time.perf_counter() - began
            if number >= warmup:
                seconds[name].append(taken)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each rival's seconds."""
    return {name: median(values) for name, values in seconds.items()}
