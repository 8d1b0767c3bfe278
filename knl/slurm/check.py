"""What ranks say about themselves before anything is trained: `slurm/train.sbatch --check`.

Hundreds of them may share a machine in a test, so nothing heavy is imported: no torch, no MPI.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

from knl.comm.world import world_from
from knl.cpulist import format_cpulist
from knl.errors import FailedError, InputError, KnlError, say

_SHOWN = 8  # rows of the table; the others are alike


def main(arguments: Sequence[str]) -> int:
    """`rank`: one line of JSON about this rank. `gather NODES RANKS`: the lines of all, on standard
    input, checked and told. Returns the exit status."""
    try:
        if list(arguments) == ["rank"]:
            print(json.dumps(about_rank()), flush=True)
        elif len(arguments) == 3 and arguments[0] == "gather":
            print(gathered(sys.stdin, int(arguments[1]), int(arguments[2])), flush=True)
        else:
            raise InputError("knl.slurm.check: give rank, or gather NODES RANKS")
    except KnlError as error:
        say(str(error))
        return error.exit_code
    return 0


def about_rank() -> dict[str, Any]:
    """Where this rank is and what it would run on. `seconds`: since 1970, for the time of start."""
    from knl.profile import plan_of_rank
    from knl.sysfs import read_topology

    world = world_from(os.environ, needs_pmi=False)
    plan, number, where = plan_of_rank(read_topology(), world, None, dict(os.environ))
    return {
        "rank": world.rank,
        "size": world.size,
        "local_rank": world.local_rank,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "cpus": format_cpulist(plan.ranks[number].compute_cpus),
        "plan": where,
        "seconds": time.time(),
    }


def gathered(lines: Iterable[str], nodes: int, ranks: int) -> str:
    """A table of ranks. Raises FailedError where they are not each of 0 to `ranks` - 1 once, on so
    many nodes."""
    rows = sorted(filter(None, map(_row, lines)), key=lambda row: row["rank"])
    numbers = [row["rank"] for row in rows]
    missing = sorted(set(range(ranks)) - set(numbers))
    if missing or len(numbers) != ranks:
        twice = sorted({n for n in numbers if numbers.count(n) > 1})
        raise FailedError(
            f"{len(set(numbers))} of {ranks} ranks answered; missing: {_some(missing)}; "
            f"twice: {_some(twice)}; look for their nodes in the log above"
        )
    sizes = {row["size"] for row in rows}
    hosts = {row["host"] for row in rows}
    if sizes != {ranks} or len(hosts) != nodes:
        raise FailedError(
            f"{ranks} ranks on {len(hosts)} of {nodes} nodes, who take themselves to be "
            f"{', '.join(map(str, sorted(sizes)))}: the launcher and MPI do not belong together"
        )
    return "\n".join(_table(rows, hosts))


def _row(line: str) -> dict[str, Any] | None:
    """None for what is no line of a rank: launchers print, too."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("rank"), int) else None


def _table(rows: list[dict[str, Any]], hosts: set[str]) -> list[str]:
    columns = ("rank", "local_rank", "host", "cpus", "plan")
    shown = rows if len(rows) <= _SHOWN else [*rows[: _SHOWN - 1], rows[-1]]
    cells = [columns, *(tuple(str(row[name]) for name in columns) for row in shown)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(map(str.ljust, cell, widths)).rstrip() for cell in cells]
    if len(rows) > _SHOWN:
        lines.insert(-1, f"... {len(rows) - _SHOWN} more")
    times = [row["seconds"] for row in rows]
    spread = max(times) - min(times)
    lines.append(
        f"{len(rows)} distinct ranks of {len(rows)} on {len(hosts)} nodes; "
        f"the last came {spread:.1f} s after the first"
    )
    return lines


def _some(numbers: Sequence[int]) -> str:
    text = ", ".join(map(str, numbers[:10])) or "none"
    return f"{text} and {len(numbers) - 10} more" if len(numbers) > 10 else text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
