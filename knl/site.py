"""Sites: how a cluster wants jobs, and what its network is. Read from TOML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

from msgspec import Meta

from knl.config import Section, convert, read_table
from knl.errors import InputError

# The scripts and sites of `slurm/`, which an installed package carries with it.
JOBS = Path(__file__).parent / "slurm" / "jobs"
SITES = JOBS / "sites"

_Positive = Annotated[int, Meta(ge=1)]
_Count = Annotated[int, Meta(ge=0)]
_AboveZero = Annotated[float, Meta(gt=0, le=1e9)]
_NotNegative = Annotated[float, Meta(ge=0, le=1e9)]


class Queue(Section, frozen=True):
    """A partition. `nodes`, `hours`: the most that a job may have; `jobs`, `user_nodes`: the most
    that a user may have at a time, 0 where not known; `su`: charge of a node-hour, 0 where not
    known; `ticket`: what is to be done before it can be used; `local_gb`: node-local folder, 0
    where the site's; `node`, `watts`, `usd`: the hardware, thermal design power of its processors,
    price (0: not known)."""

    name: str
    nodes: _Positive
    hours: _AboveZero
    jobs: _Count = 0
    user_nodes: _Count = 0
    su: _NotNegative = 0.0
    ticket: str = ""
    local_gb: _NotNegative = 0.0
    node: str = ""
    watts: _NotNegative = 0.0
    usd: _NotNegative = 0.0


class Network(Section, frozen=True):
    """A fat tree of two levels. `latency_us`: of a message; `node_gb_s`: GB/s of a node in each
    direction, `rank_gb_s`: what one rank can inject; `leaf_nodes`, `leaf_uplinks`: nodes and links
    up of a leaf switch."""

    latency_us: _AboveZero
    node_gb_s: _AboveZero
    rank_gb_s: _AboveZero
    leaf_nodes: _Positive
    leaf_uplinks: _Positive


class Site(Section, frozen=True):
    """A cluster. `launcher`: who starts ranks; `leave_out`: options of sbatch that it refuses,
    `directives`: that it wants besides, each as it stands behind #SBATCH; `modules`, `prologue`:
    loaded, run, before anything else; `account`: charged unless another is named; `requeue`:
    whether a job may put itself back into the queue; `local`: node-local folder, `local_gb`: its
    size; `ranks_per_node`: unless asked for otherwise."""

    name: str
    title: str
    launcher: Literal["auto", "ibrun", "srun"] = "auto"
    modules: tuple[str, ...] = ()
    prologue: tuple[str, ...] = ()
    directives: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    account: str = ""
    requeue: bool = True
    local: str = "/tmp"
    local_gb: _NotNegative = 0.0
    ranks_per_node: _Positive = 1
    queues: tuple[Queue, ...] = ()
    network: Optional[Network] = None


def load_site(name: str) -> Site:
    """A site by name or by the path of its TOML file.

    Raises InputError in one line that names the key, its value and what it may be.
    """
    path, table = read_table("site", name, SITES)
    site = convert(table, Site, path)
    doubled = {queue.name for queue in site.queues if _count(site, queue.name) > 1}
    if doubled:
        raise InputError(f"{path}: queues: {', '.join(sorted(doubled))} is there twice")
    return site


def _count(site: Site, name: str) -> int:
    return sum(queue.name == name for queue in site.queues)
