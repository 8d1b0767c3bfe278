"""Makes the /proc and /sys of nodes that are not here, as the kernel would show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from knl.cpulist import format_cpulist

GB = 1 << 30
KNL_FLAGS = "avx avx2 fma avx512f avx512pf avx512er avx512cd"
SKX_FLAGS = "avx avx2 fma avx512f avx512bw avx512cd avx512dq avx512vl"
KNL_7250 = "Intel(R) Xeon Phi(TM) CPU 7250 @ 1.40GHz"


@dataclass
class Tree:
    """A node. `cores`: hardware threads of each core, `tiles`, `sockets`: of each core; `nodes`:
    (numbers of its cores, bytes); `distances`: rows as in the kernel's table."""

    name: str
    family: int
    model: int
    flags: str
    cores: Sequence[Sequence[int]]
    tiles: Sequence[int]
    sockets: Sequence[int]
    nodes: Sequence[tuple[Sequence[int], int]]
    distances: Sequence[Sequence[int]] = ()
    core_ids: Sequence[int] = ()
    offline: Sequence[int] = ()
    allowed: str = ""
    masks_only: bool = False
    hwloc: str = ""
    files: dict[str, str] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        for name, text in {**self._proc(), **self._cpus(), **self._nodes(), **self.files}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return root

    def _proc(self) -> dict[str, str]:
        lines = [
            "processor\t: 0", "vendor_id\t: GenuineIntel", f"cpu family\t: {self.family}",
            f"model\t\t: {self.model}", f"model name\t: {self.name}", f"flags\t\t: {self.flags}",
        ]  # fmt: skip
        files = {"proc/cpuinfo": "\n".join(lines) + "\n\nprocessor\t: 1\nmodel\t\t: 0\n"}
        # Without it hwloc takes no x86 fields from cpuinfo.
        files["proc/hwloc-nofile-info"] = "OSName: Linux\nArchitecture: x86_64\n"
        if self.allowed:
            files["proc/self/status"] = f"Name:\tx\nCpus_allowed_list:\t{self.allowed}\n"
        if self.hwloc:
            files["var/run/hwloc/knl_memoryside_cache"] = self.hwloc
        return files

    def _cpus(self) -> dict[str, str]:
        files: dict[str, str] = {}
        for number, threads in enumerate(self.cores):
            mates = [
                c
                for n, cs in enumerate(self.cores)
                if self.tiles[n] == self.tiles[number]
                for c in cs
            ]
            socket = [
                c
                for n, cs in enumerate(self.cores)
                if self.sockets[n] == self.sockets[number]
                for c in cs
                if c not in self.offline
            ]
            for cpu in threads:
                base = f"sys/devices/system/cpu/cpu{cpu}"
                if cpu in self.offline:
                    files[f"{base}/online"] = "0\n"
                    continue
                online = [c for c in threads if c not in self.offline]
                files[f"{base}/topology/core_id"] = f"{(self.core_ids or range(999))[number]}\n"
                files[f"{base}/topology/physical_package_id"] = f"{self.sockets[number]}\n"
                files.update(self._set(f"{base}/topology/thread_siblings", "_list", online))
                files.update(self._set(f"{base}/topology/core_siblings", "_list", socket))
                files[f"{base}/cache/index2/level"] = "2\n"
                shared = [c for c in mates if c not in self.offline]
                files.update(self._set(f"{base}/cache/index2/shared_cpu_map", "list", shared))
        return files

    def _nodes(self) -> dict[str, str]:
        files: dict[str, str] = {}
        for number, (cores, size) in enumerate(self.nodes):
            base = f"sys/devices/system/node/node{number}"
            cpus = [c for n in cores for c in self.cores[n] if c not in self.offline]
            files.update(self._set(f"{base}/cpumap", "list", cpus))
            files[f"{base}/meminfo"] = f"Node {number} MemTotal:       {size // 1024} kB\n"
            if self.distances:
                files[f"{base}/distance"] = " ".join(map(str, self.distances[number])) + "\n"
        return files

    def _set(self, path: str, suffix: str, cpus: Sequence[int]) -> dict[str, str]:
        mask = f"{sum(1 << c for c in cpus):x}"
        words = [mask[max(0, end - 8) : end] for end in range(len(mask), 0, -8)][::-1]
        files = {path: ",".join(words) + "\n"}
        if not self.masks_only:
            listed = path.replace("map", "list") if suffix == "list" else path + suffix
            files[listed] = format_cpulist(tuple(cpus)) + "\n"
        return files


def knl(nodes, distances=(), *, cores=68, threads=4, model=87, name=KNL_7250, **more) -> Tree:
    """A Xeon Phi: two cores a tile; thread t of core i is CPU i + t * cores; ids with holes."""
    return Tree(
        name, 6, model, KNL_FLAGS,
        cores=[[i + t * cores for t in range(threads)] for i in range(cores)],
        tiles=[i // 2 for i in range(cores)], sockets=[0] * cores,
        nodes=nodes, distances=distances, core_ids=[i + i // 18 for i in range(cores)], **more,
    )  # fmt: skip


def clusters(cores: int, parts: int) -> list[range]:
    """Cores of each cluster in whole tiles; the first ones get the odd tiles."""
    tiles = cores // 2
    sizes = [2 * (tiles // parts + (p < tiles % parts)) for p in range(parts)]
    return [range(sum(sizes[:p]), sum(sizes[: p + 1])) for p in range(parts)]


def snc_flat(parts: int, mcdram_of: Sequence[int]) -> Tree:
    """Clusters with DDR, then MCDRAM nodes that belong to the clusters `mcdram_of`, unordered. The
    table is upside down: own DDR 10, own MCDRAM 31, another's DDR 21, another's MCDRAM 41."""
    ddr = [(cores, 96 * GB // parts) for cores in clusters(68, parts)]
    rows = []
    for n in range(2 * parts):
        owner = n if n < parts else mcdram_of[n - parts]
        row = [
            10 if n == m else 21 if n < parts else (31 if m == owner else 41) for m in range(parts)
        ]
        row += [
            10 if n == parts + k else (31 if owner == own else 41)
            for k, own in enumerate(mcdram_of)
        ]
        rows.append(row)
    return knl([*ddr, *[((), 16 * GB // parts)] * parts], rows)


def hmat(bandwidths: Sequence[int], access: str = "access0") -> dict[str, str]:
    """Files of nodes 0, 1, ... that tell their read bandwidth in MB/s; of none where it is 0."""
    return {
        f"sys/devices/system/node/node{n}/{access}/initiators/read_bandwidth": f"{value}\n"
        for n, value in enumerate(bandwidths)
        if value
    }


ALL68 = range(68)
QUADRANT_FLAT = knl([(ALL68, 96 * GB), ((), 16 * GB)], [[10, 31], [31, 10]])


def xeon(cores, sockets, nodes, *, model=85, name="Intel(R) Xeon(R) Platinum 8160", **more) -> Tree:
    numbers = range(len(cores))
    return Tree(name, 6, model, SKX_FLAGS, cores, list(numbers), sockets, nodes, **more)


def xeon_max(nodes, distances=()) -> Tree:
    """Two sockets of 56 cores."""
    cores = [[i, i + 112] for i in range(112)]
    return xeon(cores, [i // 56 for i in range(112)], nodes, model=143,
                name="Intel(R) Xeon(R) CPU Max 9480", distances=distances)  # fmt: skip


def _max_snc4_flat() -> Tree:
    quarters = [range(14 * p, 14 * p + 14) for p in range(8)]
    rows = [[10 if a == b else 13 if a % 8 == b % 8 else 23 for b in range(16)] for a in range(16)]
    return xeon_max([*[(q, 64 * GB) for q in quarters], *[((), 16 * GB)] * 8], rows)


# name: (tree, what `knl topology --json` must say of it)
TREES: dict[str, tuple[Tree, dict[str, object]]] = {
    "quadrant-cache": (
        knl([(ALL68, 96 * GB)]),
        {
            "uarch": "knl",
            "cores": 68,
            "cpus": 272,
            "tiles": 34,
            "cluster_mode": "quadrant",
            "memory_mode": "cache",
        },
    ),
    "quadrant-flat": (
        QUADRANT_FLAT,
        {"cluster_mode": "quadrant", "memory_mode": "flat", "threads_per_core": 4},
    ),
    "snc4-flat": (snc_flat(4, (2, 0, 3, 1)), {"cluster_mode": "snc4", "memory_mode": "flat"}),
    "snc4-cache": (
        knl([(c, 24 * GB) for c in clusters(68, 4)]),
        {"cluster_mode": "snc4", "memory_mode": "cache"},
    ),
    "snc2-flat": (snc_flat(2, (1, 0)), {"cluster_mode": "snc2", "memory_mode": "flat"}),
    "a2a-hybrid50": (
        knl(
            [(ALL68, 96 * GB), ((), 8 * GB)],
            [[10, 31], [31, 10]],
            hwloc="version: 2\ncluster_mode: All2All\nmemory_mode: Hybrid50\n",
        ),
        {"cluster_mode": "a2a", "memory_mode": "hybrid", "inferred": []},
    ),
    "7210": (
        knl([(range(64), 96 * GB)], cores=64, name="Intel(R) Xeon Phi(TM) CPU 7210 @ 1.30GHz"),
        {"cores": 64, "cpus": 256, "tiles": 32},
    ),
    "no-hyper-threading": (knl([(ALL68, 96 * GB)], threads=1), {"cpus": 68, "threads_per_core": 1}),
    "knm": (
        knl([(range(72), 192 * GB)], cores=72, model=133, name="Intel(R) Xeon Phi(TM) CPU 7295"),
        {"uarch": "knm", "cores": 72, "cluster_mode": "quadrant"},
    ),
    "max-snc4-flat": (
        _max_snc4_flat(),
        {"uarch": "spr", "sockets": 2, "cluster_mode": "snc4", "memory_mode": "flat"},
    ),
    "max-cache": (
        xeon_max([(range(56), 512 * GB), (range(56, 112), 512 * GB)], [[10, 21], [21, 10]]),
        {"cluster_mode": "quadrant", "memory_mode": "cache"},
    ),
    "max-hbm-only": (
        xeon_max([(range(56), 63 * GB), (range(56, 112), 63 * GB)], [[10, 21], [21, 10]]),
        {"memory_mode": "hbm-only"},
    ),
    "skx-alternating": (
        xeon(
            [[i, i + 48] for i in range(48)],
            [i % 2 for i in range(48)],
            [(range(0, 48, 2), 96 * GB), (range(1, 48, 2), 96 * GB)],
            distances=[[10, 21], [21, 10]],
        ),
        {
            "uarch": "skx",
            "sockets": 2,
            "cores": 48,
            "cpus": 96,
            "cluster_mode": "",
            "memory_mode": "",
        },
    ),
    "epyc-nps4": (
        Tree(
            "AMD EPYC 7763",
            25,
            1,
            "avx avx2 fma",
            [[i, i + 128] for i in range(128)],
            list(range(128)),
            [i // 64 for i in range(128)],
            [(range(16 * p, 16 * p + 16), 64 * GB) for p in range(8)],
        ),
        {"sockets": 2, "cores": 128, "cpus": 256, "cluster_mode": ""},
    ),
    "vm": (
        Tree("AMD EPYC", 25, 1, "avx avx2 fma", [[0], [1]], [0, 1], [0, 0], [(range(2), 24 * GB)]),
        {"sockets": 1, "cores": 2, "cpus": 2, "threads_per_core": 1},
    ),
    "half-cpuset": (
        knl([(ALL68, 96 * GB)], allowed="0-33,68-101,136-169,204-237"),
        {"cpus": 272, "allowed_cpus": [c + 68 * t for t in range(4) for c in range(34)]},
    ),
    "offline-cores": (
        knl([(ALL68, 96 * GB)], offline=[2, 70, 138, 206, 5], masks_only=True),
        {"cores": 67, "cpus": 267, "offline_cpus": [2, 5, 70, 138, 206]},
    ),
}
