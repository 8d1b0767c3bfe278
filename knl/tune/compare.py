"""How sure a difference is: configurations measured in turn, and their ratio resampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from knl.profile import Gain

_RESAMPLES = 4000


def gain_of(images: int, step_s: Mapping[str, Sequence[float]]) -> Gain:
    """From the step times (s) of "as-is", "rule" and "best": median speeds, and the ratio of the
    best to as-is with its bootstrap interval (percentiles 2.5 and 97.5 of resampled medians).
    `sure`, `sure_over_rule`: shares of resamples in which the best is faster."""
    generator = np.random.Generator(np.random.PCG64(0))
    medians = {
        name: np.median(generator.choice(np.asarray(times), size=(_RESAMPLES, len(times))), axis=1)
        for name, times in step_s.items()
    }
    ratio = medians["as-is"] / medians["best"]
    low, high = np.percentile(ratio, [2.5, 97.5])
    speed = {name: images / float(np.median(times)) for name, times in step_s.items()}
    return Gain(
        as_is_images_per_s=speed["as-is"],
        rule_images_per_s=speed["rule"],
        best_images_per_s=speed["best"],
        gain=speed["best"] / speed["as-is"],
        gain_low=float(low),
        gain_high=float(high),
        sure=float(np.mean(ratio > 1)),
        sure_over_rule=float(np.mean(medians["rule"] > medians["best"])),
    )
