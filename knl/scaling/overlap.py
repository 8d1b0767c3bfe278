"""Gradient sync behind backward: buckets as knl.comm.gradient_sync makes and starts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from knl.config import Comm
from knl.scaling.layers import Layer

# What a plan says unless it was tuned (knl.choices), where a recipe says "auto".
_BUCKET_MB = 16.0
_MIB = 1 << 20


@dataclass(frozen=True)
class Bucket:
    """`ready`: when its last gradient is there, as a share of backward, 0 to 1."""

    size: int
    ready: float


def buckets_of(layers: Sequence[Layer], comm: Comm) -> list[Bucket]:
    """From the shapes: a layer's part of backward is its part of the operations; its gradients come
    last parameter first, all at its end."""
    limit = (_BUCKET_MB if comm.bucket_mb == "auto" else comm.bucket_mb) * _MIB
    first_limit = comm.first_bucket_mb * _MIB
    total = sum(layer.flops for layer in layers)
    found: list[Bucket] = []
    size, done, ready = 0, 0.0, 0.0
    for layer in reversed(layers):
        done += layer.flops
        for tensor in reversed(layer.tensors):
            if size >= (limit if found else first_limit):
                found.append(Bucket(size, ready))
                size = 0
            size, ready = size + tensor, min(1.0, done / total)
    return [*found, Bucket(size, ready)] if size else found


def exposed(buckets: Sequence[Bucket], backward_s: float, sync: Callable[[int], float]) -> float:
    """Seconds that sums go on after backward: each bucket's begins when it is ready and the one
    before is summed. `sync`: seconds to sum so many bytes, alone."""
    end = 0.0
    for bucket in buckets:
        end = max(end, bucket.ready * backward_s) + sync(bucket.size)
    return max(0.0, end - backward_s)
