"""Experts against a loop over tokens, on both paths and both dtypes, and what they keep for backward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import minillm.models.linear as linear
from tests.support.parity import assert_same, outputs_and_gradients
from tests.support.sparse_block import KINDS, D, H, K, block_of, inputs, slow_experts, spread


class Applied(torch.nn.Module):
    """Experts as a function of x alone, with trainable weights for their gradients' sake."""

    def __init__(self, experts, weights, indices):
        super().__init__()
        self.experts, self.weights, self.indices = experts, torch.nn.Parameter(weights.clone()), indices

    def forward(self, x):
        return self.experts(x, self.weights, self.indices)


ROUTES = {
    "all experts": spread(20),
    "experts without tokens": spread(20) % 2 + torch.tensor([0, 2, 4]),  # never 6 and 7
    "one token": spread(1),
    "all tokens to the same": torch.tensor([[6, 2, 4]]).repeat(20, 1),
    "one expert": torch.full((20, 1), 5),
}


@pytest.mark.parametrize("grouped", [False, True], ids=["loop", "grouped"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("route", ROUTES)
def test_experts_equal_a_loop_over_tokens(route, kind, grouped, monkeypatch):
    # torch's grouped product runs on a CPU as well, which shows that both ways are right.
    monkeypatch.setattr("minillm.models.experts._can_group", lambda *_: grouped)
    experts, indices = block_of(**KINDS[kind]).experts, ROUTES[route]
    activation = {"gelu": F.gelu, "gelu_new without biases": lambda x: F.gelu(x, approximate="tanh")}.get(kind, F.silu)
    applied = Applied(experts, torch.rand(indices.shape), indices)
    x = inputs()[0].repeat(3, 1)[: len(indices)]
    ours = outputs_and_gradients(applied, x)
    slow = outputs_and_gradients(applied, x, lambda x: slow_experts(experts, x, applied.weights, indices, activation))
    assert_same(ours, slow)


@pytest.mark.parametrize("path", ["loop", "loop, widened", "grouped"])
@pytest.mark.parametrize("kind", ["swiglu", "silu"])
def test_bf16_is_as_close_to_exact_as_roundings_allow(kind, path, monkeypatch):
    experts, indices = block_of(**KINDS[kind]).experts.bfloat16(), spread(40)
    x, weights = torch.randn(40, D).bfloat16(), torch.rand(indices.shape)
    exact = outputs_and_gradients(Applied(copy.deepcopy(experts).double(), weights.double(), indices), x.double())
    monkeypatch.setattr("minillm.models.experts._can_group", lambda *_: path == "grouped")
    monkeypatch.setattr(linear, "CPU_MULTIPLIES_BF16", path != "loop, widened")
    ours = outputs_and_gradients(Applied(experts, weights, indices), x)
    for name, truth in exact.items():
        assert ours[name].dtype == (torch.float32 if name == "weights" else torch.bfloat16)
        assert (ours[name].double() - truth).norm() / truth.norm() < 3 * 2**-8, name


def test_experts_keep_their_parameters_and_little_else():
    """Parameters by reference, so that ZeRO-3 can empty them; one activation a row."""
    block, x = block_of(), inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block.experts(x[0], torch.rand(9, K), spread(9))
    assert any(t is block.experts.gate_up_proj for t in kept) and any(t is block.experts.down_proj for t in kept)
    large = [t for t in kept if t.is_floating_point() and t.numel() > x[0].numel()]
    large = [t.shape for t in large if not isinstance(t, torch.nn.Parameter)]
    assert large == [(9 * K, 2 * H)]
