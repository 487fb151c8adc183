"""Times of collectives on several nodes against rings worked out by hand: 2 bytes an element, 8 cards a node."""

from __future__ import annotations

import pytest

from minillm.planning.devices import DEVICES
from minillm.planning.network import HOP_BETWEEN, HOP_INSIDE, Layout, links
from minillm.planning.states import Group, Zero, traffic
from minillm.settings.deepspeed_json import read_deepspeed_json
from tests.support.launching import ROOT

A100 = DEVICES["a100"]._replace(bus=100e9, network=20e9)
ETHERNET = DEVICES["rtx3090"]._replace(bus=10e9, network=2e9)
ELEMENTS = 8_000_000


def zero(stage: int) -> Zero:
    return Zero.of(read_deepspeed_json(ROOT / "ds_configs" / f"zero{stage}.json"))


def taken(ranks: int, device=A100, stage: int = 1, micro_steps: int = 1):
    groups = [Group((ELEMENTS,), ranks)]
    return links(groups, zero(stage), micro_steps, 0.0, 1, Layout.of(ranks, 8), device)


def test_one_node_is_one_ring():
    """An all-reduce of S bytes on 8 ranks: 2 S 7/8 over the bus and 14 hops; a gather half of both."""
    found = taken(8)
    reduced = 2 * (2 * ELEMENTS) * 7 / 8 / 100e9 + 14 * HOP_INSIDE
    assert found.reduce == (pytest.approx(reduced), 0.0)
    assert found.gather == (pytest.approx(reduced / 2), 0.0)
    alone = taken(1)
    assert alone.reduce == alone.gather == alone.exchange == (0.0, 0.0)


def test_between_nodes_a_byte_leaves_a_node_once_for_every_other_node():
    """4 nodes: S bytes of a reduce-scatter are 3/4 S out of each node, over the rails of 8 cards, in 3 hops."""
    inside, between = taken(32).reduce
    assert inside == pytest.approx(2 * (2 * ELEMENTS) * 7 / 8 / 100e9 + 14 * HOP_INSIDE)
    assert between == pytest.approx(2 * (2 * ELEMENTS) * 3 / 4 / (8 * 20e9) + 6 * HOP_BETWEEN)
    shared = taken(32, ETHERNET).reduce[1]  # one network card a node
    assert shared == pytest.approx(2 * (2 * ELEMENTS) * 3 / 4 / 2e9 + 6 * HOP_BETWEEN)


def test_latency_makes_a_thousand_ranks_cost_more_than_the_bytes():
    small = [sum(taken(ranks).reduce) for ranks in (8, 64, 512, 1024)]
    assert small == sorted(small)
    bytes_alone = 2 * (2 * ELEMENTS) * 127 / 128 / (8 * 20e9)
    assert taken(1024).reduce[1] - bytes_alone == pytest.approx(2 * 127 * HOP_BETWEEN)


def test_zero_2_reduces_and_zero_3_gathers_at_every_micro_step():
    """ZeRO-3 reduce-scatters: half of an all-reduce. Its gathers are one a micro-step where all stays live."""
    assert taken(32, stage=2, micro_steps=4).reduce == pytest.approx(tuple(4 * t for t in taken(32).reduce))
    three = taken(32, stage=3, micro_steps=4)
    assert three.reduce == pytest.approx(tuple(2 * t for t in taken(32).reduce))
    assert three.gather == pytest.approx(tuple(4 * t for t in taken(32).gather))


def test_shared_out_experts_meet_their_copies_on_other_nodes():
    """8 sets of experts on 4 nodes: each card's own go to 3 other nodes, 8 of them leave a node at once."""
    layout, group = Layout.of(32, 8), Group((ELEMENTS,), 4, routed=True)
    assert layout.spread(group) == (1, 4, 8)
    found = links([group], zero(1), 1, 0.0, 8, layout, A100)
    assert found.reduce[0] == pytest.approx(14 * HOP_INSIDE)
    assert found.reduce[1] == pytest.approx(8 * 2 * (2 * ELEMENTS) * 3 / 4 / (8 * 20e9) + 6 * HOP_BETWEEN)
    pairs = layout.spread(Group((ELEMENTS,), 16, routed=True))  # experts on 2 ranks: 4 copies in a node
    assert pairs == (4, 4, 2)
    assert layout.spread(Group((ELEMENTS,), 2, routed=True)) == (1, 2, 8)  # experts on 16 ranks: two nodes hold a set


def test_tokens_stay_in_the_node_where_a_set_of_experts_does():
    group = Group((ELEMENTS,), 4, routed=True)
    near = links([group], zero(1), 1, 7e9, 8, Layout.of(32, 8), A100).exchange
    assert near == (pytest.approx(0.07), 0.0)
    wide = links([Group((ELEMENTS,), 2, routed=True)], zero(1), 1, 15e9, 16, Layout.of(32, 8), A100).exchange
    # 15 of 16 parts leave a card: 7 stay in the node, 8 go to the other one, from 8 cards over 8 rails.
    assert wide == (pytest.approx(7e9 / 100e9), pytest.approx(8e9 / 20e9))


def test_rings_inside_and_between_move_no_less_than_one_ring_over_all_ranks():
    """2 S 31/32 leave each rank in one ring over all; in two levels 2 S 7/8, and 2 S 3/4 out of a node of 8."""
    group, layout = Group((ELEMENTS,), 32), Layout.of(32, 8)
    whole = traffic([group], zero(1), 1).reduce
    parts = [traffic([group], zero(1), 1, share=share).reduce for share in (layout.inside, layout.between)]
    assert parts[0] + parts[1] / 8 == pytest.approx(whole)
