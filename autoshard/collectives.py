"""Prices of collectives: how the ranks of a mesh axis lie on the links, and the seconds of each algorithm there.

Seconds are `fixed + per_byte * B`, B the bytes of the value that the n ranks of the axis hold together. With start = the
hardware's collective latency, `hops_l` and `r_l` the hops and the bytes/s on link l (0 the innermost):

    all-gather, reduce-scatter   ring  start + sum_l hops_l latency_l            + (n-1)/n B / min_l(k_l r_l)
                                 tree  start + sum_l log_hops_l latency_l        + 2 (n-1)/n B / min_l(k_l r_l)
    all-reduce                   a reduce-scatter and an all-gather with one start
    all-to-all                   pairwise: start + sum_l peers_l latency_l       + max_l (n - q_l)/n B/n / r_l
    rotate                       start + latency + B/n / r of the slowest hop

A ring visits the ranks in order, so that of its n-1 hops m-1 leave a node when the ranks lie in m nodes. Where k ranks of one
group share a node, NCCL runs k rings, each of which leaves the node by the port of another rank: k_l r_l bytes/s cross.
Assumed: a link's rate is that of each device while all send (all groups of an axis communicate at once, each by the ports
of its own ranks, none by another's); the worst group and the worst node count. The tree takes the ranks of a node in a chain
and nodes by logarithm; it moves data at half the ring's rate. There is none where it would take as many hops.

Source: Thakur, Rabenseifner, Gropp: Optimization of Collective Communication Operations in MPICH (2005), sections 4.1 to
4.5 (ring and logarithmic all-gather and reduce-scatter, all-reduce as both, pairwise all-to-all); NCCL's
src/graph/tuning.cc (steps inside and between nodes of ring and tree, and the tree's rate: its correction factor falls to
0.5 at medium sizes).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autoshard.conversions import COMMUNICATES, WIRE
from autoshard.errors import HardwareError
from autoshard.hardware import Hardware

TREE_RATE = 0.5  # of the ring's
Terms = tuple[float, float]  # fixed seconds, and seconds per byte that the ranks of the axis hold together


@dataclass(frozen=True)
class AxisLinks:
    """How the ranks of one axis use the links. Rates in bytes/s, latencies in s.

    n: ranks. ring_latency_s, tree_latency_s: hops of one all-gather. peers_latency_s: hops of an all-to-all. ring_bytes_per_s:
    slowest link of a ring. exchange_s_per_byte: of the bytes that a rank holds. hop_latency_s, hop_bytes_per_s: the slowest hop.
    """

    n: int
    ring_latency_s: float
    tree_latency_s: float
    peers_latency_s: float
    ring_bytes_per_s: float
    exchange_s_per_byte: float
    hop_latency_s: float
    hop_bytes_per_s: float


def axis_links(hardware: Hardware, shape: tuple[int, ...], axis: int) -> AxisLinks:
    """Links of one axis of a row-major mesh (last axis innermost). Raises HardwareError for more ranks than the hardware has."""
    size = int(np.prod(shape))
    most = hardware.links[-1].devices
    if most is not None and size > most:
        raise HardwareError(f"the mesh has {size} ranks, hardware {hardware.name!r} has {most} devices")
    n = shape[axis]
    groups = np.moveaxis(np.arange(size).reshape(shape), axis, -1).reshape(-1, n)
    period = max((link.devices or 1) for link in hardware.links)
    groups = groups[np.unique(groups[:, 0] % period, return_index=True)[1]]  # the others lie on the links as one of these does
    ring, tree, peers = (np.zeros(len(groups)) for _ in range(3))
    rate, exchange = np.full(len(groups), np.inf), np.zeros(len(groups))
    hop_latency, hop_rate = np.zeros(len(groups)), np.full(len(groups), np.inf)
    inside = groups  # a number per rank of the block of the link within that it lies in
    for link in hardware.links:
        block = groups // (link.devices or size)
        many, fewer = _distinct(inside), _distinct(block)
        crosses = many > fewer  # some hop of this group is on this link
        least, most_blocks = _fewest(inside), _most_parts(inside, block)
        ring += (many - fewer) * link.latency_s
        tree += (most_blocks - 1 if link is hardware.links[0] else np.ceil(np.log2(most_blocks))) * link.latency_s
        peers += (_most(block) - least) * link.latency_s
        rate = np.where(crosses, np.minimum(rate, least * link.bytes_per_s), rate)
        exchange = np.where(crosses, np.maximum(exchange, (n - least) / n / link.bytes_per_s), exchange)
        hop_latency = np.where(crosses, np.maximum(hop_latency, link.latency_s), hop_latency)
        hop_rate = np.where(crosses, np.minimum(hop_rate, link.bytes_per_s), hop_rate)
        inside = block
    return AxisLinks(
        n,
        ring_latency_s=float(ring.max()),
        tree_latency_s=float(tree.max()),
        peers_latency_s=float(peers.max()),
        ring_bytes_per_s=float(rate.min()),
        exchange_s_per_byte=float(exchange.max()),
        hop_latency_s=float(hop_latency.max()),
        hop_bytes_per_s=float(hop_rate.min()),
    )


def collective_terms(hardware: Hardware, links: AxisLinks, name: str) -> tuple[Terms, ...]:
    """Fixed seconds and seconds per byte of every algorithm for a collective: the cheapest at a value's bytes is what runs."""
    n, start = links.n, hardware.collective_latency_s
    if n == 1 or name == "identity":
        return ((0.0, 0.0),)
    if name not in COMMUNICATES:  # a local copy
        return ((hardware.device.kernel_latency_s, 1 / hardware.device.memory_bytes_per_s),)
    if name == "all_to_all":
        return ((start + links.peers_latency_s, links.exchange_s_per_byte / n),)
    wire = WIRE[name](n)
    if name == "rotate":
        return ((start + links.hop_latency_s, wire / links.hop_bytes_per_s),)
    phases = 2 if name == "all_reduce" else 1
    ring = (start + phases * links.ring_latency_s, wire / links.ring_bytes_per_s)
    if links.tree_latency_s >= links.ring_latency_s:
        return (ring,)
    return (ring, (start + phases * links.tree_latency_s, ring[1] / TREE_RATE))


def _distinct(blocks: np.ndarray) -> np.ndarray:
    """i64[groups]: how many blocks the ranks of each group lie in (ranks are in order, so equal blocks are adjacent)."""
    return 1 + (np.diff(blocks, axis=1) != 0).sum(axis=1)


def _fewest(blocks: np.ndarray) -> np.ndarray:
    """i64[groups]: ranks in the block that has the fewest."""
    return np.array([np.unique(row, return_counts=True)[1].min() for row in blocks])


def _most(blocks: np.ndarray) -> np.ndarray:
    return np.array([np.unique(row, return_counts=True)[1].max() for row in blocks])


def _most_parts(inside: np.ndarray, block: np.ndarray) -> np.ndarray:
    """i64[groups]: most inner blocks that one block holds of a group."""
    return np.array([max(len(np.unique(i[b == each])) for each in np.unique(b)) for i, b in zip(inside, block, strict=True)])
