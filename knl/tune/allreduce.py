"""The algorithm of oneCCL's allreduce for each size, by measuring the sums alone: in seconds."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import msgspec

from knl.bench.ranks import run_ranks
from knl.choices import ALLREDUCE_ALGORITHMS, Choices
from knl.profile import save_profile
from knl.tune.trial import Bench

# Sizes of buckets, from the scalars of a step to AlexNet's largest layer.
SIZES = (4 << 10, 256 << 10, 4 << 20, 16 << 20, 64 << 20)
# oneCCL reads its table of algorithms once, when it starts. Sizes that differ by little stand for
# the algorithms in it, and so one launch takes all of them in turn.
_STEP = 64
# Faster by less than this is noise, and one algorithm for all sizes easier to live with.
_WORTH = 0.95
_ROUNDS = 7
_LIMIT_S = 60.0
_MODULE = "knl.bench.allreduce_ranks"


def measured(bench: Bench, choices: Choices) -> str:
    """CCL_ALLREDUCE that is best for the ranks of these choices. Raises FailedError when they do
    not run."""
    table, meant = probe()
    with tempfile.TemporaryDirectory(prefix="knl-tune-") as folder:
        path = Path(folder) / "profile.json"
        save_profile(bench.profile(msgspec.structs.replace(choices, allreduce=table)), path)
        wanted = {"bytes": list(meant), "rounds": _ROUNDS, "rivals": ["oneccl"]}
        told = run_ranks(_MODULE, choices.ranks_per_node, wanted, bench.environment, _LIMIT_S, path)
    rows = [row for row in told["rows"] if row["rival"] == "oneccl"]
    return best({row["bytes"]: row["seconds"] for row in rows}, meant) if rows else ""


def probe(sizes: Sequence[int] = SIZES) -> tuple[str, dict[int, tuple[int, str]]]:
    """A table (CCL_ALLREDUCE) by which one launch can measure all algorithms, and the bytes to
    measure: bytes -> (the size meant, the algorithm)."""
    meant = {
        size + number * _STEP: (size, algorithm)
        for size in sorted(sizes)
        for number, algorithm in enumerate(ALLREDUCE_ALGORITHMS)
    }
    return _table([(size, algorithm) for size, (_, algorithm) in meant.items()]), meant


def best(seconds: Mapping[int, Sequence[float]], meant: Mapping[int, tuple[int, str]]) -> str:
    """CCL_ALLREDUCE with the fastest algorithm from one measured size to the next. `seconds`: of
    each call at the probe's bytes."""
    medians: dict[int, dict[str, float]] = {}
    for size, (wanted, algorithm) in meant.items():
        medians.setdefault(wanted, {})[algorithm] = median(seconds[size])
    # The one that is best for the most bytes is kept where another is not clearly faster.
    overall = min(ALLREDUCE_ALGORITHMS, key=lambda a: sum(of[a] for of in medians.values()))
    chosen = []
    for size, of in sorted(medians.items()):
        fastest = min(of, key=lambda algorithm: of[algorithm])
        clear = of[fastest] < _WORTH * of[overall]
        chosen.append((size, fastest if clear else overall))
    # A run of one algorithm ends halfway (in ratio) to the next size.
    runs = [list(run) for _, run in itertools.groupby(chosen, key=lambda pair: pair[1])]
    if len(runs) == 1:
        return runs[0][0][1]
    ends = [
        (round((run[-1][0] * after[0][0]) ** 0.5), run[0][1]) for run, after in zip(runs, runs[1:])
    ]
    return _table([*ends, (0, runs[-1][0][1])])


def _table(ends: Sequence[tuple[int, str]]) -> str:
    """The last bytes of each range with its algorithm, as oneCCL reads them; the last has none."""
    parts, start = [], 0
    for end, algorithm in ends[:-1]:
        parts.append(f"{algorithm}:{start}-{end}")
        start = end + 1
    return ";".join([*parts, f"{ends[-1][1]}:{start}-max"])
