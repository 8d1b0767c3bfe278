"""Reads a node from /proc and /sys, of this machine or of a copy under any folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from knl.cpulist import parse_cpulist, parse_cpumap
from knl.errors import InputError
from knl.topology import (
    Core,
    HugePagePool,
    NodeFacts,
    Topology,
    by_place,
    memory_nodes,
    modes,
    uarch_of,
)


def read_topology(fsroot: Path = Path("/")) -> Topology:
    """Read a node's /proc and /sys below `fsroot`.

    Under "/" the caller's own affinity mask counts too. Raises InputError naming the file that is
    missing or malformed.
    """
    info = _read_cpuinfo(fsroot / "proc/cpuinfo")
    nodes = _read_nodes(fsroot / "sys/devices/system/node")
    cpu_folder = fsroot / "sys/devices/system/cpu"
    cores, offline = _read_cores(cpu_folder, nodes)
    online = {cpu for core in cores for cpu in core.cpus}
    family, model = _whole(info, "cpu family", fsroot), _whole(info, "model", fsroot)
    name = info.get("model name", "unknown")
    uarch = uarch_of(family, model, info.get("vendor_id", "unknown"))
    sockets = len({core.socket for core in cores})
    memory = memory_nodes(nodes, uarch, name, sockets)
    cluster_mode, memory_mode, inferred = modes(uarch, name, sockets, memory, _named_modes(fsroot))
    return Topology(
        cpu_model=name,
        family=family,
        model=model,
        uarch=uarch,
        isa=tuple(sorted(info.get("flags", "").split())),
        cores=cores,
        offline_cpus=offline,
        allowed_cpus=tuple(sorted(online & _allowed(fsroot, online))),
        cluster_mode=cluster_mode,
        memory_mode=memory_mode,
        inferred=inferred,
        memory_nodes=memory,
        hugepages=_hugepages(fsroot / "sys/kernel/mm/transparent_hugepage/enabled"),
        hugepage_pools=_hugepage_pools(fsroot / "sys/kernel/mm/hugepages"),
        governor=_governor(cpu_folder, online),
        fabrics=tuple(sorted(p.name for p in (fsroot / "sys/class/infiniband").glob("*"))),
    )


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
        raise InputError(
            f"{path}: {text.strip()!r} is not a set of CPUs such as 0-3,8 or a mask; copy it anew"
        ) from None


def _number(path: Path) -> int:
    text = _read(path).strip()
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{path}: {text!r} is no whole number; copy it anew") from None


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
        raise InputError(
            f"{fsroot / 'proc/cpuinfo'}: {field} = {info.get(field)!r} is no whole number; "
            "--fsroot must hold an x86 node's /proc"
        ) from None


def _read_nodes(folder: Path) -> dict[int, NodeFacts]:
    """NUMA nodes by number; none where the kernel was built without."""
    numbers = sorted(int(path.name[4:]) for path in folder.glob("node[0-9]*"))
    nodes = {number: _read_node(folder / f"node{number}", numbers) for number in numbers}
    if nodes and not any(node.cpus for node in nodes.values()):
        raise InputError(f"{folder}: no node has CPUs; --fsroot must hold a whole node's /sys")
    return nodes


def _read_node(folder: Path, numbers: list[int]) -> NodeFacts:
    meminfo = folder / "meminfo"
    total = re.search(r"MemTotal:\s+(\d+) kB", _read(meminfo))
    if total is None:
        raise InputError(f"{meminfo}: has no line 'MemTotal: ... kB'; copy it anew")
    distances: dict[int, int] = {}
    table = folder / "distance"
    if table.exists():
        row = _read(table).split()
        if len(row) != len(numbers) or not all(value.isdecimal() for value in row):
            raise InputError(
                f"{table}: {' '.join(row)!r} must be {len(numbers)} numbers, one a node"
            )
        distances = dict(zip(numbers, map(int, row)))
    return NodeFacts(
        _cpus(folder, "cpumap"), int(total[1]) * 1024, distances, bandwidth=_bandwidth(folder)
    )


def _bandwidth(folder: Path) -> int:
    """MB/s as the firmware's HMAT says. access0 is for the fastest initiator, which may be a GPU;
    access1, on newer kernels, is for CPUs."""
    for access in ("access1", "access0"):
        path = folder / access / "initiators/read_bandwidth"
        if path.exists():
            return _number(path)
    return 0


def _read_cores(
    folder: Path, nodes: dict[int, NodeFacts]
) -> tuple[tuple[Core, ...], tuple[int, ...]]:
    """Online cores, and the CPUs that are offline: those without a topology of their own."""
    node_of = {cpu: number for number, node in nodes.items() for cpu in node.cpus}
    present = sorted(int(p.name[3:]) for p in folder.glob("cpu[0-9]*") if p.name[3:].isdigit())
    online = [cpu for cpu in present if _is_online(folder / f"cpu{cpu}")]
    if not online:
        raise InputError(
            f"{folder}: no cpu0/topology, cpu1/topology, ...; --fsroot must hold a node's /sys"
        )
    cores: dict[tuple[int, ...], Core] = {}
    for cpu in online:
        topology = folder / f"cpu{cpu}" / "topology"
        threads = tuple(c for c in _cpus(topology, "thread_siblings") if c in online) or (cpu,)
        socket = _number(topology / "physical_package_id")
        tile = _tile(folder / f"cpu{cpu}" / "cache", threads)
        cores[threads] = Core(max(socket, 0), tile, node_of.get(cpu, 0), threads)
    return by_place(list(cores.values())), tuple(cpu for cpu in present if cpu not in online)


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


def _named_modes(fsroot: Path) -> tuple[str, str]:
    """Cluster and memory mode of a KNL, where root let hwloc-dump-hwdata read them at boot."""
    for found in sorted((fsroot / "var/run/hwloc").glob("knl_memoryside_cache*")):
        fields = dict(re.findall(r"^(cluster_mode|memory_mode):\s*(\S+)", _read(found), re.M))
        if len(fields) == 2:
            return fields["cluster_mode"], fields["memory_mode"]
    return "", ""


def _hugepages(path: Path) -> str:
    """always, madvise or never; "" where the kernel does not say."""
    chosen = re.search(r"\[(\w+)\]", _read(path)) if path.exists() else None
    return chosen[1] if chosen else ""


def _hugepage_pools(folder: Path) -> tuple[HugePagePool, ...]:
    """By size of page."""
    pools = []
    for path in folder.glob("hugepages-*kB"):
        kilobytes = path.name[len("hugepages-") : -len("kB")]
        if kilobytes.isdecimal():
            total, free = _number(path / "nr_hugepages"), _number(path / "free_hugepages")
            pools.append(HugePagePool(int(kilobytes) * 1024, total, free))
    return tuple(sorted(pools, key=lambda pool: pool.page_bytes))


def _governor(folder: Path, online: set[int]) -> str:
    paths = [folder / f"cpu{cpu}/cpufreq/scaling_governor" for cpu in online]
    found = {_read(path).strip() for path in paths if path.exists()}
    return "mixed" if len(found) > 1 else "".join(found)


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
