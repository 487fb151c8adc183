"""Norms and dense feed-forward blocks against transformers' with the same random weights: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from minillm.models import MiniLLMConfig
from minillm.models.mlp import ACTIVATIONS, build_dense_mlp
from minillm.models.normalization import NORMS, ZeroCenteredRMSNorm, build_norm
from tests.support.toy_presets import toy_model

MODULE = {"rtol": 1e-5, "atol": 1e-5}
THEIRS = {
    "rmsnorm": lambda: LlamaRMSNorm(48, eps=1e-3),
    "zero_centered_rmsnorm": lambda: Qwen3NextRMSNorm(48, eps=1e-3),
    "layernorm": lambda: nn.LayerNorm(48, eps=1e-3),  # GPT-2's
}


def norms(norm_type: str) -> tuple[nn.Module, nn.Module]:
    ours = build_norm(MiniLLMConfig(hidden_size=48, norm_type=norm_type, rms_norm_eps=1e-3))
    theirs = THEIRS[norm_type]()
    for parameter in theirs.parameters():
        parameter.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("norm_type", sorted(NORMS))
def test_norms_equal_transformers(norm_type):
    ours, theirs = norms(norm_type)
    x, weights = torch.randn(2, 5, 48) * 0.05 + 0.02, torch.randn(2, 5, 48)  # so small that eps is felt
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b), **MODULE)
    (ours(a) * weights).sum().backward()
    (theirs(b) * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **MODULE)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name, **MODULE)


@pytest.mark.parametrize("norm_type", sorted(NORMS))
def test_norms_of_bf16_are_taken_in_fp32(norm_type):
    ours, _ = norms(norm_type)
    ours = ours.bfloat16()
    x = (torch.randn(3, 48) * 5 + 40).bfloat16()  # a mean far from 0: squares in bf16 would lose the deviation
    exact, _ = norms(norm_type)
    exact.load_state_dict(ours.state_dict())
    actual, expected = ours(x), exact(x.float()).bfloat16()
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


def test_zero_centred_weights_start_at_zero():
    # The other norms start at 1; a decoder must not make these 1 as well, which would double every scale.
    model = toy_model("qwen3-mini", norm_type="zero_centered_rmsnorm")
    found = [module for module in model.modules() if isinstance(module, ZeroCenteredRMSNorm)]
    assert len(found) == 4 * 4 + 1  # two a layer, two on queries and keys, one last
    assert all((module.weight == 0).all() for module in found)


def test_gelu_mlp_equals_gpt2():
    theirs = GPT2MLP(64, GPT2Config(n_embd=48, resid_pdrop=0.0))
    ours = build_dense_mlp(
        MiniLLMConfig(hidden_size=48, mlp_type="mlp", mlp_bias=True, hidden_act="gelu_new"), intermediate_size=64
    )
    for parameter in theirs.parameters():
        parameter.data.normal_()
    pairs = [(ours.up_proj, theirs.c_fc), (ours.down_proj, theirs.c_proj)]
    for mine, conv in pairs:  # GPT-2's Conv1D holds its weight [in, out]
        mine.load_state_dict({"weight": conv.weight.T, "bias": conv.bias})
    x, weights = torch.randn(2, 5, 48) / 7, torch.randn(2, 5, 48) / 8
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b), **MODULE)
    (ours(a) * weights).sum().backward()
    (theirs(b) * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **MODULE)
    for mine, conv in pairs:
        torch.testing.assert_close(mine.weight.grad, conv.weight.grad.T, **MODULE)
        torch.testing.assert_close(mine.bias.grad, conv.bias.grad, **MODULE)


def test_activations_are_their_formulas():
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    tanh_form = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    expected = {
        "silu": x / (1 + torch.exp(-x)),
        "gelu": 0.5 * x * (1 + torch.erf(x / 2**0.5)),
        "gelu_new": tanh_form,
    }
    assert set(expected) == set(ACTIVATIONS)
    for name, values in expected.items():
        torch.testing.assert_close(ACTIVATIONS[name](x), values)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("bias", [True, False])
def test_plain_mlp_is_two_products(activation, bias):
    config = MiniLLMConfig(hidden_size=48, mlp_type="mlp", mlp_bias=bias, hidden_act=activation)
    mlp = build_dense_mlp(config, 32)
    assert len(list(mlp.parameters())) == (4 if bias else 2)
    x = torch.randn(3, 48)
    middle = ACTIVATIONS[activation](F.linear(x, mlp.up_proj.weight, mlp.up_proj.bias))
    torch.testing.assert_close(mlp(x), F.linear(middle, mlp.down_proj.weight, mlp.down_proj.bias), **MODULE)
