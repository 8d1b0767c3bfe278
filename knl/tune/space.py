"""What the search varies on a node, and in which order it is worth trying."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from knl.choices import Choices, allocators, find_library, layouts
from knl.config import BF16_ISA
from knl.errors import InputError
from knl.packages import version_of
from knl.placement import domains, place
from knl.topology import Topology

# Below so many cores a reserved one costs more than it can bring.
_CORES_TO_RESERVE_FROM = 16
_MOST_THREADS_PER_CORE = 2

Space = dict[str, tuple[Any, ...]]


def space(
    node: Topology, images: int, environment: Mapping[str, str], *, with_compile: bool
) -> Space:
    """Field of Choices -> its values, in the order of what they are expected to bring. `images`: of
    a step on the node, which the ranks share evenly."""
    cores = len(node.allowed_cores)
    ranks = {n for n in (1, 2, 4, domains(node)) if n <= cores and images % n == 0}
    has_iomp = bool(find_library("libiomp5", environment))
    found: Space = {
        "layout": tuple(layouts(node)),
        "allocator": tuple(allocators(environment)),
        "ranks_per_node": tuple(sorted(ranks)),
        "hugepages": (False, True) if node.hugepages == "madvise" else (False,),
        "openmp": ("libgomp", "libiomp5") if has_iomp else ("libgomp",),
        "blocktime_ms": (200, 1, 0),
        "threads_per_core": tuple(range(1, min(node.threads_per_core, _MOST_THREADS_PER_CORE) + 1)),
        "reserve_cores": (None, 0, 2, 4) if cores >= _CORES_TO_RESERVE_FROM else (None,),
        "comm_workers": (None, 0, 1, 2, 3, 4) if cores >= _CORES_TO_RESERVE_FROM else (None, 1),
        "bucket_mb": (16.0, 4.0, 64.0) if max(ranks, default=1) > 1 else (16.0,),
        "memory": ("auto", "none") if node.memory_mode in ("flat", "hybrid") else ("auto",),
        "dtype": ("fp32", "bf16") if _has_bf16(node) else ("fp32",),
        "compile": (False, True) if with_compile else (False,),
    }
    return {name: values for name, values in found.items() if len(values) > 1}


def _has_bf16(node: Topology) -> bool:
    """Whether bfloat16 is fast; torch 1 has no convolutions for it but slow ones."""
    return bool(set(BF16_ISA) & set(node.isa)) and not version_of("torch").startswith("1.")


def fits(node: Topology, choices: Choices) -> bool:
    """Whether the node has the cores and threads for them."""
    try:
        place(
            node,
            choices.ranks_per_node,
            choices.threads_per_core,
            choices.reserve_cores,
            choices.comm_workers,
        )
    except InputError:
        return False
    return True


def canonical(choices: Choices) -> Choices:
    """The same, with what has no effect set to its default: not to be measured twice."""
    same: dict[str, Any] = {}
    if choices.ranks_per_node == 1:  # nobody to exchange gradients with
        same.update(comm_workers=None, allreduce="", bucket_mb=16.0)
    if choices.openmp == "libgomp" and choices.blocktime_ms != 0:  # it knows "passive" alone
        same.update(blocktime_ms=200)
    limited = choices.layout in ("blocked", "ipex")  # they are float32, and not compiled
    if limited and (choices.dtype == "bf16" or choices.compile):
        same.update(layout="channels_last")
    return msgspec.structs.replace(choices, **same)


def neighbours(space: Space, best: Choices) -> Iterator[Choices]:
    """Choices that differ from the best in one field, the most promising field first."""
    for name, values in space.items():
        for value in values:
            if value != getattr(best, name):
                yield canonical(msgspec.structs.replace(best, **{name: value}))
