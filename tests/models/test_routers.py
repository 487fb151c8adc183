"""Routers against their equations: weights, noise, groups, dtypes, and the bias of DeepSeek-V3."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed.moe.sharded_moe import TopKGate

from minillm.models import MiniLLMForCausalLM
from minillm.models.moe import SparseMoE
from tests.support.parity import assert_same, outputs_and_gradients
from tests.support.sparse_block import (
    PLAIN,
    SIGMOID,
    D,
    E,
    K,
    block_of,
    config_of,
    inputs,
    sigmoid_toy,
    slow_experts,
    spread,
)


def slow_noisy_top_k(gate, x, noise):
    """Equations 3-5 of arXiv:1701.06538, token by token: weights [S, E], 0 where not chosen."""
    rows = []
    for token in range(x.shape[0]):
        h = gate.router.weight @ x[token] + gate.router.bias
        if noise is not None:
            width = (1 + (gate.noise.weight @ x[token] + gate.noise.bias).exp()).log()
            h = h + noise[token] * width
        kept = sorted(range(E), key=lambda i, h=h: h[i].item())[-K:]
        exponentials = {i: h[i].exp() for i in kept}
        total = sum(exponentials.values())
        rows.append(torch.stack([exponentials[i] / total if i in kept else h.new_zeros(()) for i in range(E)]))
    return torch.stack(rows)


@pytest.mark.parametrize("training", [True, False])
def test_noisy_top_k_equals_its_equations(training):
    block, x = block_of(router_type="noisy_topk", **PLAIN).train(training), inputs()
    torch.manual_seed(5)
    noise = torch.randn(18, E) if training else None

    def slow(x):
        tokens = x.flatten(0, 1)
        dense = slow_noisy_top_k(block.gate, tokens, noise)
        indices = dense.topk(K, dim=-1).indices
        return slow_experts(block.experts, tokens, dense.gather(1, indices), indices).view_as(x)

    torch.manual_seed(5)
    ours = outputs_and_gradients(block, x)
    theirs = outputs_and_gradients(block, x, slow)
    if not training:
        for found in (ours, theirs):
            assert found.pop("gate.noise.weight") is None and found.pop("gate.noise.bias") is None
    assert_same(ours, theirs)


def test_noise_is_off_in_evaluation_and_on_in_training():
    block, x = block_of(router_type="noisy_topk"), inputs()
    assert torch.equal(block.eval()(x)[0], block(x)[0])
    assert not torch.equal(block.train()(x)[0], block(x)[0])


# router_noise, and replay

# What DeepSpeed's gate calls them; with k = 2 it has noise of its own (top2_2nd_expert_sampling) and ignores RSample.
GATES = [("jitter", "Jitter", 1), ("jitter", "Jitter", 2), ("jitter", "Jitter", 4), ("rsample", "RSample", 1)]


def deepspeed_gate(weight: torch.Tensor, top_k: int, policy: str) -> TopKGate:
    gate = TopKGate(
        D, E, top_k, capacity_factor=E, eval_capacity_factor=E, min_capacity=0, noisy_gate_policy=policy,
        use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip
    gate.wg.weight = torch.nn.Parameter(weight.detach().clone())
    return gate


@pytest.mark.parametrize("noise, policy, top_k", GATES)
@pytest.mark.parametrize("training", [True, False])
def test_noise_is_that_of_deepspeed(noise, policy, top_k, training):
    changes = {"router_noise": noise, "num_experts_per_tok": top_k, "norm_topk_prob": top_k > 1}
    router = block_of(**changes).gate.train(training)
    gate = deepspeed_gate(router.weight, top_k, policy).train(training)
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(17)
    choice = router(x)
    torch.manual_seed(17)
    _, _, _, indices, _, weights, counts = gate(x, sparse_routes=True)
    assert torch.equal(choice.indices, indices.t().long())
    torch.testing.assert_close(choice.weights, weights.t(), rtol=1e-6, atol=1e-7)
    assert torch.equal(torch.bincount(choice.indices.flatten(), minlength=E), counts)
    slope = torch.linspace(-1, 1, weights.numel()).view_as(choice.weights)
    (choice.weights * slope).sum().backward()
    ours, x.grad = x.grad, None
    (weights.t() * slope).sum().backward()
    assert_same({"x": ours, "weight": router.weight.grad}, {"x": x.grad, "weight": gate.wg.weight.grad})


@pytest.mark.parametrize("noise", ["jitter", "rsample"])
def test_noise_acts_in_training_alone(noise):
    noisy, plain, x = block_of(router_noise=noise).gate, block_of().gate, inputs()[0]
    assert torch.equal(noisy.eval()(x).weights, plain(x).weights)
    first, second = noisy.train()(x), noisy(x)
    changed = "indices" if noise == "rsample" else "weights"
    assert not torch.equal(getattr(first, changed), getattr(second, changed))
    assert torch.equal(first.logits, second.logits) == (noise == "rsample")


def test_rsample_draws_without_replacement_from_the_softmax():
    """The second expert given the first is drawn from what the others' probabilities say (Kool et al., 2019)."""
    router = block_of(router_noise="rsample", num_experts_per_tok=2).gate.train()
    x = inputs(1)[:, 0].expand(200_000, D)
    torch.manual_seed(4)
    first, second = router(x).indices.unbind(1)
    p = router.eval()(x[:1]).probabilities[0].detach()
    found = torch.zeros(E, E).index_put((first, second), torch.ones(()), accumulate=True) / len(x)
    expected = p[:, None] * p / (1 - p[:, None]) * (1 - torch.eye(E))
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "router, normalised",
    [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False), ("noisy_topk", True)],
)
def test_given_indices_are_used_with_the_weights_that_follow(router, normalised):
    gate = block_of(router_type=router, norm_topk_prob=normalised, routed_scaling_factor=2.5).gate.eval()
    x, indices = inputs()[0], spread(9)
    own, replayed = gate(x), gate(x, indices)
    assert torch.equal(replayed.indices, indices) and torch.equal(gate(x, own.indices).weights, own.weights)
    scores = {"softmax": own.logits.exp(), "sigmoid": own.logits.sigmoid(), "noisy_topk": own.logits.exp()}[router]
    among = scores.gather(1, indices)
    whole = {"softmax": scores.sum(-1, keepdim=True), "sigmoid": torch.ones(9, 1)}.get(router)
    expected = 2.5 * among / (among.sum(-1, keepdim=True) if normalised else whole)
    torch.testing.assert_close(replayed.weights, expected)
    assert torch.equal(replayed.probabilities, own.probabilities)


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_the_scaling_factor_scales_every_router(router):
    plain, scaled = (block_of(router_type=router, routed_scaling_factor=f).eval() for f in (1.0, 2.5))
    torch.testing.assert_close(scaled(inputs())[0], 2.5 * plain(inputs())[0])


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
def test_routing_is_fp32_in_a_bf16_model(router):
    block = block_of(router_type=router).bfloat16().eval()
    choice = block.gate(inputs()[0].bfloat16())
    assert {t.dtype for t in choice[:3]} == {torch.float32}
    exact = copy.deepcopy(block.gate).double()
    weight = exact.weight if router != "noisy_topk" else exact.router.weight
    logits = inputs()[0].bfloat16().double() @ weight.t() + (exact.router.bias if router == "noisy_topk" else 0)
    torch.testing.assert_close(choice.logits.double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shift", [0, -20], ids=["positive", "negative"])
def test_a_sigmoid_router_uses_the_best_groups_only(shift):
    block = block_of(**SIGMOID, num_experts_per_tok=4)
    with torch.no_grad():
        block.gate.e_score_correction_bias.copy_(
            shift + torch.tensor([0, 0, 9, 9, 5, 0, 3, 3.0])
        )  # groups: 0, 18, 5, 6
    assert set(block.gate(inputs()[0]).indices.flatten().tolist()) == {2, 3, 6, 7}


def test_sigmoid_probabilities_are_normalised_scores():
    gate, x = block_of(**SIGMOID).gate, inputs()[0]
    scores = 1 / (1 + (-(x @ gate.weight.t())).exp())
    torch.testing.assert_close(gate(x).probabilities, scores / scores.sum(-1, keepdim=True))


# DeepSeek-V3's bias


def test_bias_rises_for_idle_experts_and_falls_for_busy_ones():
    block = block_of(**SIGMOID, router_bias_update_speed=0.01)
    before = block.gate.e_score_correction_bias.clone()
    block.gate.update_bias(torch.tensor([9.0, 1, 5, 5, 5, 5, 5, 5]))  # mean 5
    expected = before + torch.tensor([-0.01, 0.01, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(block.gate.e_score_correction_bias, expected)


def biases(model) -> list[torch.Tensor]:
    return [b for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]


def test_bias_stays_fp32_in_a_bf16_model_and_is_saved(tmp_path):
    model = sigmoid_toy()
    values = [torch.rand(E) * 1e-4 + 1 for _ in range(4)]  # bf16 would round every one of them to 1
    for bias, value in zip(biases(model), values, strict=True):
        bias.copy_(value)
    for cast in (model.bfloat16(), model.to(torch.bfloat16), model.half(), model.bfloat16()):
        assert next(cast.parameters()).dtype in (torch.bfloat16, torch.float16)
        for bias, value in zip(biases(cast), values, strict=True):
            assert bias.dtype == torch.float32 and torch.equal(bias, value)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = MiniLLMForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        assert loaded.model.layers[0].mlp.gate.weight.dtype == dtype
        for bias, value in zip(biases(loaded), values, strict=True):
            assert bias.dtype == torch.float32 and torch.equal(bias, value)


def test_a_block_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        block = SparseMoE(config_of(**SIGMOID)).bfloat16()
    block = block.to_empty(device="cpu")
    assert block.gate.e_score_correction_bias.dtype == torch.float32
    assert block.gate.e_score_correction_bias.device.type == "cpu"
