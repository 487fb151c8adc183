"""Norms and dense feed-forward blocks against their formulas (against transformers' classes: test_parity.py)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minillm.models import MiniLLMConfig
from minillm.models.mlp import ACTIVATIONS, build_dense_mlp
from minillm.models.normalization import NORMS, ZeroCenteredRMSNorm, build_norm
from tests.support.parity import randomise
from tests.support.toy_presets import toy_model

MODULE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("norm_type", sorted(NORMS))
def test_norms_of_bf16_are_taken_in_fp32(norm_type):
    config = MiniLLMConfig(hidden_size=48, norm_type=norm_type, rms_norm_eps=1e-3)
    ours, exact = randomise(build_norm(config), 1.0).bfloat16(), build_norm(config)
    exact.load_state_dict(ours.state_dict())
    x = (torch.randn(3, 48) * 5 + 40).bfloat16()  # a mean far from 0: squares in bf16 would lose the deviation
    actual, expected = ours(x), exact(x.float()).bfloat16()
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2**-7, atol=2**-7)


def test_zero_centred_weights_start_at_zero():
    # The other norms start at 1; a decoder must not make these 1 as well, which would double every scale.
    model = toy_model("qwen3-mini", norm_type="zero_centered_rmsnorm")
    found = [module for module in model.modules() if isinstance(module, ZeroCenteredRMSNorm)]
    assert len(found) == 4 * 4 + 1  # two a layer, two on queries and keys, one last
    assert all((module.weight == 0).all() for module in found)


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
