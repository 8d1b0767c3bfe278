"""What can be chosen about a node, and what the rule chooses before anything was measured."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Optional

import msgspec

from knl.packages import IPEX, ONEDNN, version_of
from knl.topology import Topology

Allocator = Literal["glibc", "glibc-heap", "tcmalloc", "jemalloc"]
OpenMp = Literal["libgomp", "libiomp5"]
MemoryChoice = Literal["auto", "none"]
Layout = Literal["blocked", "contiguous", "channels_last", "ipex"]
Dtype = Literal["fp32", "bf16"]
# Algorithms that oneCCL has for memory of the host.
ALLREDUCE_ALGORITHMS = (
    "nreduce", "rabenseifner", "ring", "2d", "direct", "recursive_doubling", "double_tree",
)  # fmt: skip
_ALGORITHM = f"(?:{'|'.join(ALLREDUCE_ALGORITHMS)})"
_BY_SIZE = rf"{_ALGORITHM}:\d+-(?:\d+|max)"
# CCL_ALLREDUCE: one algorithm, or one for each range of bytes (nreduce:0-65536;ring:65537-max); ""
# leaves the choice to oneCCL.
Allreduce = Annotated[
    str, msgspec.Meta(pattern=rf"^(?:|{_ALGORITHM}|{_BY_SIZE}(?:;{_BY_SIZE})*)$(?!\n)")
]

# File names, best first; a bare name is looked up in the folders of find_library.
_LIBRARIES = {
    "tcmalloc": ("libtcmalloc.so.4", "libtcmalloc_minimal.so.4", "libtcmalloc.so"),
    "jemalloc": ("libjemalloc.so.2", "libjemalloc.so"),
    "libiomp5": ("libiomp5.so",),
}
_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/lib", "/usr/lib")


class Choices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to run a node; `knl tune` searches over these.

    `reserve_cores`: of the node, kept from compute; `comm_workers`: of oneCCL, a rank; None for the
    rule's (knl.placement). `blocktime_ms`: how long an idle OpenMP thread spins. `hugepages`:
    ask for transparent huge pages. `memory`: policy for MCDRAM or HBM in flat mode. `bucket_mb`: of
    gradients that are summed together, in MiB.
    """

    ranks_per_node: int
    threads_per_core: int = 1
    reserve_cores: Optional[int] = None
    comm_workers: Optional[int] = None
    allreduce: Allreduce = ""
    bucket_mb: Annotated[float, msgspec.Meta(gt=0, le=1024)] = 16.0
    openmp: OpenMp = "libgomp"
    blocktime_ms: int = 200
    allocator: Allocator = "glibc"
    hugepages: bool = False
    memory: MemoryChoice = "auto"
    layout: Layout = "contiguous"
    dtype: Dtype = "fp32"
    compile: bool = False


def rule_choices(node: Topology, ranks: int, environment: Mapping[str, str]) -> Choices:
    """What the rule picks from what is installed here.

    An allocator that keeps its pages is worth a tenth at least. libiomp5 is Intel's own, made for
    KNL's many threads. nreduce took 0.7 of the time of oneCCL's own choice for 102 MB in two ranks
    of a node.
    """
    iomp = node.is_intel and bool(find_library("libiomp5", environment))
    return Choices(
        ranks_per_node=ranks,
        allreduce="nreduce" if ranks > 1 else "",
        openmp="libiomp5" if iomp else "libgomp",
        blocktime_ms=1 if iomp else 200,
        allocator=allocators(environment)[-1],
        layout=rule_layout(node),
    )


def rule_layout(node: Topology) -> Layout:
    """The layout that trains fastest where nothing was measured: oneDNN's blocked one.

    Where our oneDNN is missing, or has no kernels for want of AVX2, the next best: on a KNL torch's
    own, whose convolutions reorder to blocked and back, as channels-last ones run as AVX2 there;
    elsewhere `ipex.optimize`, worth 1.6 on torch 1.11, or channels_last, worth 1.7 on torch 2."""
    if version_of(ONEDNN) and ("avx2" in node.isa or not node.isa):
        return "blocked"
    if node.is_knl:
        return "contiguous"
    return "ipex" if has_ipex() else "channels_last"


def layouts(node: Topology) -> list[Layout]:
    """Those worth measuring here, most promising first. On a KNL channels-last ones run as AVX2."""
    found: list[Layout] = ["blocked"] if version_of(ONEDNN) else []
    if not node.is_knl:
        found += ["channels_last", *(["ipex"] if has_ipex() else [])]  # type: ignore[list-item]
    return [*found, "contiguous"]


def layout_problem(node: Topology, layout: str) -> str:
    """Why a layout wastes this node; "" where it does not."""
    if not node.is_knl or layout not in ("channels_last", "ipex"):
        return ""
    return (
        f"layout = {layout!r} runs convolutions as AVX2 on a {node.uarch}, about half the machine: "
        "oneDNN has AVX-512 kernels for the blocked layout alone there"
    )


def allocators(environment: Mapping[str, str]) -> list[Allocator]:
    """Those that can be used here; the last is the one that the rule takes."""
    found: list[Allocator] = ["glibc", "glibc-heap"]
    if find_library("jemalloc", environment):
        found.append("jemalloc")
    if find_library("tcmalloc", environment):
        found.append("tcmalloc")
    return found


def has_ipex() -> bool:
    """Whether Intel's extension for PyTorch is installed."""
    return bool(version_of(IPEX))


def find_library(name: str, environment: Mapping[str, str]) -> str:
    """Path of tcmalloc, jemalloc or libiomp5; "" where there is none."""
    loader = filter(None, environment.get("LD_LIBRARY_PATH", "").split(":"))
    for folder in [f"{sys.prefix}/lib", *loader, *_FOLDERS]:
        for file in _LIBRARIES[name]:
            if (path := Path(folder) / file).exists():
                return str(path)
    return ""
