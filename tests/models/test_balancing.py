"""Balancing terms against those computed by hand and transformers' own, and their sums over batches."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from minillm.models.balancing import TERMS, Routing, Tally, importance
from minillm.models.loss import IGNORE, auxiliary_losses, counted_tokens
from tests.support.parity import assert_same
from tests.support.sparse_block import SIGMOID, E, K, block_of, config_of, inputs

ALL_TERMS = {term.field: 0.1 for term in TERMS.values()}


def routed(block, x, counted) -> Routing:
    return block(x, counted)[1]


def by_hand(block, x, counted) -> dict[str, list[float]]:
    """Every term of every row, in plain loops over the tokens that count."""
    terms = {name: [] for name in TERMS}
    for row in range(x.shape[0]):
        choice = block.gate(x[row])
        tokens = [t for t in range(x.shape[1]) if counted[row, t]]
        if not tokens:
            for values in terms.values():
                values.append(0.0)
            continue
        n, p = len(tokens), choice.probabilities
        used = [sum(int(i in choice.indices[t]) for t in tokens) / n for i in range(E)]
        mean = [sum(p[t, i].item() for t in tokens) / n for i in range(E)]
        even = sum(f * m for f, m in zip(used, mean))
        terms["load_balancing"].append(E * even)
        terms["importance"].append(math.log(E) + sum(m * math.log(m) for m in mean))
        z = [math.log(sum(math.exp(v) for v in choice.logits[t].tolist())) for t in tokens]
        terms["router_z"].append(sum(v * v for v in z) / n)
        terms["sequence_balancing"].append(E / K * even)
    return terms


COUNTED = torch.ones(4, 9, dtype=torch.bool)
COUNTED[1, 5:] = COUNTED[2] = COUNTED[3, :3] = False


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_terms_equal_those_computed_by_hand(router):
    sequence = {"router_sequence_loss_coef": 0.1 if router == "sigmoid" else 0.0}
    block, x = block_of(router_type=router, **{**ALL_TERMS, **sequence}).eval(), inputs(4)
    routing, expected = routed(block, x, COUNTED), by_hand(block, x, COUNTED)
    assert routing.terms.keys() == {name for name in TERMS if name != "sequence_balancing" or router == "sigmoid"}
    for name, values in routing.terms.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, torch.tensor(expected[name]), rtol=1e-5, atol=1e-6)
    indices = block.gate(x.flatten(0, 1)).indices.view(4, 9, K)
    assert torch.equal(routing.counts, torch.bincount(indices[COUNTED].flatten(), minlength=E).float())


def test_importance_of_two_known_distributions():
    tally = Tally(None, torch.tensor([[0.25] * 4, [0.5, 0.25, 0.25, 0.0]]), None, 2)
    # log 4 - (1/2 log 2 + 2/4 log 4) = 2 log 2 - 1.5 log 2
    torch.testing.assert_close(importance(tally), torch.tensor([0.0, 0.5 * math.log(2)]))


def test_load_balancing_equals_that_of_transformers():
    block, x = block_of(router_aux_loss_coef=0.1), inputs(1)
    logits = x[0] @ block.gate.weight.t()
    ours = routed(block, x, torch.ones(1, 9, dtype=torch.bool)).terms["load_balancing"]
    torch.testing.assert_close(ours[0], load_balancing_loss_func((logits,), E, K))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]])
    ours = routed(block, x, mask.bool()).terms["load_balancing"]
    torch.testing.assert_close(ours[0], load_balancing_loss_func((logits,), E, K, mask))


def test_no_term_without_its_coefficient_and_no_routing_without_counted():
    block = block_of(router_z_loss_coef=0.1)
    assert routed(block, inputs(), torch.ones(2, 9, dtype=torch.bool)).terms.keys() == {"router_z"}
    assert block(inputs())[1] is None


def test_terms_of_half_batches_add_up_to_those_of_the_whole():
    config = config_of(**SIGMOID, **ALL_TERMS)
    x, targets = inputs(4), torch.zeros(4, 9, dtype=torch.long)
    targets[0, 7:] = targets[1, ::2] = targets[2] = IGNORE
    items = (targets != IGNORE).sum()

    def losses(*parts):
        block = block_of(**SIGMOID, **ALL_TERMS)
        found, total = [], 0.0
        for part in parts:
            routing = routed(block, x[part], counted_tokens(targets[part]))
            terms, weighted = auxiliary_losses(config, [routing, routing], targets[part], items)
            found.append(terms)
            total = total + weighted
        total.backward()
        return {name: sum(t[name] for t in found).detach() for name in TERMS} | {"gradient": block.gate.weight.grad}

    whole, halves = losses(slice(0, 4)), losses(slice(0, 2), slice(2, 4))
    assert_same(halves, whole, 1e-6)
    assert all(value.abs().max() > 0 for value in whole.values())


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_padding_leaves_no_trace_in_terms_or_gradients(router):
    sequence = {"router_sequence_loss_coef": 0.1 if router == "sigmoid" else 0.0}
    changes = {"router_type": router, **ALL_TERMS, **sequence}
    gradients = []
    for filler in (0.0, 7.0):
        block, x = block_of(**changes).eval(), inputs(4)
        x = x.masked_fill(~COUNTED[..., None], filler).requires_grad_()
        sum(term.sum() for term in routed(block, x, COUNTED).terms.values()).backward()
        assert x.grad[COUNTED].abs().sum() > 0 and not x.grad[~COUNTED].any()  # NaN would be true here
        gradients.append({n: p.grad for n, p in block.gate.named_parameters() if p.grad is not None})
    assert_same(*gradients, 1e-6)


def test_bias_updates_even_out_the_load():
    block, x = block_of(router_type="sigmoid", router_bias_update_speed=0.02), inputs(8, 32)
    counted = torch.ones(8, 32, dtype=torch.bool)
    loads = []
    for _ in range(60):
        loads.append(routed(block, x, counted).counts)
        block.gate.update_bias(loads[-1])
    assert loads[-1].std() < 0.2 * loads[0].std()
