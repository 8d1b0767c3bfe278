"""Do all ranks hold the same model? Compared by checksums, told by the tensor's name."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

import torch

from knl.comm.collectives import Ranks, allreduce_numbers, waiting_for
from knl.errors import FailedError

Named = Sequence[tuple[str, torch.Tensor]]


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's memory as one dimension, without a copy, whatever its dimension order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def checksums(named: Named) -> list[int]:
    """CRC-32 of each tensor's bytes, in memory order."""
    return [zlib.crc32(memoryview(flat(tensor).numpy()).cast("B")) for _, tensor in named]


def combined(values: Iterable[int]) -> str:
    """One checksum of many, as eight hexadecimal digits."""
    return f"{zlib.crc32(repr(list(values)).encode()):08x}"


def require_same_layout(ranks: Ranks, named: Named, timeout: float) -> None:
    """Raise FailedError on every rank, naming the first tensor whose name, shape, strides or type
    differs from rank 0's. Called before the first collective on the model's own memory."""
    layouts = [
        zlib.crc32(f"{name} {tuple(t.shape)} {t.stride()} {t.dtype}".encode()) for name, t in named
    ]
    require_same(ranks, ["the number of tensors"], [len(named)], "the models", timeout)
    require_same(ranks, [name for name, _ in named], layouts, "the models", timeout)


def require_same_weights(ranks: Ranks, named: Named, when: str, timeout: float) -> str:
    """Raise FailedError on every rank, naming the ranks, and their hosts, whose bytes are not those
    of most, and the first tensor that differs. Returns the checksum of all weights."""
    values = checksums(named)
    whole = combined(values)
    if ranks.world.size == 1:
        return whole
    what = f"the weights {when}"
    every = [0.0] * ranks.world.size
    every[ranks.world.rank] = float(int(whole, 16))
    every = allreduce_numbers(ranks.collectives, every, timeout, f"checksums of {what}")
    right = _most_frequent(every)
    wrong = [rank for rank, value in enumerate(every) if value != right]
    if not wrong:
        return whole
    root = every.index(right)
    theirs = torch.tensor(values, dtype=torch.int64)
    with waiting_for(f"checksums of {what}, as rank {root} has them"):
        ranks.collectives.broadcast(theirs, root=root)
    differing = [n for n, value in enumerate(theirs.tolist()) if value != values[n]]
    firsts = [0.0] * ranks.world.size
    firsts[ranks.world.rank] = float(differing[0] + 1) if differing else 0.0
    firsts = allreduce_numbers(ranks.collectives, firsts, timeout, f"checksums of {what}, compared")
    name = named[int(min(first for first in firsts if first)) - 1][0]
    unsure = (
        " (no majority has the same, so it may be another)"
        if 2 * every.count(right) <= len(every)
        else ""
    )
    raise FailedError(
        f"{what} differ on {_with_hosts(ranks, wrong)} from rank {root}'s{unsure}, first in "
        f"{name}: memory or network of that host may be at fault; keep the job off it, then start "
        "again from the last checkpoint",
        shared=True,
    )


def _most_frequent(values: Sequence[float]) -> float:
    """The first of those that are there most often."""
    return max(values, key=values.count)


def _with_hosts(ranks: Ranks, wrong: Sequence[int]) -> str:
    hosts = ranks.hosts or ["?"] * ranks.world.size
    texts = [f"rank {rank} (host {hosts[rank]})" for rank in wrong[:8]]
    return ", ".join(texts) + (" ..." if wrong[8:] else "")


def require_same(
    ranks: Ranks, labels: Sequence[str], values: Sequence[int], what: str, timeout: float
) -> None:
    """Raise FailedError on every rank, with the first of the `labels` whose value differs from rank
    0's: "the models differ between rank 0 and rank(s) 3, first in fc.weight"."""
    if ranks.world.size == 1:
        return
    first = torch.tensor(list(values), dtype=torch.int64)
    with waiting_for(f"checksums of {what}, as rank 0 has them"):
        ranks.collectives.broadcast(first, root=0)
    differing = [i for i, value in enumerate(first.tolist()) if value != values[i]]
    # Each rank reports the number of its first differing tensor, counted from 1, in its own place.
    found = [0.0] * ranks.world.size
    found[ranks.world.rank] = float(differing[0] + 1) if differing else 0.0
    found = allreduce_numbers(ranks.collectives, found, timeout, f"checksums of {what}, compared")
    wrong = [rank for rank, number in enumerate(found) if number]
    if wrong:
        label = labels[int(min(found[rank] for rank in wrong)) - 1]
        listed = ", ".join(map(str, wrong[:8])) + (" ..." if len(wrong) > 8 else "")
        raise FailedError(
            f"{what} differ between rank 0 and rank(s) {listed}, first in {label}: "
            "check that all nodes run the same version and recipe, then restart from the last "
            "checkpoint",
            shared=True,
        )
