"""A study in lines for a reader, with what its words mean; and as the object of `--json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from knl.scaling.breakdown import MEANING, PARTS
from knl.scaling.study import WORDS, Study, rows_of

_TITLES = (
    f"{'nodes':>6}{'batch':>8}{'s a step':>10}{'images/s':>11}{'(least to greatest)':>24}"
    f"{'speed-up':>10}{'ideal':>7}{'efficiency':>12}"
)


def where(study: Study) -> str:
    """On what it was measured, in a sentence: ranks of one machine are no nodes."""
    if study.cores_per_rank is None:
        return ""
    if study.cores_per_rank == 0:
        return (
            "Ranks of one machine stand for nodes; there are fewer cores than ranks, which take "
            "turns on them: this says nothing about a cluster."
        )
    return (
        f"Ranks of one machine stand for nodes, with {study.cores_per_rank} core(s) each whatever "
        "their number; they share its memory, caches and power, and no network lies between them."
    )


def describe(study: Study, folder: Path) -> str:
    """The table, the breakdown, what failed, and the words."""
    lines = [f"{study.recipe}, {study.scaling} scaling: {WORDS[f'{study.scaling} scaling']}"]
    lines += [where(study)] if where(study) else []
    lines += ["", _TITLES]
    rows = rows_of(study)
    for row in rows:
        span = f"({row.images_per_s_low:,.1f} to {row.images_per_s_high:,.1f})"
        lines.append(
            f"{row.nodes:>6}{row.global_batch:>8}{row.step_s:>10.3g}{row.images_per_s:>11,.1f}"
            f"{span:>24}{row.speed_up:>10.2f}{row.ideal:>7.4g}{row.efficiency:>12.1%}"
        )
    lines += ["", "ms of a step  " + "".join(f"{part:>14}" for part in PARTS)]
    for row in rows:
        parts = "".join(f"{row.breakdown[part] * 1e3:>14.2f}" for part in PARTS)
        lines.append(f"{row.nodes:>6} node(s){parts}")
    lines.append("")
    for point in study.points:
        if point.failed:
            lines.append(
                f"{point.nodes} node(s), repetition {point.repetition + 1}: failed: {point.failed}"
            )
    words = {**{w: m for w, m in WORDS.items() if "scaling" not in w}, **MEANING}
    lines += [f"{word}: {meaning}" for word, meaning in words.items()]
    lines.append(f"study {folder}; knl report {folder} draws it")
    return "\n".join(lines)


def to_json(study: Study, folder: Path) -> dict[str, Any]:
    """The object that `knl scale run --json` prints; its keys are a contract."""
    return {
        "folder": str(folder),
        "note": where(study),
        "words": {**WORDS, **MEANING},
        "rows": msgspec.to_builtins(rows_of(study)),
        **msgspec.to_builtins(study),
    }
