"""bf16 products through fp32 against the plain path and against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import minillm.models.linear as linear
from minillm.models.attention import attend


@pytest.fixture
def without_bf16_instructions(monkeypatch):
    monkeypatch.setattr(linear, "CPU_MULTIPLIES_BF16", False)


def products(forward, x, weight, bias):
    x, weight, bias = (None if t is None else t.clone().requires_grad_() for t in (x, weight, bias))
    y = forward(x, weight, bias)
    y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
    return [y.detach(), x.grad, weight.grad] + ([] if bias is None else [bias.grad])


def apply_linear(x, weight, bias):
    layer = linear.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    del layer.weight
    layer.weight = weight
    if bias is not None:
        del layer.bias
        layer.bias = bias
    return layer(x)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_widened_product_is_at_least_as_accurate_as_the_plain_one(without_bf16_instructions, with_bias, compiled):
    torch.manual_seed(0)
    inputs = [torch.randn(3, 40, 64), torch.randn(32, 64), torch.randn(32) if with_bias else None]
    rounded = [None if t is None else t.bfloat16() for t in inputs]
    exact = products(F.linear, *(None if t is None else t.double() for t in rounded))
    plain = products(F.linear, *rounded)
    wide = products(torch.compile(apply_linear, backend="aot_eager") if compiled else apply_linear, *rounded)
    for ours, theirs, truth in zip(wide, plain, exact):
        assert ours.dtype == torch.bfloat16
        error, plain_error = ((t.double() - truth).norm() / truth.norm() for t in (ours, theirs))
        assert error <= max(1.1 * plain_error, 2**-8)  # 2**-8: one rounding to bf16


def test_it_keeps_bf16_operands_only(without_bf16_instructions):
    layer = linear.Linear(64, 32, bias=False).bfloat16()
    x = torch.randn(40, 64).bfloat16().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert [t.dtype for t in kept] == [torch.bfloat16] * 2
    assert any(t is layer.weight for t in kept)  # the parameter itself: what ZeRO-3 empties and gathers again


@pytest.mark.parametrize("rows", [1, linear.MIN_ROWS_TO_WIDEN - 1])
def test_few_rows_take_the_plain_path(without_bf16_instructions, rows):
    layer, x = linear.Linear(64, 32, bias=False).bfloat16(), torch.randn(rows, 64).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_fp32_and_bf16_with_instructions_are_plain(monkeypatch):
    layer, x = linear.Linear(64, 32, bias=False), torch.randn(40, 64)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    monkeypatch.setattr(linear, "CPU_MULTIPLIES_BF16", True)
    layer, x = layer.bfloat16(), x.bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.weight))


@pytest.mark.parametrize("masked", [False, True])
def test_widened_attention_is_close_to_fp64(without_bf16_instructions, masked):
    q, k, v = (torch.randn(2, heads, 150, 16).bfloat16() for heads in (4, 2, 2))
    mask = torch.ones(150, 150, dtype=torch.bool).tril()[None, None]
    exact = F.scaled_dot_product_attention(
        q.double(), k.double().repeat_interleave(2, 1), v.double().repeat_interleave(2, 1), attn_mask=mask
    )
    actual = attend(q, k, v, mask if masked else None)
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - exact).norm() / exact.norm() < 2**-8
