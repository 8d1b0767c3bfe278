"""A study as JSON for Extra-P (github.com/extra-p/extrap, docs/file-formats.md)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from knl.errors import InputError
from knl.files import replace_file
from knl.scaling.study import Study


def extrap_of(study: Study) -> dict[str, Any]:
    """One parameter, nodes; a callpath for the step and for each of its parts; one value of each
    repetition, in seconds."""
    found: dict[str, dict[int, list[float]]] = {}
    for point in study.points:
        if point.failed is not None or point.step_s is None:
            continue
        times = {"step": point.step_s.median}
        times |= {f"step->{part}": time for part, time in (point.breakdown or {}).items()}
        for path, time in times.items():
            found.setdefault(path, {}).setdefault(point.nodes, []).append(time)
    return {
        "parameters": ["nodes"],
        "measurements": {
            path: {"time": [{"point": [n], "values": v} for n, v in sorted(by_nodes.items())]}
            for path, by_nodes in found.items()
        },
    }


def write_extrap(study: Study, path: Path) -> None:
    """Raises InputError when the place cannot be written."""
    try:
        with replace_file(path) as file:
            file.write((json.dumps(extrap_of(study), indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"--extrap {path}: cannot be written: {error.strerror}") from None
