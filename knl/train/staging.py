"""`knl train --stage`: each node copies what its lanes need to its own storage, before training."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from knl.comm.bootstrap import Bootstrap
from knl.comm.world import World
from knl.data.lanes import Lanes, lanes_of
from knl.data.packed import PackedDataset
from knl.data.stage import NotStaged, needed_records, stage


@dataclass(frozen=True)
class Staged:
    """What came of it on all nodes. `in_place`: hosts that read the set where it is, and why."""

    nodes: int
    in_place: dict[str, str]
    wall_s: float

    def describe(self, place: Path) -> str:
        """In a line."""
        text = f"staged into {place} on {self.nodes - len(self.in_place)} of {self.nodes} node(s)"
        text += f" in {self.wall_s:.1f} s"
        if self.in_place:
            host, why = next(iter(self.in_place.items()))
            text += f"; the others read in place ({host}: {why})"
        return text


def stage_on_nodes(
    world: World,
    bootstrap: Bootstrap,
    hosts: list[str],
    dataset: PackedDataset,
    lanes: Lanes,
    steps: range,
    place: Path,
) -> Staged:
    """Stage for all ranks; every rank calls it. `hosts`: of each rank. Each node's first rank
    copies for all of it. When all ranks have the copy open its name is removed, so that nothing
    is left behind whatever becomes of the job."""
    began = time.monotonic()
    mine = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    folder, why = "", ""
    if world.rank == mine[0]:
        wanted = (lane for rank in mine for lane in lanes_of(rank, world.size, lanes.lanes))
        folder, why = _try(dataset, lanes, wanted, steps, place)
    told = [json.loads(text) for text in bootstrap.gather(json.dumps([folder, why]))]
    theirs, _ = told[mine[0]]
    if theirs:
        dataset.read_from(Path(theirs))
    bootstrap.gather("")  # all have it open
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    firsts = {host: told[hosts.index(host)] for host in dict.fromkeys(hosts)}
    in_place = {host: reason for host, (copied, reason) in firsts.items() if not copied}
    return Staged(len(firsts), in_place, time.monotonic() - began)


def _try(
    dataset: PackedDataset, lanes: Lanes, mine: Iterable[int], steps: range, place: Path
) -> tuple[str, str]:
    """The folder of the copy, or why there is none."""
    try:
        return str(stage(dataset.train, needed_records(lanes, mine, steps), place)), ""
    except NotStaged as reason:
        return "", str(reason)
