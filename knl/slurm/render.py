"""A script of `slurm/` fitted to a site, a queue and a user's wishes, byte for byte the same."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from knl import __version__
from knl.errors import InputError
from knl.site import JOBS, Queue, Site

_BEGIN, _END = "# --- settings: edit here", "# --- end of settings"


@dataclass(frozen=True)
class Order:
    """What a job is to do. `script`: name of a file in `slurm/`; `arguments`: what it is given;
    `seconds`: time limit; `after`: a job to wait for the end of; `settings`: values of its KNL_
    variables; `account`: "" for the site's."""

    script: str
    name: str
    arguments: Sequence[str]
    nodes: int
    seconds: int
    ranks_per_node: int = 1
    account: str = ""
    after: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)


def render(site: Site, queue: Queue | None, order: Order) -> str:
    """The text of the script. Raises InputError for what cannot stand in a line of #SBATCH."""
    text = (JOBS / order.script).read_text()
    _, _, rest = text.partition(f"\n{_BEGIN}\n")
    _, end, body = rest.partition(f"\n{_END}\n")
    assert end, order.script  # every script has the two lines
    settings = {
        "KNL_JOBS": str(JOBS.resolve()),
        "KNL_LOCAL": site.local,
        "KNL_LAUNCHER": site.launcher,
        "KNL_RANKS_PER_NODE": str(order.ranks_per_node),
        "KNL_REQUEUE": "yes" if site.requeue else "no",
        **order.settings,
    }
    options = directives(site, queue, order)
    where = f"{site.title}, queue {queue.name}" if queue else site.title
    lines = [
        "#!/bin/bash",
        f"# {order.script} by knl {__version__} for {_one_line('title', where)}.",
        f"# {cost(queue, order)}",
        "#",
        *options,
        "",
        "# --- settings",
        *(f"export {name}={shlex.quote(value)}" for name, value in settings.items()),
        *(f"module load {shlex.quote(module)} || exit 2" for module in site.modules),
        *site.prologue,
        f"set -- {shlex.join(order.arguments)}",
        _END,
    ]
    return "\n".join(lines) + "\n" + body


def directives(site: Site, queue: Queue | None, order: Order) -> list[str]:
    """The lines of #SBATCH; without what the site refuses."""
    options = {
        "job-name": order.name,
        "output": "%x-%j.out",
        "open-mode": "append",
        "partition": queue.name if queue else "",
        "account": order.account or site.account,
        "nodes": str(order.nodes),
        "ntasks": str(order.nodes * order.ranks_per_node),
        "ntasks-per-node": str(order.ranks_per_node),
        "time": slurm_time(order.seconds),
        "signal": "B:USR1@120",
        "dependency": f"afterany:{order.after}" if order.after else "",
    }
    lines = [f"--{name}={_word(name, value)}" for name, value in options.items() if value]
    lines += ["--exclusive", "--requeue" if site.requeue else "--no-requeue"]
    lines = [line for line in lines if line[2:].partition("=")[0] not in site.leave_out]
    for directive in site.directives:
        if not directive.startswith("-"):
            raise InputError(
                f"{site.name}: directives: {directive!r}: must be an option such as --exclusive"
            )
        lines.append(_one_line("directives", directive))
    return [f"#SBATCH {line}" for line in lines]


def cost(queue: Queue | None, order: Order) -> str:
    """What the job is charged at most, in words."""
    hours = order.nodes * order.seconds / 3600
    nodes = "1 node" if order.nodes == 1 else f"{order.nodes} nodes"
    text = f"{nodes} for {slurm_time(order.seconds)}: at most {hours:,.1f} node-hours"
    return f"{text}, {hours * queue.su:,.1f} SU" if queue and queue.su else text


def slurm_time(seconds: int) -> str:
    """D-HH:MM:SS as Slurm reads it."""
    days, rest = divmod(seconds, 86400)
    clock = f"{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def _word(name: str, value: str) -> str:
    """A line of #SBATCH ends at a line's end, knows no variables, and quotes as a shell does."""
    _one_line(name, value)
    return value if re.fullmatch(r"[\w@%+=:,./-]+", value) else shlex.quote(value)


def _one_line(name: str, value: str) -> str:
    if not value.isprintable():
        raise InputError(f"{name} {value!r}: must be in one line, of printable characters")
    return value
