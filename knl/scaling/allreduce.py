"""Seconds of one allreduce on a fat tree, by algorithm: the usual model of latency and bandwidth
(Hockney 1994), with what a node, a rank and the links up of a leaf switch can carry.

Sums themselves are taken to cost nothing, messages of all nodes to start together. Nodes are filled
leaf by leaf, ranks node by node.
"""

from __future__ import annotations

import math
from functools import lru_cache

from knl.site import Network

# Of a node's memory, for sums between its ranks: STREAM on a Xeon Phi 7250's DDR4 (TACC: 80-90).
MEMORY_GB_S = 80.0
ALGORITHMS = ("ring", "halving-doubling", "double-tree", "hierarchical")


def seconds(algorithm: str, size: float, nodes: int, ranks_per_node: int, net: Network) -> float:
    """Of a sum of `size` bytes over all ranks; `algorithm`: one of ALGORITHMS, or "best".
    Raises KeyError for another."""
    if nodes * ranks_per_node == 1 or size == 0:
        return 0.0
    if algorithm == "best":
        return best(size, nodes, ranks_per_node, net)[1]
    if nodes == 1:
        return _on_node(size, ranks_per_node, net)
    return _TIMES[algorithm](size, nodes, ranks_per_node, net)


def best(size: float, nodes: int, ranks_per_node: int, net: Network) -> tuple[str, float]:
    """The fastest algorithm for this size, and its seconds."""
    times = {name: seconds(name, size, nodes, ranks_per_node, net) for name in ALGORITHMS}
    name = min(times, key=lambda each: times[each])
    return name, times[name]


def ring(size: float, nodes: int, ranks_per_node: int, net: Network) -> float:
    """Reduce-scatter and allgather around a ring (Patarasuk, Yuan 2009): 2 (p - 1) steps of
    1/p of the bytes. Between two nodes goes one rank's stream, over a leaf's edge one node's."""
    ranks = nodes * ranks_per_node
    return 2 * (ranks - 1) * (_latency(net) + size / ranks / _stream(1, net))


def halving_doubling(size: float, nodes: int, ranks_per_node: int, net: Network) -> float:
    """Recursive halving, then doubling (Rabenseifner; Thakur et al. 2005): half of the bytes with
    the neighbour, a quarter with the next but one, and so on; where the nodes are no power of two,
    those beyond it first give their bytes to a neighbour and get the sums back in the end."""
    bandwidth = _stream(ranks_per_node, net)
    power = 1 << (nodes.bit_length() - 1)
    time = _on_node(size, ranks_per_node, net)
    if power != nodes:
        time += 2 * (_latency(net) + size / bandwidth)
    for bit in range(power.bit_length() - 1):
        crowd = _crowding(nodes, bit, net)
        time += 2 * (_latency(net) + size / 2 ** (bit + 1) / _shared(bandwidth, crowd, net))
    return time


def double_tree(size: float, nodes: int, ranks_per_node: int, net: Network) -> float:
    """Two binary trees, half of the bytes each, pipelined in the best number of pieces (Sanders,
    Speck, Traeff 2009): up and down, each node sends all bytes twice. Few edges leave a leaf."""
    depth = 2 * math.ceil(math.log2(nodes))
    wire = 2 * size / _stream(1, net)
    pieces = (math.sqrt(depth * _latency(net)) + math.sqrt(wire)) ** 2
    return _on_node(size, ranks_per_node, net) + pieces


def hierarchical(size: float, nodes: int, ranks_per_node: int, net: Network) -> float:
    """Sums within each node, scattered around a ring within each leaf, then between leaves by each
    node's share at once over the links up, and back. The fullest leaf sets the pace."""
    bandwidth = _stream(ranks_per_node, net)
    within = min(nodes, net.leaf_nodes)
    leaves = math.ceil(nodes / net.leaf_nodes)
    time = _on_node(size, ranks_per_node, net)
    time += 2 * (within - 1) * (_latency(net) + size / within / bandwidth)
    if leaves > 1:
        up = _shared(bandwidth, within / net.leaf_uplinks, net)
        rings = 2 * (leaves - 1) * (_latency(net) + size / within / leaves / up)
        hops = 2 * math.ceil(math.log2(leaves)) * _latency(net)
        # Halving and doubling has fewer messages; both leave the leaf with all they carry.
        halved = hops + 2 * (1 - 1 / leaves) * size / within / up
        time += halved if leaves & (leaves - 1) == 0 else rings
    return time


def _on_node(size: float, ranks: int, net: Network) -> float:
    """Sums between the ranks of a node in shared memory: every rank's bytes are read once, and each
    rank writes the sums of all and its own share."""
    return 0.0 if ranks == 1 else _latency(net) + (3 * ranks - 1) * size / (MEMORY_GB_S * 1e9)


def _latency(net: Network) -> float:
    return net.latency_us * 1e-6


def _stream(ranks: int, net: Network) -> float:
    """Bytes a second that so many ranks of a node can send."""
    return min(net.node_gb_s, ranks * net.rank_gb_s) * 1e9


def _shared(bandwidth: float, crowd: float, net: Network) -> float:
    """What a node gets where `crowd` of them share a link up, which carries what a node does."""
    return min(bandwidth, net.node_gb_s * 1e9 / max(1.0, crowd))


@lru_cache(maxsize=4096)
def _crowding(nodes: int, bit: int, net: Network) -> float:
    """Streams on the fullest link up while each node exchanges with the one 2^bit away. A stream
    keeps to one link, as static routes do, so that 28 streams on 20 links put two on some."""
    power = 1 << (nodes.bit_length() - 1)
    # Of the first 2 x (nodes - power) nodes, every second one is left out.
    rest = nodes - power
    place = [2 * n + 1 if n < rest else n + rest for n in range(power)]
    out: dict[int, int] = {}
    for number in range(power):
        leaf = place[number] // net.leaf_nodes
        if place[number ^ (1 << bit)] // net.leaf_nodes != leaf:
            out[leaf] = out.get(leaf, 0) + 1
    return math.ceil(max(out.values(), default=0) / net.leaf_uplinks)


_TIMES = {
    "ring": ring,
    "halving-doubling": halving_doubling,
    "double-tree": double_tree,
    "hierarchical": hierarchical,
}
