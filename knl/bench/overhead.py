"""`knl bench overhead`: seconds of a step in our own code, as tensors and ranks grow: a line."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from knl.bench.ranks import run_ranks

TENSORS, RANKS, ROUNDS = (10, 100, 300, 1000), (1, 2, 4, 8), 30
_MODULE = "knl.bench.overhead_ranks"
_LIMIT_S = 120.0


def bench(
    tensors: Sequence[int], ranks: Sequence[int], rounds: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Measure; the object that `knl bench overhead --json` prints, its keys are a contract.

    A row: `ranks`, `tensors`, and the CPU `seconds` of the main thread in a step, the least of all
    rounds: zeroing, hooks, starting and finishing buckets, LARS, with tensors of 32 bytes; less
    those of the same backward without us and of the collectives themselves. `fits`: for each number
    of ranks the line through its rows by least squares: `per_tensor_s`, `intercept_s`, `r2`.

    Raises FailedError when ranks fail.
    """
    rows, fits = [], []
    for number in ranks:
        wanted = {"tensors": list(tensors), "rounds": rounds}
        told = run_ranks(_MODULE, number, wanted, environment, _LIMIT_S)
        mine = [
            {"ranks": number, "tensors": row["tensors"], "seconds": row["seconds"]}
            for row in told["rows"]
        ]
        rows += mine
        x, y = (np.array([row[key] for row in mine]) for key in ("tensors", "seconds"))
        fits.append({"ranks": number, **line(x, y)})
    return {"node": platform.node(), "rows": rows, "fits": fits}


def line(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> dict[str, float]:
    """The line through points by least squares, and the share of their variance that it explains
    (1 where they do not vary)."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = float(np.sum((y - (slope * x + intercept)) ** 2))
    whole = float(np.sum((y - y.mean()) ** 2))
    r2 = 1 - rest / whole if whole else 1.0
    return {"per_tensor_s": float(slope), "intercept_s": float(intercept), "r2": r2}


def describe(result: Mapping[str, Any]) -> str:
    """The rows and lines for a reader."""
    lines = [
        f"{row['ranks']:>2} rank(s) {row['tensors']:>5} tensors {row['seconds'] * 1e6:>9.0f} us"
        for row in result["rows"]
    ]
    lines += [
        f"{fit['ranks']:>2} rank(s): {fit['per_tensor_s'] * 1e6:.2f} us a tensor + "
        f"{fit['intercept_s'] * 1e6:.0f} us, r2 {fit['r2']:.3f}"
        for fit in result["fits"]
    ]
    return "\n".join(lines)
