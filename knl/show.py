"""Draws a plan: one row a rank, one column a core, memory nodes below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from knl.cpulist import format_cpulist
from knl.errors import InputError
from knl.plan import Plan
from knl.topology import Core, Topology

_ROLES = {
    "C": "compute",
    "W": "comm worker",
    "L": "loader",
    "S": "spare",
    "x": "not allowed",
    ".": "another rank",
}
_ANSI = {"C": "32", "W": "35", "L": "36", "S": "33", "x": "31"}
_PNG = {
    "C": "#2a9d4a",
    "W": "#8e44ad",
    "L": "#1f8fb5",
    "S": "#d9a400",
    "x": "#b03030",
    ".": "#e4e4e4",
}
_COLUMNS = 80
_LABEL = len("rank 000  ")


def cells(node: Topology, plan: Plan) -> list[str]:
    """One string a rank, one letter a core: C compute, W comm worker, L loader, S spare, x not
    allowed, "." of another rank. A core with several roles shows the first of these."""
    spare, allowed = set(plan.spare_cpus), set(node.allowed_cpus)
    rows = []
    for rank in plan.ranks:
        sets = {"C": rank.compute_cpus, "W": rank.comm_cpus, "L": rank.loader_cpus}

        def letter(core: Core, sets: dict[str, tuple[int, ...]] = sets) -> str:
            mine = set(core.cpus)
            found = [name for name, cpus in sets.items() if mine & set(cpus)]
            if found:
                return found[0]
            if not mine & allowed:
                return "x"
            return "S" if mine & allowed <= spare else "."

        rows.append("".join(letter(core) for core in node.cores))
    return rows


def text(node: Topology, plan: Plan, *, color: bool) -> str:
    """The drawing in 80 columns; wider nodes go on in further blocks."""
    rows = cells(node, plan)
    width = _COLUMNS - _LABEL
    lines = []
    for start in range(0, len(node.cores), width):
        part = node.cores[start : start + width]
        ruler = "".join(
            str(core.cpus[0] // 10 % 10) if n % 10 == 0 else " " for n, core in enumerate(part)
        )
        lines.append((f"CPU {part[0].cpus[0]}".ljust(_LABEL) + ruler).rstrip())
        for rank, row in zip(plan.ranks, rows):
            shown = row[start : start + width]
            if color:
                shown = "".join(f"\033[{_ANSI.get(c, '0')}m{c}\033[0m" for c in shown)
            lines.append(f"rank {rank.local_rank}".ljust(_LABEL) + shown)
    lines.append(", ".join(f"{name} {role}" for name, role in _legend(rows)))
    for line in [*_threads(plan), *_memory(node, plan)]:
        lines += textwrap.wrap(line, _COLUMNS, subsequent_indent="  ")
    return "\n".join(lines)


def picture(node: Topology, plan: Plan, path: Path) -> None:
    """The drawing as PNG. Raises InputError when the file cannot be written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PatchCollection
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    rows = cells(node, plan)
    figure = Figure(figsize=(max(6.0, 0.14 * len(node.cores)), 1.8 + 0.35 * len(rows)))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    squares = [
        Rectangle((x, y), 0.92, 0.85, color=_PNG[name], linewidth=0)
        for y, row in enumerate(rows)
        for x, name in enumerate(row)
    ]
    axes.add_collection(PatchCollection(squares, match_original=True))
    axes.set_xlim(0, len(node.cores))
    axes.set_ylim(len(rows), 0)
    step = max(1, len(node.cores) // 16)
    axes.set_xticks([x + 0.46 for x in range(0, len(node.cores), step)])
    axes.set_xticklabels([str(core.cpus[0]) for core in node.cores[::step]])
    axes.set_yticks([y + 0.42 for y in range(len(rows))])
    axes.set_yticklabels([f"rank {rank.local_rank}" for rank in plan.ranks])
    below = ["first CPU of each core", *_threads(plan), *_memory(node, plan)]
    axes.set_xlabel("\n".join(below))
    axes.set_title(node.cpu_model)
    legend = [Patch(color=_PNG[name], label=role) for name, role in _legend(rows)]
    axes.legend(
        handles=legend, ncol=5, loc="lower center", bbox_to_anchor=(0.5, 1.15), frameon=False
    )
    try:
        figure.savefig(path, format="png", dpi=120, bbox_inches="tight")
    except OSError as error:
        raise InputError(f"--png {path}: cannot be written: {error.strerror}") from None


def _legend(rows: Sequence[str]) -> list[tuple[str, str]]:
    """The letters that occur, and what they mean."""
    return [(name, role) for name, role in _ROLES.items() if any(name in row for row in rows)]


def _threads(plan: Plan) -> list[str]:
    """Roles on hardware threads of compute cores, which a letter a core cannot show."""
    lines = []
    for rank in plan.ranks:
        roles = [("worker", rank.comm_cpus), ("loader", rank.loader_cpus)]
        found = [f"{role} {_list(cpus)}" for role, cpus in roles if cpus]
        if found:
            lines.append(f"rank {rank.local_rank}: CPUs of {'; '.join(found)}")
    return lines


def _memory(node: Topology, plan: Plan) -> list[str]:
    lines = []
    for memory in node.memory_nodes:
        users = [rank.local_rank for rank in plan.ranks if memory.id in rank.memory.nodes]
        line = f"memory node {memory.id}: {memory.kind}, {memory.bytes / (1 << 30):.0f} GiB"
        if users:
            line += f", {plan.ranks[users[0]].memory.policy} by rank {_list(users)}"
        lines.append(line)
    return lines


def _list(numbers: Sequence[int]) -> str:
    return format_cpulist(numbers).replace(",", ", ")
