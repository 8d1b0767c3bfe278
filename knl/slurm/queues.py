"""Which queue of a site takes a job, and what the job is charged: asked before Slurm is."""

from __future__ import annotations

from knl.errors import InputError
from knl.site import Queue, Site


def choose_queue(site: Site, nodes: int, hours: float, name: str = "") -> Queue | None:
    """The queue of that name, else the first of the site's that takes so many nodes for so long.
    None where the site lists no queues and none is named: Slurm's own default then counts.

    Raises InputError that names the limit, and the queue that would do.
    """
    if not site.queues:
        return Queue(name=name, nodes=nodes, hours=hours) if name else None
    fitting = [queue for queue in site.queues if not _too_much(queue, nodes, hours)]
    if not name:
        if fitting:
            return fitting[0]
        most = "; ".join(f"{q.name} takes {q.nodes} nodes for {q.hours:g} h" for q in site.queues)
        raise InputError(f"{site.name}: no queue takes {nodes} nodes for {hours:g} h: {most}")
    named = {queue.name: queue for queue in site.queues}
    if name not in named:
        raise InputError(f"--queue {name}: {site.name} has {', '.join(named)}")
    if limit := _too_much(named[name], nodes, hours):
        scarce = "nodes" if nodes > _most_nodes(named[name]) else "hours"
        other = next((_advice(queue, scarce) for queue in fitting), "no queue takes that")
        raise InputError(f"{site.name} {limit}; {other}")
    return named[name]


def _too_much(queue: Queue, nodes: int, hours: float) -> str:
    """Which limit of the queue is passed, "" for none."""
    if nodes > _most_nodes(queue):
        return f"{queue.name} takes {_most_nodes(queue)} nodes, not {nodes}"
    if hours > queue.hours:
        return f"{queue.name} takes {queue.hours:g} h, not {hours:g}"
    return ""


def _most_nodes(queue: Queue) -> int:
    return min(queue.nodes, queue.user_nodes or queue.nodes)


def _advice(queue: Queue, scarce: str) -> str:
    most = f"{_most_nodes(queue)}" if scarce == "nodes" else f"{queue.hours:g} h"
    needs = f" and needs {queue.ticket}" if queue.ticket else ""
    return f"{queue.name} takes {most}{needs}"
