"""What a node is: its cores, tiles and memory, and the rules that tell which memory is what.

`knl.sysfs` reads it from /proc and /sys, `knl.lstopo` from a file of hwloc.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from knl.cpulist import format_cpulist

# Family and model of Intel's many-core processors (Linux: arch/x86/include/asm/intel-family.h).
_UARCH = {
    (6, 87): "knl",
    (6, 133): "knm",
    (6, 85): "skx",  # Skylake, Cascade Lake and Cooper Lake share the number
    (6, 106): "icx",
    (6, 108): "icx",
    (6, 143): "spr",
    (6, 207): "emr",
}
_KNL = ("knl", "knm")
_GB = 1 << 30
# On package: 16 GB on a KNL, 64 GB a socket on a Xeon Max.
_MCDRAM_BYTES = 16 * _GB
_HBM_SOCKET_BYTES = 64 * _GB
# HBM has several times the bandwidth of DDR, CXL memory a part of it.
_HBM_BANDWIDTH = 1.5


@dataclass(frozen=True)
class Core:
    """One core. `cpus`: its hardware threads by the kernel's numbers, first one first; `tile`: the
    cores that share its L2 cache, by the lowest CPU among them; `node`: its NUMA node."""

    socket: int
    tile: int
    node: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class MemoryNode:
    """One NUMA node. `kind`: ddr, mcdram, hbm, cxl; `nearest_cpu_node`: itself if it has CPUs."""

    id: int
    kind: str
    bytes: int
    cpus: tuple[int, ...]
    nearest_cpu_node: int


@dataclass(frozen=True)
class HugePagePool:
    """Huge pages of one size that the kernel has set aside, in pages of `page_bytes`."""

    page_bytes: int
    total: int
    free: int


@dataclass(frozen=True)
class Topology:
    """A node. `cores` are those that are online, by socket, tile and CPU; `allowed_cpus`: what the
    caller may use of them (cpuset and affinity mask). `cluster_mode`, `memory_mode`: "" where the
    processor has none; `inferred`: which of these had to be inferred from the memory nodes.
    `hugepages`: the setting of transparent huge pages (always, madvise, never); `governor`: of
    CPU frequency, "mixed" where CPUs differ; `fabrics`: InfiniBand and Omni-Path devices. These
    are empty where the source does not say.
    """

    cpu_model: str
    family: int
    model: int
    uarch: str
    isa: tuple[str, ...]
    cores: tuple[Core, ...]
    offline_cpus: tuple[int, ...]
    allowed_cpus: tuple[int, ...]
    cluster_mode: str
    memory_mode: str
    inferred: tuple[str, ...]
    memory_nodes: tuple[MemoryNode, ...]
    hugepages: str = ""
    hugepage_pools: tuple[HugePagePool, ...] = ()
    governor: str = ""
    fabrics: tuple[str, ...] = ()

    @property
    def is_knl(self) -> bool:
        """Knights Landing or Knights Mill."""
        return self.uarch in _KNL

    @property
    def is_intel(self) -> bool:
        """Any of Intel's server processors that are known here."""
        return self.uarch in _UARCH.values()

    @property
    def allowed_cores(self) -> tuple[Core, ...]:
        """Cores of which the caller may use a hardware thread, with those threads alone."""
        allowed = set(self.allowed_cpus)
        cut = (replace(c, cpus=tuple(n for n in c.cpus if n in allowed)) for c in self.cores)
        return tuple(core for core in cut if core.cpus)

    @property
    def threads_per_core(self) -> int:
        """Hardware threads of the core that has most of them online."""
        return max(len(core.cpus) for core in self.cores)

    def to_json(self) -> dict[str, Any]:
        """The object that `knl topology --json` prints; its keys are a contract."""
        return {
            "cpu_model": self.cpu_model,
            "family": self.family,
            "model": self.model,
            "uarch": self.uarch,
            "sockets": len({core.socket for core in self.cores}),
            "tiles": len({core.tile for core in self.cores}),
            "cores": len(self.cores),
            "threads_per_core": self.threads_per_core,
            "cpus": sum(len(core.cpus) for core in self.cores),
            "offline_cpus": list(self.offline_cpus),
            "allowed_cpus": list(self.allowed_cpus),
            "isa": list(self.isa),
            "cluster_mode": self.cluster_mode,
            "memory_mode": self.memory_mode,
            "inferred": list(self.inferred),
            "memory_nodes": [asdict(node) for node in self.memory_nodes],
            "hugepages": self.hugepages,
            "hugepage_pools": [asdict(pool) for pool in self.hugepage_pools],
            "governor": self.governor,
            "fabrics": list(self.fabrics),
        }


def describe(node: Topology) -> str:
    """The node in a few lines for a reader."""
    counts = node.to_json()
    lines = [
        f"{node.cpu_model} ({node.uarch}, family {node.family}, model {node.model})",
        f"{counts['sockets']} socket(s), {counts['tiles']} tiles, {counts['cores']} cores, "
        f"{counts['cpus']} CPUs ({node.threads_per_core} a core)",
        f"allowed: {format_cpulist(node.allowed_cpus) or 'none'}"
        + (f"; offline: {format_cpulist(node.offline_cpus)}" if node.offline_cpus else ""),
    ]
    if node.cluster_mode:
        source = "inferred from the memory nodes" if node.inferred else "as hwloc read it"
        lines.append(f"cluster mode {node.cluster_mode}, memory mode {node.memory_mode} ({source})")
    for memory in node.memory_nodes:
        where = f"CPUs {format_cpulist(memory.cpus)}" if memory.cpus else "no CPUs"
        lines.append(
            f"memory node {memory.id}: {memory.kind}, {memory.bytes / _GB:.1f} GiB, {where}, "
            f"nearest CPU node {memory.nearest_cpu_node}"
        )
    pages = [f"transparent {node.hugepages}"] if node.hugepages else []
    pages += [
        f"{pool.free} of {pool.total} free at {pool.page_bytes >> 10} KiB"
        for pool in node.hugepage_pools
    ]
    if pages:
        lines.append(f"huge pages: {', '.join(pages)}")
    if node.governor:
        lines.append(f"frequency governor: {node.governor}")
    if node.fabrics:
        lines.append(f"fabrics: {', '.join(node.fabrics)}")
    return "\n".join(lines)


@dataclass(frozen=True)
class NodeFacts:
    """What a source says of a NUMA node. `distances`: from it to others, by their numbers;
    `bandwidth`: of reads by the nearest CPUs, in MB/s, 0 where unknown; `kind`: "" where unknown.
    """

    cpus: tuple[int, ...]
    bytes: int
    distances: Mapping[int, int]
    bandwidth: int = 0
    kind: str = ""


def uarch_of(family: int, model: int, vendor: str) -> str:
    """The microarchitecture's short name: the vendor's where it is none of Intel's many-core."""
    return _UARCH.get((family, model), vendor)


def by_place(cores: list[Core]) -> tuple[Core, ...]:
    """Cores by socket, tile and CPU."""
    return tuple(sorted(cores, key=lambda core: (core.socket, core.tile, core.cpus)))


def memory_nodes(
    nodes: Mapping[int, NodeFacts], uarch: str, cpu_model: str, sockets: int
) -> tuple[MemoryNode, ...]:
    """What each node's memory is made of, and which CPUs are near. At least one must have CPUs,
    if there are any nodes.

    A node with CPUs is DDR, but for a Xeon Max with empty slots. One without is MCDRAM on a KNL;
    elsewhere the source's word counts, then bandwidth, then what a Xeon Max's package can hold.
    """
    hbm_only = (
        _is_max(cpu_model)
        and all(node.cpus for node in nodes.values())
        and 0 < sum(node.bytes for node in nodes.values()) <= sockets * _HBM_SOCKET_BYTES
    )
    found = []
    for number, node in sorted(nodes.items()):
        nearest = _nearest_cpu_node(number, nodes)
        near = nodes[nearest].bandwidth
        if node.cpus:
            kind = "hbm" if hbm_only else "ddr"
        elif uarch in _KNL:
            kind = "mcdram"
        elif node.kind:
            kind = node.kind
        elif node.bandwidth and near:
            kind = "hbm" if node.bandwidth >= _HBM_BANDWIDTH * near else "cxl"
        else:
            fits = _is_max(cpu_model) and node.bytes <= _HBM_SOCKET_BYTES
            kind = "hbm" if fits else "cxl"
        found.append(MemoryNode(number, kind, node.bytes, node.cpus, nearest))
    return tuple(found)


def modes(
    uarch: str, cpu_model: str, sockets: int, nodes: tuple[MemoryNode, ...], named: tuple[str, str]
) -> tuple[str, str, tuple[str, ...]]:
    """Cluster mode, memory mode, and which of the two were inferred.

    `named`: both modes as hwloc names them, such as ("All2All", "Hybrid50"); "" where unknown.
    """
    is_max = _is_max(cpu_model)
    if uarch not in _KNL and not is_max:
        return "", "", ()
    if all(named):
        cluster = {"all2all": "a2a"}.get(named[0].lower(), named[0].lower())
        return cluster, named[1].lower().rstrip("0123456789"), ()  # Hybrid25, Hybrid50
    # Quadrant, hemisphere and all-to-all look alike; quadrant is what sites use.
    clusters = sum(bool(node.cpus) for node in nodes) // max(sockets, 1)
    cluster = {2: "snc2", 4: "snc4"}.get(clusters, "quadrant")
    inferred = ("cluster_mode", "memory_mode")
    if is_max:
        kinds = {node.kind for node in nodes}
        memory = "hbm-only" if "ddr" not in kinds else "flat" if "hbm" in kinds else "cache"
        return cluster, memory, inferred
    fast = sum(node.bytes for node in nodes if not node.cpus)
    memory = "cache" if not fast else "flat" if fast > 0.9 * _MCDRAM_BYTES else "hybrid"
    return cluster, memory, inferred


def _is_max(cpu_model: str) -> bool:
    return "CPU Max" in cpu_model


def _nearest_cpu_node(number: int, nodes: Mapping[int, NodeFacts]) -> int:
    """By distance from a node with CPUs to this one. On KNL a cluster's own MCDRAM is farther than
    a neighbour's DDR, but nearer than a neighbour's MCDRAM, so only rows of the table compare."""
    if nodes[number].cpus:
        return number
    owners = [other for other, node in sorted(nodes.items()) if node.cpus]
    return min(owners, key=lambda owner: nodes[owner].distances.get(number, 255))
