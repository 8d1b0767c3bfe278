"""The environment variables of a plan, each with its reason."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from knl.choices import Choices, find_library
from knl.cpulist import format_cpumask
from knl.placement import Placement
from knl.topology import Topology

Source = Literal["rule", "profile", "user"]
# 0.25 to 1 MiB took 0.8 of the time that oneCCL's own choice takes for 102 MB in two ranks.
_SEGMENT_BYTES = 512 << 10
# GLIBC_TUNABLES has glibc.malloc.hugetlb from here on.
_GLIBC_WITH_HUGETLB = (2, 35)


class Setting(msgspec.Struct, frozen=True):
    """The value of a variable, where it comes from, and why it is so."""

    value: str
    source: Source
    reason: str


def settings(
    node: Topology,
    placements: Sequence[Placement],
    choices: Choices,
    environment: Mapping[str, str],
    source: Source,
) -> dict[str, Setting]:
    """All variables of a plan. A variable that the user has set keeps the user's value; LD_PRELOAD
    gets ours before the user's."""
    rules: dict[str, tuple[str, str]] = {}
    rules.update(_openmp(node, placements, choices))
    rules.update(_memory(choices))
    rules.update(_oneccl(placements, choices))
    rules.update(_network(node, placements))
    rules["KNL_LAYOUT"] = (choices.layout, "layout of a recipe with train.layout = auto")
    rules["KNL_BUCKET_MB"] = (f"{choices.bucket_mb:g}", "of a recipe with comm.bucket_mb = auto")
    rules["KNL_INTEROP_THREADS"] = ("1", "a network is one chain of operators: a second pool idles")
    found: dict[str, Setting] = {}
    for name, (value, reason) in sorted(rules.items()):
        mine = environment.get(name)
        if mine is None or mine == value:
            found[name] = Setting(value, source, reason)
        else:
            found[name] = Setting(mine, "user", f"set by you; the {source} would be {value!r}")
    if preload := _preload(choices, environment):
        found["LD_PRELOAD"] = Setting(preload[0], source, preload[1])
    return found


def _openmp(
    node: Topology, placements: Sequence[Placement], choices: Choices
) -> dict[str, tuple[str, str]]:
    """For the runtime that is really loaded: libgomp ignores KMP_ variables."""
    # A cpuset may leave some ranks' cores fewer hardware threads.
    threads = min(len(placement.compute) for placement in placements)
    found = {"OMP_NUM_THREADS": (str(threads), "one thread for each compute CPU of a rank")}
    if choices.openmp == "libiomp5":
        found["KMP_AFFINITY"] = (
            "granularity=fine,compact,1,0",
            "one thread stays on one CPU of the rank's mask",
        )
        found["KMP_BLOCKTIME"] = (
            str(choices.blocktime_ms),
            "ms that an idle thread spins before it sleeps",
        )
        if node.threads_per_core > 1:
            found["KMP_HW_SUBSET"] = (
                f"{choices.threads_per_core}t",
                f"of the {node.threads_per_core} hardware threads a core",
            )
        return found
    found["OMP_PLACES"] = ("threads", "libgomp's places are the CPUs of the rank's mask")
    found["OMP_PROC_BIND"] = ("close", "one thread stays on one CPU")
    found["OMP_WAIT_POLICY"] = (
        ("passive", "idle threads sleep at once")
        if choices.blocktime_ms == 0
        else ("active", "idle threads spin: each has a CPU of its own")
    )
    return found


def _memory(choices: Choices) -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    if choices.allocator == "glibc-heap":
        keep = "glibc's malloc keeps its pages: mapped anew, a step's buffers fault page by page"
        found["MALLOC_MMAP_MAX_"] = ("0", keep)
        found["MALLOC_TRIM_THRESHOLD_"] = ("-1", keep)  # never
        found["MALLOC_TOP_PAD_"] = (str(64 << 20), "the heap grows by 64 MiB at a time")
    if choices.allocator == "jemalloc":
        huge = ",thp:always" if choices.hugepages else ""
        found["MALLOC_CONF"] = (
            f"oversize_threshold:1,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1{huge}",
            "jemalloc keeps its pages instead of giving them back between steps",
        )
    if choices.hugepages:
        why = "fewer TLB misses: activations lie in pages of 2 MiB"
        found["THP_MEM_ALLOC_ENABLE"] = ("1", f"{why} (read by torch 2)")
        if choices.allocator.startswith("glibc") and _glibc() >= _GLIBC_WITH_HUGETLB:
            found["GLIBC_TUNABLES"] = ("glibc.malloc.hugetlb=1", why)
    return found


def _oneccl(placements: Sequence[Placement], choices: Choices) -> dict[str, tuple[str, str]]:
    workers = choices.comm_workers or len(placements[0].comm)
    found: dict[str, tuple[str, str]] = {}
    if choices.allreduce:
        found["CCL_ALLREDUCE"] = (choices.allreduce, "fastest algorithm measured within a node")
    if "nreduce" in choices.allreduce:
        found["CCL_ALLREDUCE_NREDUCE_SEGMENT_SIZE"] = (
            str(_SEGMENT_BYTES),
            "a segment is summed while it is in cache",
        )
    found["CCL_WORKER_COUNT"] = (str(max(1, workers)), "oneCCL's threads a rank")
    if not workers:
        found["CCL_WORKER_OFFLOAD"] = ("0", "no CPU to give: the rank itself moves the data")
        return found
    found["CCL_WORKER_OFFLOAD"] = ("1", "without it nothing moves while backward runs")
    cpus = [
        p.comm[n] if n < len(p.comm) else p.compute[-1] for p in placements for n in range(workers)
    ]
    found["CCL_WORKER_AFFINITY"] = (
        ",".join(map(str, cpus)),
        "the comm CPUs of all ranks of the node, in the order of local ranks",
    )
    return found


def _network(node: Topology, placements: Sequence[Placement]) -> dict[str, tuple[str, str]]:
    masks = ",".join(format_cpumask(placement.compute) for placement in placements)
    found = {"I_MPI_PIN_DOMAIN": (f"[{masks}]", "Intel MPI pins to the compute CPUs, too")}
    if any(name.startswith("hfi1") for name in node.fabrics):
        found["FI_PROVIDER"] = ("psm2", "Omni-Path (hfi1) is present")
        found["HFI_NO_CPUAFFINITY"] = ("1", "PSM2 would move the rank to a CPU of its own choice")
        found["PSM2_MQ_RNDV_HFI_WINDOW"] = ("2097152", "large messages (Intel Caffe's value)")
    elif not node.fabrics:
        found["FI_PROVIDER"] = ("tcp", "neither Omni-Path nor InfiniBand is present")
    return found


def _preload(choices: Choices, environment: Mapping[str, str]) -> tuple[str, str] | None:
    """LD_PRELOAD and its reason: the OpenMP runtime, the allocator, then what the user has."""
    wanted: list[str] = [choices.openmp] if choices.openmp == "libiomp5" else []
    wanted += [choices.allocator] if choices.allocator in ("tcmalloc", "jemalloc") else []
    paths = [path for name in wanted if (path := find_library(name, environment))]
    mine = [path for path in environment.get("LD_PRELOAD", "").split(":") if path]
    paths = [path for path in paths if path not in mine]
    if not paths:
        return None
    reason = " and ".join(wanted) + (f", before your own {':'.join(mine)}" if mine else "")
    return ":".join([*paths, *mine]), reason


def _glibc() -> tuple[int, ...]:
    version = platform.libc_ver()[1] or "0"
    return tuple(int(part) for part in version.split(".")[:2])
