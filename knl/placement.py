"""Which CPUs of a node do what: compute, communication, loading, or nothing. By rule, no measuring.

The rule: the first cores of a domain are kept from compute, in whole tiles, one in sixteen (4 of
the 68 of a KNL), for oneCCL's workers and, where there are more than these need, for the operating
system, which is busiest on core 0. Ranks get equal runs of the other cores. Loader threads, and
workers where no core is left for them, run on hardware threads that compute leaves free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knl.errors import InputError
from knl.topology import Core, Topology

# One core in so many is kept from compute, where a tile can be spared.
_CORES_PER_RESERVED = 16
# A rank of fewer cores gives none to communication: it would lose more than the overlap is worth.
_LEAST_CORES_FOR_COMM = 8
# More workers a rank were never worth their cores in published runs; the search may try more.
_MOST_WORKERS_BY_RULE = 2
# One loader CPU for so many compute cores: a KNL core decodes 25 of a node's 80 pictures a second.
_CORES_PER_LOADER = 8


@dataclass(frozen=True)
class Placement:
    """CPUs of one rank, disjoint from each other and from every other rank's. `nodes`: the NUMA
    nodes of its compute CPUs. Without CPUs of their own (empty), workers and loader share the
    compute CPUs."""

    compute: tuple[int, ...]
    comm: tuple[int, ...]
    loader: tuple[int, ...]
    nodes: tuple[int, ...]


_Tile = tuple[Core, ...]


def domains(node: Topology) -> int:
    """How many parts of the node a rank should not straddle: as many ranks use all of it."""
    return len(_domains(node, ranks=len(node.cores)))


def place(
    node: Topology,
    ranks: int,
    threads_per_core: int = 1,
    reserve_cores: int | None = None,
    workers: int | None = None,
) -> tuple[Placement, ...]:
    """Split the allowed CPUs over `ranks` ranks.

    `reserve_cores`: cores of the node to keep from compute; `workers`: of oneCCL, a rank; None for
    the rule's. Raises InputError when there are not enough allowed cores or hardware threads.
    """
    for name, value in (("cores to reserve", reserve_cores), ("workers a rank", workers)):
        if value is not None and value < 0:
            raise InputError(f"{name} = {value}: must be 0 or more")
    parts = _domains(node, ranks)
    allowed = sum(len(tile) for part in parts for tile in part)
    if not 1 <= ranks <= allowed:
        raise InputError(
            f"ranks per node = {ranks}: must be 1 to {allowed}, the cores that this process may "
            "use; ask for fewer, or for a larger allocation"
        )
    threads = max(len(core.cpus) for part in parts for tile in part for core in tile)
    if not 1 <= threads_per_core <= threads:
        raise InputError(f"threads a core = {threads_per_core}: must be 1 to {threads}")
    shares = _shares(parts, ranks)
    kept = [_reserved(part, k, reserve_cores, len(parts)) for part, k in zip(parts, shares)]
    blocks: list[tuple[int, list[Core]]] = []
    for index, (part, share) in enumerate(zip(parts, shares)):
        blocks += [(index, block) for block in _split(part, share, kept[index])]
    # All ranks do equal work in step: more cores for one of them would only wait for the others.
    size = min(len(block) for _, block in blocks)
    compute = [(index, block[len(block) - size :]) for index, block in blocks]
    return _assign(parts, compute, threads_per_core, workers)


def _domains(node: Topology, ranks: int) -> list[list[_Tile]]:
    """Tiles of allowed cores by NUMA node, or by socket where that is right: see _by_node."""
    tiles: dict[tuple[int, int, int], list[Core]] = {}
    for core in node.allowed_cores:
        tiles.setdefault((core.socket, core.node, core.tile), []).append(core)
    if not tiles:
        raise InputError("allowed CPUs: none of the node's CPUs may be used by this process")
    by_node = _by_node(node, ranks, {key[:2] for key in tiles})
    parts: dict[tuple[int, ...], list[_Tile]] = {}
    for key in sorted(tiles, key=lambda key: (key[0], key[1], tiles[key][0].cpus)):
        parts.setdefault(key[:2] if by_node else key[:1], []).append(tuple(tiles[key]))
    return list(parts.values())


def _by_node(node: Topology, ranks: int, nodes: set[tuple[int, int]]) -> bool:
    """A rank stays within a cluster of a KNL or a Xeon. The quarters of an EPYC are closer to each
    other, so there fewer ranks than quarters may take whole ones of a socket together."""
    return node.is_intel or ranks >= len(nodes)


def _shares(parts: list[list[_Tile]], ranks: int) -> list[int]:
    """Ranks of each part, so that the rank with the fewest cores has as many as can be."""
    shares = [0] * len(parts)
    sizes = [sum(map(len, part)) for part in parts]
    for _ in range(ranks):
        best = max(range(len(parts)), key=lambda n: (sizes[n] / (shares[n] + 1), -n))
        shares[best] += 1
    return shares


def _reserved(part: list[_Tile], ranks: int, wanted: int | None, parts: int) -> int:
    """Cores of a part to keep from compute: whole tiles, unless so many were asked for."""
    cores = sum(map(len, part))
    if ranks == 0:
        return cores
    if wanted is not None:
        return min(-(-wanted // parts), cores - ranks)
    if cores // ranks < _LEAST_CORES_FOR_COMM:
        return 0
    tile = max(map(len, part))
    if tile > max(2, cores // 4):  # a virtual machine's idea of an L2 cache
        tile = 1
    return cores // _CORES_PER_RESERVED // tile * tile


def _split(part: list[_Tile], ranks: int, reserved: int) -> list[list[Core]]:
    """Equal runs of the cores after the reserved ones, in whole tiles where there are enough."""
    if ranks == 0:
        return []
    cores = [core for tile in part for core in tile][reserved:]
    tiles: list[list[Core]] = []
    for core in cores:
        if tiles and tiles[-1][0].tile == core.tile:
            tiles[-1].append(core)
        else:
            tiles.append([core])
    if len(tiles) < ranks:
        tiles = [[core] for core in cores]
    each, more = divmod(len(tiles), ranks)
    # The first ones get less: what is left over of them is by the reserved cores.
    ends = [sum(each + (r >= ranks - more) for r in range(n + 1)) for n in range(ranks)]
    return [
        [core for tile in tiles[start:end] for core in tile] for start, end in zip([0, *ends], ends)
    ]


def _assign(
    parts: list[list[_Tile]],
    compute: Sequence[tuple[int, list[Core]]],
    threads_per_core: int,
    workers: int | None,
) -> tuple[Placement, ...]:
    """Give each rank its workers' and loader's CPUs from what compute leaves of its part."""
    taken = {core.cpus for _, block in compute for core in block}
    free = [[c for tile in part for c in tile if c.cpus not in taken] for part in parts]
    ranks_of = [sum(index == n for index, _ in compute) for n in range(len(parts))]
    if workers is None:
        workers = min(
            _workers_by_rule(
                len(free[n]), ranks, [b for i, b in compute if i == n], threads_per_core
            )
            for n, ranks in enumerate(ranks_of)
            if ranks
        )
    placements = []
    left = list(ranks_of)
    for index, block in compute:
        # From the cores that stay free, this rank's share, the last ones: the first one is the
        # operating system's.
        share = -(-len(free[index]) // left[index])
        left[index] -= 1
        comm = [free[index].pop().cpus[0] for _ in range(min(workers, share))]
        threads = [cpu for core in block for cpu in core.cpus[threads_per_core:]][::-1]
        while len(comm) < workers and threads:
            comm.append(threads.pop(0))
        wanted = max(1, len(block) // _CORES_PER_LOADER)
        loader = _last_threads(block, threads_per_core, set(comm))[:wanted]
        placements.append((index, block, sorted(comm), loader))
    # A core of its own for a loader that finds no hardware thread, where each rank gets one and the
    # first one is left to the operating system.
    has_core = [len(cores) > ranks for cores, ranks in zip(free, ranks_of)]
    return tuple(
        Placement(
            tuple(sorted(cpu for core in block for cpu in core.cpus[:threads_per_core])),
            tuple(comm),
            tuple(sorted(loader) or (free[index].pop().cpus[:1] if has_core[index] else ())),
            tuple(sorted({core.node for core in block})),
        )
        for index, block, comm, loader in placements
    )


def _workers_by_rule(
    free: int, ranks: int, blocks: Sequence[Sequence[Core]], threads_per_core: int
) -> int:
    """As many as cores are free, but one for the operating system if there are plenty; else one on
    a hardware thread that is left; none where a rank is too small to have one."""
    if min(map(len, blocks)) < _LEAST_CORES_FOR_COMM:
        return 0
    if free >= ranks:
        return max(1, min((free - 1) // ranks, _MOST_WORKERS_BY_RULE))
    return int(all(len(core.cpus) > threads_per_core for block in blocks for core in block))


def _last_threads(block: Sequence[Core], used: int, taken: set[int]) -> list[int]:
    """The last hardware thread of each core from the last core on, where compute leaves it."""
    return [
        core.cpus[-1]
        for core in block[::-1]
        if len(core.cpus) > used and core.cpus[-1] not in taken
    ]
