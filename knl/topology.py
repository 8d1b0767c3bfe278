"""What the node is: its cores, tiles and memory, from /proc and /sys under any root."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knl.errors import InputError

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
_CLUSTER_MODES = {"All2All": "a2a"}


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
class Topology:
    """A node. `cores` are those that are online, by socket, tile and CPU; `allowed_cpus`: what the
    caller may use of them (cpuset and affinity mask). `cluster_mode`, `memory_mode`: "" where the
    processor has none; `inferred`: which of these had to be inferred from the memory nodes.
    `hugepages`: the setting of transparent huge pages."""

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
    hugepages: str

    @property
    def is_knl(self) -> bool:
        """Knights Landing or Knights Mill."""
        return self.uarch in _KNL

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
            "threads_per_core": max(len(core.cpus) for core in self.cores),
            "cpus": sum(len(core.cpus) for core in self.cores),
            "offline_cpus": list(self.offline_cpus),
            "allowed_cpus": list(self.allowed_cpus),
            "isa": list(self.isa),
            "cluster_mode": self.cluster_mode,
            "memory_mode": self.memory_mode,
            "inferred": list(self.inferred),
            "memory_nodes": [asdict(node) for node in self.memory_nodes],
            "hugepages": self.hugepages,
        }


def read_topology(fsroot: Path = Path("/")) -> Topology:
    """Read a node's /proc and /sys below `fsroot`.

    Under "/" the caller's own affinity mask counts too. Raises InputError naming the file that is
    missing or malformed.
    """
    info = _read_cpuinfo(fsroot / "proc/cpuinfo")
    nodes = _read_nodes(fsroot / "sys/devices/system/node")
    cores, offline = _read_cores(fsroot / "sys/devices/system/cpu", nodes)
    family, model = _whole(info, "cpu family", fsroot), _whole(info, "model", fsroot)
    uarch = _UARCH.get((family, model), info.get("vendor_id", "unknown"))
    online = {cpu for core in cores for cpu in core.cpus}
    is_max = "CPU Max" in info.get("model name", "")
    sockets = len({core.socket for core in cores})
    kinds = _kinds(nodes, uarch, is_max, sockets)
    modes = _modes(fsroot, uarch, is_max, sockets, nodes, set(kinds.values()))
    cluster, memory, inferred = modes
    return Topology(
        cpu_model=info.get("model name", "unknown"),
        family=family,
        model=model,
        uarch=uarch,
        isa=tuple(sorted(info.get("flags", "").split())),
        cores=cores,
        offline_cpus=offline,
        allowed_cpus=tuple(sorted(online & _allowed(fsroot, online))),
        cluster_mode=cluster,
        memory_mode=memory,
        inferred=inferred,
        memory_nodes=tuple(
            MemoryNode(n, kinds[n], node.bytes, node.cpus, _nearest_cpu_node(n, nodes))
            for n, node in sorted(nodes.items())
        ),
        hugepages=_hugepages(fsroot / "sys/kernel/mm/transparent_hugepage/enabled"),
    )


def describe(node: Topology) -> str:
    """The node in a few lines for a reader."""
    counts = node.to_json()
    lines = [
        f"{node.cpu_model} ({node.uarch}, family {node.family}, model {node.model})",
        f"{counts['sockets']} socket(s), {counts['tiles']} tiles, {counts['cores']} cores, "
        f"{counts['cpus']} CPUs ({counts['threads_per_core']} a core)",
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
    return "\n".join(lines)


def parse_cpulist(text: str) -> tuple[int, ...]:
    """CPUs of a list such as 0-3,8,10-11 (the kernel's cpulist)."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        cpus += range(int(first), int(last or first) + 1)
    return tuple(cpus)


def parse_cpumap(text: str) -> tuple[int, ...]:
    """CPUs of a mask such as 00000000,0000000f (the kernel's cpumap)."""
    bits = int(text.strip().replace(",", "") or "0", 16)
    return tuple(cpu for cpu in range(bits.bit_length()) if bits >> cpu & 1)


def format_cpulist(cpus: tuple[int, ...]) -> str:
    """The shortest cpulist of these CPUs."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in runs)


@dataclass(frozen=True)
class _Node:
    cpus: tuple[int, ...]
    bytes: int
    distances: dict[int, int]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; --fsroot must hold a node's /proc and /sys"
        ) from None


def _cpus(folder: Path, name: str) -> tuple[int, ...]:
    """A set of CPUs, from NAME_list or, on old kernels and in old dumps, the mask NAME."""
    listed = name.replace("map", "list") if name.endswith("map") else f"{name}_list"
    for path, parse in ((folder / listed, parse_cpulist), (folder / name, parse_cpumap)):
        if path.exists():
            return _set_of_cpus(path, _read(path), parse)
    raise InputError(f"{folder}: has neither {listed} nor {name}")


def _set_of_cpus(
    path: Path, text: str, parse: Callable[[str], tuple[int, ...]] = parse_cpulist
) -> tuple[int, ...]:
    try:
        return parse(text)
    except ValueError:
        raise InputError(f"{path}: {text.strip()!r} is not a set of CPUs") from None


def _number(path: Path) -> int:
    text = _read(path).strip()
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{path}: {text!r} is no number") from None


def _read_cpuinfo(path: Path) -> dict[str, str]:
    """The first processor's fields."""
    first = _read(path).split("\n\n")[0]
    fields = (line.partition(":") for line in first.splitlines() if ":" in line)
    info = {name.strip(): value.strip() for name, _, value in fields}
    if "processor" not in info:
        raise InputError(f"{path}: names no processor; --fsroot must hold an x86 node's /proc")
    return info


def _whole(info: dict[str, str], field: str, fsroot: Path) -> int:
    try:
        return int(info.get(field, ""))
    except ValueError:
        value = info.get(field)
        raise InputError(f"{fsroot}/proc/cpuinfo: {field} = {value!r} is no number") from None


def _read_nodes(folder: Path) -> dict[int, _Node]:
    """NUMA nodes by number; none where the kernel was built without."""
    nodes: dict[int, _Node] = {}
    for path in folder.glob("node[0-9]*"):
        total = re.search(r"MemTotal:\s+(\d+) kB", _read(path / "meminfo"))
        if total is None:
            raise InputError(f"{path / 'meminfo'}: has no line 'MemTotal: ... kB'")
        nodes[int(path.name[4:])] = _Node(_cpus(path, "cpumap"), int(total[1]) * 1024, {})
    for number, node in nodes.items():
        path = folder / f"node{number}" / "distance"
        if path.exists():
            row = _read(path).split()
            if len(row) != len(nodes) or not all(value.isdigit() for value in row):
                raise InputError(f"{path}: must be {len(nodes)} numbers, one a node")
            node.distances.update(zip(sorted(nodes), map(int, row)))
    return nodes


def _read_cores(folder: Path, nodes: dict[int, _Node]) -> tuple[tuple[Core, ...], tuple[int, ...]]:
    """Online cores, and the CPUs that are offline: those without a topology of their own."""
    node_of = {cpu: number for number, node in nodes.items() for cpu in node.cpus}
    present = sorted(int(p.name[3:]) for p in folder.glob("cpu[0-9]*") if p.name[3:].isdigit())
    if not present:
        raise InputError(f"{folder}: no cpu0, cpu1, ...; --fsroot must hold a node's /sys")
    online = [cpu for cpu in present if _is_online(folder / f"cpu{cpu}")]
    cores: dict[tuple[int, ...], Core] = {}
    for cpu in online:
        topology = folder / f"cpu{cpu}" / "topology"
        threads = tuple(c for c in _cpus(topology, "thread_siblings") if c in online) or (cpu,)
        socket = _number(topology / "physical_package_id")
        tile = _tile(folder / f"cpu{cpu}" / "cache", threads)
        cores[threads] = Core(max(socket, 0), tile, node_of.get(cpu, 0), threads)
    ordered = sorted(cores.values(), key=lambda core: (core.socket, core.tile, core.cpus))
    return tuple(ordered), tuple(cpu for cpu in present if cpu not in online)


def _is_online(folder: Path) -> bool:
    switch = folder / "online"
    return (folder / "topology").exists() and (not switch.exists() or _read(switch).strip() != "0")


def _tile(caches: Path, threads: tuple[int, ...]) -> int:
    """The lowest CPU that shares the L2 cache; the core itself where the kernel does not say."""
    for index in caches.glob("index[0-9]*"):
        level = index / "level"
        if level.exists() and _read(level).strip() == "2":
            return min(_cpus(index, "shared_cpu_map") or threads)
    return min(threads)


def _kinds(nodes: dict[int, _Node], uarch: str, is_max: bool, sockets: int) -> dict[int, str]:
    """What each node's memory is made of. A node with CPUs is DDR, but for a Xeon Max with empty
    slots; one without is MCDRAM on KNL, HBM on Xeon Max as far as the package can hold it."""
    hbm_only = (
        is_max
        and all(node.cpus for node in nodes.values())
        and sum(node.bytes for node in nodes.values()) <= sockets * _HBM_SOCKET_BYTES
    )
    kinds = {}
    for number, node in nodes.items():
        if node.cpus:
            kinds[number] = "hbm" if hbm_only else "ddr"
        elif uarch in _KNL:
            kinds[number] = "mcdram"
        else:
            kinds[number] = "hbm" if is_max and node.bytes <= _HBM_SOCKET_BYTES else "cxl"
    return kinds


def _nearest_cpu_node(number: int, nodes: dict[int, _Node]) -> int:
    """By distance from a node with CPUs to this one. On KNL a cluster's own MCDRAM is farther than
    a neighbour's DDR, but nearer than a neighbour's MCDRAM, so only rows of the table compare."""
    if nodes[number].cpus:
        return number
    owners = [other for other, node in sorted(nodes.items()) if node.cpus]
    if not owners:
        raise InputError("sys/devices/system/node: no node has CPUs")
    return min(owners, key=lambda owner: nodes[owner].distances.get(number, 255))


def _modes(
    fsroot: Path, uarch: str, is_max: bool, sockets: int, nodes: dict[int, _Node], kinds: set[str]
) -> tuple[str, str, tuple[str, ...]]:
    """Cluster mode, memory mode, and which of the two were inferred."""
    if uarch not in _KNL and not is_max:
        return "", "", ()
    for found in sorted((fsroot / "var/run/hwloc").glob("knl_memoryside_cache*")):
        fields = dict(re.findall(r"^(cluster_mode|memory_mode):\s*(\S+)", _read(found), re.M))
        if len(fields) == 2:
            cluster = fields["cluster_mode"]
            memory = fields["memory_mode"].lower().rstrip("0123456789")  # Hybrid25, Hybrid50
            return _CLUSTER_MODES.get(cluster, cluster.lower()), memory, ()
    # Quadrant, hemisphere and all-to-all look alike; quadrant is what sites use.
    clusters = sum(bool(node.cpus) for node in nodes.values()) // max(sockets, 1)
    cluster = {2: "snc2", 4: "snc4"}.get(clusters, "quadrant")
    inferred = ("cluster_mode", "memory_mode")
    if is_max:
        memory = "hbm-only" if "ddr" not in kinds else "flat" if "hbm" in kinds else "cache"
        return cluster, memory, inferred
    fast = sum(node.bytes for node in nodes.values() if not node.cpus)
    memory = "cache" if not fast else "flat" if fast > 0.9 * _MCDRAM_BYTES else "hybrid"
    return cluster, memory, inferred


def _hugepages(path: Path) -> str:
    """always, madvise or never; "" where the kernel does not say."""
    chosen = re.search(r"\[(\w+)\]", _read(path)) if path.exists() else None
    return chosen[1] if chosen else ""


def _allowed(fsroot: Path, online: set[int]) -> set[int]:
    """CPUs that the caller may use: its affinity mask on the live machine, else what the dumped
    process was allowed, else its cpuset, else all."""
    if fsroot == Path("/"):
        return os.sched_getaffinity(0)
    status = fsroot / "proc/self/status"
    if status.exists() and (line := re.search(r"^Cpus_allowed_list:(.*)", _read(status), re.M)):
        return set(_set_of_cpus(status, line[1]))
    for cpuset in ("cpuset.cpus.effective", "cpuset/cpuset.effective_cpus", "cpuset/cpuset.cpus"):
        path = fsroot / "sys/fs/cgroup" / cpuset
        if path.exists() and _read(path).strip():
            return set(_set_of_cpus(path, _read(path)))
    return online
