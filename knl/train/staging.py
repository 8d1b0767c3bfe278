"""`knl train --stage`: each node copies what its lanes need to its own storage, before training."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from knl.comm.bootstrap import Bootstrap
from knl.comm.world import World
from knl.data.lanes import Lanes, lanes_of
from knl.data.packed import PackedDataset
from knl.data.stage import Copy, NotStaged, needed_records, stage

_LOOK_S = 1.0  # between two looks of all ranks at how far the copies are


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
    copies for all of it, however long that takes. When all ranks have the copy open its name is
    removed, so that nothing is left behind whatever becomes of the run."""
    began = time.monotonic()
    mine = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    is_first = world.rank == mine[0]
    wanted = [lane for rank in mine for lane in lanes_of(rank, world.size, lanes.lanes)]
    with ThreadPoolExecutor(1) as thread:
        copying = thread.submit(_copy, dataset, lanes, wanted if is_first else [], steps, place)
        # In rounds: a collective that waits for a copy would be taken for a rank that hangs.
        while not all(bootstrap.gather("done" if copying.done() else "")):
            time.sleep(_LOOK_S)
        copy = copying.result()
    folder = "" if isinstance(copy, str) else str(copy.folder)
    told = [json.loads(text) for text in bootstrap.gather(json.dumps([folder, str(copy)]))]
    folder_here, problem = told[mine[0]][0], ""
    if folder_here:
        try:
            dataset.train.move(Path(folder_here))
        except OSError as error:
            problem = f"{error.filename}: {error.strerror}"
    problems = bootstrap.gather(problem)  # all have it open, or not
    if isinstance(copy, Copy) and is_first:
        copy.remove()
    in_place = {}
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, other in enumerate(hosts) if other == host]
        why = "" if told[ranks[0]][0] else told[ranks[0]][1]
        why = why or next((problems[rank] for rank in ranks if problems[rank]), "")
        if why:
            in_place[host] = why
    return Staged(len(set(hosts)), in_place, time.monotonic() - began)


def _copy(
    dataset: PackedDataset, lanes: Lanes, mine: Iterable[int], steps: range, place: Path
) -> Copy | str:
    """The copy, or why there is none; "" where these lanes are none."""
    if not mine:
        return ""
    try:
        return stage(dataset.train, needed_records(lanes, mine, steps), place)
    except NotStaged as reason:
        return str(reason)
