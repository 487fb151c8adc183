"""How long collectives take inside a node and between nodes, and what a save and the data ask of a machine.

Contract: stdlib only, pure functions. Collectives are hierarchical: a reduce-scatter among the cards of a node, a ring
between the nodes in which every card moves its part, and a gather in the node (Thakur et al. 2005, "Optimization of
Collective Communication Operations in MPICH", for the rings' cost: bytes over bandwidth, and a latency for each hop).
On one node that is NCCL's ring; between nodes NCCL may do better for small messages (trees), which is not counted.

Units: bytes, seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from minillm.planning.devices import Device
from minillm.planning.states import REDUCE_BUCKET, Group, Traffic, Zero, traffic

HOP_INSIDE, HOP_BETWEEN = 5e-6, 15e-6  # seconds of latency for each step of a ring


@dataclass(frozen=True)
class Layout:
    """Ranks on nodes, in order: 0 to gpus_per_node - 1 on the first.

    Attributes:
        gpus_per_node: cards of a node that the run uses.
        nodes: how many.
    """

    world_size: int
    gpus_per_node: int

    @classmethod
    def of(cls, world_size: int, gpus_per_node: int | None) -> Layout:
        """None: all on one node."""
        return cls(world_size, min(world_size, gpus_per_node or world_size))

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.gpus_per_node)

    def spread(self, group: Group) -> tuple[int, int, int]:
        """(ranks of the group on one node, nodes it is on, groups of its kind that share a node's network).

        Shared-out experts are the same on every size-th rank, everything else on all ranks.
        """
        inside = max(1, self.gpus_per_node * group.ranks // self.world_size)
        return inside, -(-group.ranks // inside), self.gpus_per_node // inside

    def inside(self, group: Group) -> float:
        """Of a byte that is reduce-scattered: what one card sends within its node."""
        ranks, _, _ = self.spread(group)
        return (ranks - 1) / ranks

    def between(self, group: Group) -> float:
        """Of the same byte: what leaves a node, all cards together."""
        _, nodes, groups = self.spread(group)
        return groups * (nodes - 1) / nodes


@dataclass(frozen=True)
class Links:
    """Seconds of one step by kind of traffic, inside nodes and between them."""

    reduce: tuple[float, float]
    gather: tuple[float, float]
    exchange: tuple[float, float]


def links(groups: list[Group], zero: Zero, micro_steps: int, exchange: float, size: int, layout: Layout,
          device: Device) -> Links:  # fmt: skip
    """How long the collectives of one step take if nothing hides them.

    Args:
        exchange: bytes a card sends in the step for tokens to reach their experts, wherever those are.
        size: ranks that share one set of experts.
    """
    near = traffic(groups, zero, micro_steps, share=layout.inside)
    far = traffic(groups, zero, micro_steps, share=layout.between)
    network = device.node_network(layout.gpus_per_node)
    reduces, gathers = collectives(groups, zero, micro_steps, near, far)
    ranks, nodes = layout.gpus_per_node, layout.nodes
    both = 1 if zero.stage == 3 or zero.scatter else 2  # an all-reduce goes round twice
    away = max(0, size - ranks) / (size - 1) if size > 1 else 0.0  # the part of the tokens that leaves the node
    return Links(
        reduce=(
            near.reduce / device.bus + both * reduces * (ranks - 1) * HOP_INSIDE,
            far.reduce / network + both * reduces * (nodes - 1) * HOP_BETWEEN,
        ),
        gather=(
            near.gather / device.bus + gathers * (ranks - 1) * HOP_INSIDE,
            far.gather / network + gathers * (nodes - 1) * HOP_BETWEEN,
        ),
        exchange=(exchange * (1 - away) / device.bus, exchange * away * ranks / network),
    )


def collectives(groups: list[Group], zero: Zero, micro_steps: int, near: Traffic, far: Traffic) -> tuple[int, int]:
    """(reductions, gathers) of one step: one for each bucket."""
    total = sum(sum(group.sizes) for group in groups)
    bucket = REDUCE_BUCKET if zero.stage == 0 else zero.reduce_bucket
    reduces = math.ceil(total / bucket) * (micro_steps if zero.stage >= 2 else 1)
    if zero.stage == 0:
        return reduces, 0
    if zero.stage < 3:
        return reduces, math.ceil(total / bucket)
    whole = zero.low * total
    passes = max(near.gather, far.gather) / whole if whole else 0.0  # (n - 1) / n of one: rounded up below
    each = math.ceil(total / zero.prefetch) if zero.prefetch else sum(len(group.sizes) for group in groups)
    return reduces, math.ceil(passes) * each
