"""Where the ranks of a node ran, drawn from what the run has noted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knl.report.plots import BLUE, GREEN, ORANGE, Plot, draw, plain

# Letter of knl.show.cells, what it stands for, its colour. Loaders on compute cores are not seen.
_ROLES = {
    "C": ("compute", BLUE),
    "W": ("comm worker", ORANGE),
    "L": ("loader", GREEN),
    ".": ("not this rank's", "#e6eaee"),
}


def placement_plot(placement: object) -> Plot | None:
    """None where the run has noted none."""
    if not isinstance(placement, Mapping):
        return None
    rows, firsts = placement.get("rows"), placement.get("first_cpus")
    if not (isinstance(rows, list) and isinstance(firsts, list) and rows and firsts):
        return None
    lines = [str(row)[: len(firsts)] for row in rows]
    model = plain(str(placement.get("cpu_model", "")))

    def paint(axes: Any) -> None:
        from matplotlib.collections import PatchCollection
        from matplotlib.patches import Patch, Rectangle

        squares = [
            Rectangle((x + 0.04, y + 0.07), 0.92, 0.86, color=_role(letter)[1], linewidth=0)
            for y, line in enumerate(lines)
            for x, letter in enumerate(line)
        ]
        axes.add_collection(PatchCollection(squares, match_original=True))
        axes.set_xlim(0, len(firsts))
        axes.set_ylim(len(lines), 0)
        step = max(1, len(firsts) // 12)
        axes.set_xticks([x + 0.5 for x in range(0, len(firsts), step)])
        axes.set_xticklabels([str(cpu) for cpu in firsts[::step]])
        axes.set_yticks([y + 0.5 for y in range(len(lines))])
        axes.set_yticklabels([f"rank {number}" for number in range(len(lines))])
        axes.set_xlabel(f"first CPU of each core, {model}")
        axes.grid(False)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        seen = [role for letter, role in _ROLES.items() if any(letter in line for line in lines)]
        axes.legend(
            handles=[Patch(color=color, label=name) for name, color in seen],
            loc="upper center", bbox_to_anchor=(0.5, -0.35), ncol=4,
        )  # fmt: skip

    height = 1.9 + 0.3 * min(len(lines), 16)
    caption = f"Cores of {placement.get('host', 'the node')}, as its ranks were bound at the start."
    return draw("placement", "Placement", caption, paint, inches=(5.4, height))


def _role(letter: str) -> tuple[str, str]:
    return _ROLES.get(letter, _ROLES["."])
