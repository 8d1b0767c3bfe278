"""`knl bench allreduce`: each provider beside Intel MPI's own benchmark, gloo and a plain copy."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from knl.bench.ranks import output, run_ranks
from knl.errors import FailedError
from knl.launch import find_mpi, ranks_command

RESNET50_BYTES = 102_228_128
ALEXNET_BYTES = 243_860_896
SIZES = (4 << 10, 64 << 10, 1 << 20, 16 << 20, RESNET50_BYTES, ALEXNET_BYTES)
ROUNDS = 15
_MODULE = "knl.bench.allreduce_ranks"
_TORCH_CCL = ("oneccl_bindings_for_pytorch", "torch_ccl")
# IMB is a process of its own, so its launches and ours take turns.
_LAUNCHES = 3
_LIMIT_S = 300.0


def bench(
    ranks: int, sizes: Sequence[int], rounds: int, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Measure; the object that `knl bench allreduce --json` prints, its keys are a contract.

    A row: `bytes`, `rival`, `median_s` of one call, `algorithm_gbs` (bytes / s / 1e9), and the
    ratios of its time to that of IMB's MPI_Allreduce, of gloo and of a copy of as many bytes by all
    ranks at once: below 1 is faster; None where that one was not measured. `overhead_over_bare`: of
    our way to oneCCL over a C++ loop, as a share, at ResNet-50's size or else the largest. Rival
    "shared" is what training takes: the sum in memory that the ranks of the node share; "oneccl" is
    what it takes between nodes.

    Raises FailedError when ranks fail or a sum is wrong.
    """
    launches = min(_LAUNCHES, rounds)
    share = -(-rounds // launches)
    groups: list[tuple[str, ...]] = [("shared", "oneccl", "oneccl-bare", "mpi", "gloo")]
    if any(map(importlib.util.find_spec, _TORCH_CCL)):  # torch has one process group at a time
        groups.append(("torch_ccl",))
    seconds: dict[tuple[int, str], list[float]] = {}
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    imb = imb_path(environment)
    for _ in range(launches):
        for group in groups:
            wanted = {"bytes": list(sizes), "rounds": share, "rivals": group}
            told = run_ranks(_MODULE, ranks, wanted, environment, _LIMIT_S)
            missing.update(told["missing"])
            versions.update(told["provider_versions"])
            for row in told["rows"]:
                seconds.setdefault((row["bytes"], row["rival"]), []).extend(row["seconds"])
        if imb is not None:
            for size, taken in imb_seconds(imb, ranks, sizes, share, environment).items():
                seconds.setdefault((size, "imb"), []).append(taken)
    rows = rows_of({key: median(values) for key, values in seconds.items()})
    by_key = {(row["bytes"], row["rival"]): row for row in rows}
    at = RESNET50_BYTES if RESNET50_BYTES in sizes else max(sizes)
    ours, bare = by_key.get((at, "oneccl")), by_key.get((at, "oneccl-bare"))
    return {
        "ranks": ranks,
        "node": platform.node(),
        "rows": rows,
        "overhead_over_bare": ours["median_s"] / bare["median_s"] - 1 if ours and bare else None,
        "copy_gbs": by_key[at, "copy"]["algorithm_gbs"],
        "imb": str(imb) if imb else "this MPI brings no bin/IMB-MPI1",
        "missing": missing,
        "versions": versions,
    }


def rows_of(medians: Mapping[tuple[int, str], float]) -> list[dict[str, Any]]:
    """Rows with their ratios, from the median seconds of each (bytes, rival)."""

    def ratio(size: int, taken: float, name: str) -> float | None:
        other = medians.get((size, name))
        return taken / other if other else None

    return [
        {
            "bytes": size,
            "rival": name,
            "median_s": taken,
            "algorithm_gbs": size / taken / 1e9,
            "ratio_to_imb": ratio(size, taken, "imb"),
            "ratio_to_gloo": ratio(size, taken, "gloo"),
            "ratio_to_copy": ratio(size, taken, "copy"),
        }
        for (size, name), taken in sorted(medians.items())
    ]


def imb_path(environment: Mapping[str, str]) -> Path | None:
    """Intel MPI's benchmark program; None where the MPI is another or does not bring it."""
    path = find_mpi(environment).root / "bin" / "IMB-MPI1"
    return path if path.exists() else None


def imb_seconds(
    program: Path, ranks: int, sizes: Sequence[int], rounds: int, environment: Mapping[str, str]
) -> dict[int, float]:
    """Mean seconds of IMB's MPI_Allreduce at each size (multiples of 4 bytes), in ranks under the
    same plan. Raises FailedError when it fails."""
    with tempfile.TemporaryDirectory(prefix="knl-bench-") as folder:
        lengths = Path(folder) / "lengths"
        lengths.write_text("".join(f"{size}\n" for size in sizes))
        options = ["Allreduce", "-npmin", str(ranks), "-msglen", str(lengths)]
        # Without -msglog lengths above 4 MiB are cut, without -mem they are left out.
        options += ["-msglog", f"0:{max(sizes).bit_length()}"]
        options += ["-mem", f"{4 * max(sizes) / 1e9 + 0.1:.2f}"]
        options += ["-iter", str(rounds), "-iter_policy", "off"]
        rank = ["-m", "knl", "run", "--", str(program), *options]
        command, environment = ranks_command(ranks, rank, environment, planned=True)
        text = output(command, environment, _LIMIT_S, program.name)
    found: dict[int, float] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 5 and words[0].isdigit():
            found[int(words[0])] = float(words[4]) / 1e6  # t_avg, in microseconds
    if set(found) != set(sizes):
        raise FailedError(f"{program.name} measured {sorted(found)} bytes and not {list(sizes)}")
    return found


def describe(result: Mapping[str, Any]) -> str:
    """The result as a table."""
    lines = [f"{result['ranks']} ranks on {result['node']}; times as ratios, below 1 is faster"]
    heads = "".join(f"{head:>7}" for head in ("/imb", "/gloo", "/copy"))
    lines.append(f"{'bytes':>11}  {'rival':<12}{'ms':>9}{'GB/s':>8}{heads}")
    for row in result["rows"]:
        ratios = (row[f"ratio_to_{name}"] for name in ("imb", "gloo", "copy"))
        cells = "".join(f"{'-' if r is None else format(r, '.2f'):>7}" for r in ratios)
        lines.append(
            f"{row['bytes']:>11}  {row['rival']:<12}{row['median_s'] * 1e3:>9.3f}"
            f"{row['algorithm_gbs']:>8.2f}{cells}"
        )
    if (overhead := result["overhead_over_bare"]) is not None:
        lines.append(f"our way to oneCCL over a C++ loop: {overhead:+.1%}")
    lines += [f"copy: {result['copy_gbs']:.1f} GB/s a rank, all at once", f"IMB: {result['imb']}"]
    lines += [f"not measured: {name}: {why}" for name, why in result["missing"].items()]
    return "\n".join(lines)
