"""Does training in bfloat16 come to the same loss? Small runs, before the tuner may take it.

`python -m knl.tune.accuracy` is the child that trains them: it writes one JSON object to stdout,
{"fp32": the loss for each seed, "bf16": the loss}.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from knl.children import child, last_words, lines_of
from knl.config import Recipe, load_recipe

_MODULE = "knl.tune.accuracy"
_RECIPE, _STEPS, _LAST = "digits", 50, 10
_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Check:
    """Whether bfloat16 may be taken, and what was done to know it."""

    passed: bool
    told: str


def check(environment: Mapping[str, str], limit_s: float) -> Check:
    """Train for `limit_s` seconds at most. Where that is too short bfloat16 passes unchecked, and
    the result says so."""
    with tempfile.TemporaryFile() as stderr:
        try:
            with child([sys.executable, "-m", _MODULE], environment, None, stderr) as process:
                lines = [*lines_of(process, limit_s)]
            losses = json.loads(lines[-1])
        except TimeoutError:
            return Check(True, f"no accuracy check: it did not end in {limit_s:.0f} s")
        except (IndexError, ValueError):
            stderr.seek(0)
            why = last_words(stderr.read().decode(errors="replace"))
            return Check(False, f"its accuracy check failed: {why}")
    return judged(losses["fp32"], losses["bf16"])


def judged(fp32: Sequence[float], bf16: float) -> Check:
    """Within the scatter: no farther outside the seeds' losses than they are apart."""
    low, high = min(fp32), max(fp32)
    passed = low - (high - low) <= bf16 <= high + (high - low)
    return Check(
        passed,
        f"{_STEPS} steps of {_RECIPE} come to a loss of {bf16:.4f} in bf16, {low:.4f} to "
        f"{high:.4f} in fp32 with {len(fp32)} seeds: "
        + ("within the scatter" if passed else "outside the scatter, so bf16 is not taken"),
    )


def _train(dtype: str, seed: int, layout: str) -> float:
    from knl.comm.collectives import Alone, Ranks
    from knl.comm.world import SINGLE
    from knl.data.dataset import open_dataset
    from knl.train.trainer import Trainer

    recipe = _recipe(dtype=dtype, seed=seed, layout=layout)
    trainer = Trainer(recipe, open_dataset(recipe.data, seed), Ranks(SINGLE, Alone()))
    try:
        return mean([trainer.step(step).loss for step in range(_STEPS)][-_LAST:])
    finally:
        trainer.close()


def _recipe(**settings: object) -> Recipe:
    from knl.train.job import resolved

    overrides = [f"train.steps={_STEPS}", *(f"train.{k}={v}" for k, v in settings.items())]
    return resolved(load_recipe(_RECIPE, overrides))


def main() -> None:
    """Train, and tell the losses."""
    from knl.native import stdout_to

    with stdout_to(2) as stdout:
        layout = _recipe(dtype="bf16").train.layout
        fp32 = [_train("fp32", seed, layout) for seed in _SEEDS]
        told = {"fp32": fp32, "bf16": _train("bf16", _SEEDS[0], layout)}
        os.write(stdout, json.dumps(told).encode() + b"\n")


if __name__ == "__main__":
    main()
