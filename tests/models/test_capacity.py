"""Expert capacity against DeepSpeed's own top-k gate, by hand, and where several routes are equally likely."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.sharded_moe import topkgating

from minillm.models.capacity import Capacity, limit_capacity
from minillm.models.routers import Choice
from tests.support.sparse_block import SIGMOID, D, E, block_of


def tokens(number: int = 50) -> torch.Tensor:
    """Tokens that want some experts far more than others."""
    x = torch.randn(number, D, generator=torch.Generator().manual_seed(6))
    return x + 2 * torch.randn(D, generator=torch.Generator().manual_seed(7))


def gradient(logits: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((weights * torch.linspace(-1, 1, weights.numel()).view_as(weights)).sum(), logits)[0]


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("factor, minimum", [(1.0, 1), (0.5, 1), (0.25, 9), (1.25, 100)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_it_equals_the_top_k_gate_of_deepspeed(top_k, factor, minimum, scale):
    gate = block_of(num_experts_per_tok=top_k, routed_scaling_factor=scale).gate
    free = gate(tokens())
    choice = limit_capacity(free, Capacity(factor, minimum))
    logits = free.logits.detach().clone().requires_grad_()
    _, capacity, _, indices, _, weights, counts = topkgating(
        logits, top_k, factor, minimum, drop_tokens=True, drop_policy="probs", sparse_routes=True
    )
    assert capacity == Capacity(factor, minimum).of(50, E, top_k)
    assert torch.equal(choice.indices.masked_fill(~choice.kept, -1), indices.t().long())
    assert (choice.kept.sum() < choice.kept.numel()) == (minimum < 100)
    torch.testing.assert_close(choice.weights, weights.t() * scale, rtol=1e-6, atol=1e-7)
    ours, theirs = gradient(free.logits, choice.weights), gradient(logits, weights.t() * scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.bincount(choice.indices.flatten(), minlength=E), counts)  # what was chosen stays known


def test_weights_that_do_not_add_up_to_a_total_are_left_alone():
    gate = block_of(num_experts_per_tok=2, norm_topk_prob=False).gate
    free = gate(tokens())
    choice = limit_capacity(free, Capacity(0.5, 1))
    assert not choice.kept.all()
    assert torch.equal(choice.weights, free.weights.masked_fill(~choice.kept, 0))


@pytest.mark.parametrize("changes", [SIGMOID, {"router_type": "noisy_topk"}], ids=["sigmoid", "noisy_topk"])
def test_every_router_that_normalises_does_so_again(changes):
    free = block_of(**changes).gate(tokens())
    choice = limit_capacity(free, Capacity(0.5, 1))
    total = changes.get("routed_scaling_factor", 1.0)
    left = choice.kept.any(-1)
    assert left.any() and not left.all()
    torch.testing.assert_close(choice.weights.sum(-1), left * total)
    torch.testing.assert_close(free.weights.sum(-1), torch.full((50,), total))
    among = free.weights * choice.kept
    torch.testing.assert_close(choice.weights[left], (among / among.sum(-1, keepdim=True) * total)[left])
    for name in ("logits", "probabilities", "indices"):
        assert torch.equal(getattr(choice, name), getattr(free, name))


def test_of_equally_likely_routes_the_earlier_tokens_are_kept():
    indices = torch.tensor([[0, 1], [0, 2], [2, 0], [0, 1]])
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.1, 0.4], [0.5, 0.1, 0.4], [0.6, 0.3, 0.1]])
    weights = probabilities.gather(1, indices)
    choice = limit_capacity(Choice(probabilities.log(), probabilities, weights, indices), Capacity(0.75, 1))
    assert Capacity(0.75, 1).of(4, 3, 2) == 2
    # expert 0: token 3 (0.6), then token 0, the first of three at 0.5; experts 1 and 2 have two routes each
    assert choice.kept.tolist() == [[True, True], [False, True], [True, False], [True, True]]


def test_a_token_that_loses_all_its_experts_passes_finite_gradients():
    logits = torch.tensor([[9.0, 0.0], [8.0, 0.0], [7.0, 0.0]], requires_grad=True)
    probabilities = logits.softmax(-1)
    weights, indices = probabilities.topk(1, dim=-1)
    choice = limit_capacity(Choice(logits, probabilities, weights / weights, indices, total=1.0), Capacity(0.1, 1))
    assert choice.weights.flatten().tolist() == [1.0, 0.0, 0.0]
    assert gradient(logits, choice.weights).isfinite().all()


@pytest.mark.parametrize(
    "tokens, experts, top_k, capacity, expected",
    [(1024, 8, 1, Capacity(1.0, 4), 128), (1024, 8, 2, Capacity(1.25, 4), 320), (10, 8, 1, Capacity(1.0, 1), 2),
     (10, 8, 1, Capacity(1.0, 4), 4)],
)  # fmt: skip
def test_how_many_routes_an_expert_takes(tokens, experts, top_k, capacity, expected):
    assert capacity.of(tokens, experts, top_k) == expected


def test_padding_takes_no_place_from_real_tokens():
    """The real tokens keep what they keep where they are alone with that capacity, wherever padding stands."""
    torch.manual_seed(0)
    experts, real = 4, 12
    weights, indices = torch.rand(2 * real, 2), torch.stack([torch.randperm(experts)[:2] for _ in range(2 * real)])
    counted = torch.arange(2 * real) % 2 == 0
    indices[~counted] = torch.tensor([0, 1])  # one padding token, over and over
    logits = torch.zeros(2 * real, experts).scatter(1, indices, weights)
    logits[~counted, 0] = 9.0  # and sure of its experts
    probabilities = logits.softmax(-1)
    choice = Choice(logits, probabilities, probabilities.gather(1, indices), indices)
    capacity = Capacity(0.5, 1)  # 6 places of 24 tokens, of which the 12 real ones want up to that
    kept = limit_capacity(choice, capacity, counted).kept[counted]
    alone = Choice(*(tensor[counted] for tensor in choice[:4]))
    assert torch.equal(kept, limit_capacity(alone, Capacity(1.0, 1)).kept)
    assert not torch.equal(kept, limit_capacity(choice, capacity).kept[counted])  # without the mask they lose places
