"""From the speed of one node and the network to steps, hours and costs of any number of nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import structs

from knl.scaling import allreduce
from knl.scaling.known import Known
from knl.scaling.overlap import exposed
from knl.scaling.stragglers import expected_excess
from knl.site import Network

Scaling = Literal["weak", "strong"]
# Forward is a third of a training step's operations (knl.scaling.layers).
_FORWARD = 1 / 3


@dataclass(frozen=True)
class Sync:
    """How sums of gradients go. `latency`, `bandwidth`: times what the network has; `contention`:
    what each doubling of the nodes adds, as a share; `slowdown`: by what share all the rest of a
    step is longer where there are sums, which take cores and memory from it; `overlap`: behind
    backward, or all after it; `algorithm`: of knl.scaling.allreduce, or the best for each size."""

    latency: float = 1.0
    bandwidth: float = 1.0
    contention: float = 0.0
    slowdown: float = 0.0
    overlap: bool = True
    algorithm: str = "best"

    def seconds(self, size: int, nodes: int, ranks_per_node: int, net: Network) -> float:
        """Of one sum of `size` bytes."""
        scaled = scaled_network(net, self.latency, self.bandwidth)
        time = allreduce.seconds(self.algorithm, size, nodes, ranks_per_node, scaled)
        return time * (1.0 + self.contention * math.log2(nodes))


@dataclass(frozen=True)
class Step:
    """Of one number of nodes, in seconds. `node_images`: of the busiest node; `allreduce_s`: of all
    buckets, one after another, alone; `exposed_s`: of them, what goes on after backward."""

    nodes: int
    global_batch: int
    node_images: int
    compute_s: float
    fixed_s: float
    allreduce_s: float
    exposed_s: float
    straggler_s: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.fixed_s + self.exposed_s + self.straggler_s

    @property
    def images_per_s(self) -> float:
        return self.global_batch / self.step_s


@dataclass(frozen=True)
class Setting:
    """The network, the ranks of a node, and whether the global batch grows with the nodes.
    `jitter`: times the stragglers that the sample has."""

    network: Network
    ranks_per_node: int = 1
    scaling: Scaling = "weak"
    jitter: float = 1.0


def scaled_network(net: Network, latency: float, bandwidth: float) -> Network:
    """The same tree with other times and speeds."""
    return structs.replace(
        net,
        latency_us=net.latency_us * latency,
        node_gb_s=net.node_gb_s * bandwidth,
        rank_gb_s=net.rank_gb_s * bandwidth,
    )


def batches(known: Known, nodes: int, scaling: Scaling) -> tuple[int, int, int]:
    """The global batch, the images of the busiest node, and those of its last lane.

    Weak scaling gives each node a lane, up to the recipe's; from there on, as in strong scaling
    beyond one lane a node, lanes become smaller so that the global batch stays. Made-up pictures,
    which are there to time steps, have as many lanes as there are nodes.
    """
    lanes, lane_batch = known.recipe.train.lanes, known.recipe.train.lane_batch
    if nodes > lanes and not (scaling == "weak" and known.recipe.data.name == "synthetic"):
        last = math.ceil(lanes * lane_batch / nodes)
        return lanes * lane_batch, last, last
    if scaling == "weak":
        return nodes * lane_batch, lane_batch, lane_batch
    return lanes * lane_batch, math.ceil(lanes / nodes) * lane_batch, lane_batch


def step_of(known: Known, setting: Setting, sync: Sync, nodes: int) -> Step:
    """The parts of a step on so many nodes."""
    batch, images, last = batches(known, nodes, setting.scaling)
    slower = 1.0 + (sync.slowdown if nodes > known.sample_nodes else 0.0)
    backward = known.backward * known.image_s * last * slower

    def seconds(size: int) -> float:
        return sync.seconds(size, nodes, setting.ranks_per_node, setting.network)

    total = sum(seconds(bucket.size) for bucket in known.buckets)
    hidden = exposed(known.buckets, backward, seconds) if sync.overlap else total
    draws = max(1.0, nodes / known.sample_nodes)
    # Times of a smaller step scatter less: by as much as the step is smaller.
    scale = setting.jitter * images / known.node_images
    return Step(
        nodes=nodes,
        global_batch=batch,
        node_images=images,
        compute_s=known.image_s * images * slower,
        fixed_s=known.fixed_s * slower,
        allreduce_s=total,
        exposed_s=hidden if total else 0.0,
        straggler_s=scale * expected_excess(known.sample, draws),
    )


def training_hours(known: Known, step: Step) -> float:
    """Of all epochs with their evaluations, which are a forward of the test set on all nodes;
    without the start, checkpoints (written behind the steps) and the queue."""
    train = known.recipe.train
    steps = max(1, round(train.epochs * max(1, known.train_images // step.global_batch)))
    every = train.eval_every or train.epochs
    evaluations = max(1, round(train.epochs / every))
    tested = math.ceil(known.test_images / step.nodes)
    return (steps * step.step_s + evaluations * tested * known.image_s * _FORWARD) / 3600.0


def bounds(setting: Setting, sync: Sync) -> tuple[tuple[Setting, Sync], tuple[Setting, Sync]]:
    """Where nothing was fitted: the fastest and the slowest that can be argued for. Fast: all of a
    node's bandwidth whatever its ranks, no stragglers. Slow: half of the bandwidth, twice the
    latency, sums only after backward, twice the stragglers."""
    net = setting.network
    full = structs.replace(net, rank_gb_s=net.node_gb_s)
    fast = (replace(setting, network=full, jitter=0.0), sync)
    slow_sync = replace(sync, latency=2 * sync.latency, bandwidth=sync.bandwidth / 2, overlap=False)
    return fast, (replace(setting, jitter=2 * setting.jitter), slow_sync)
