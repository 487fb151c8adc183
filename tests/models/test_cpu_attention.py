"""Attention on the CPU, document by document, against a dense mask in fp64: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from minillm.models.attention import PackedDocuments, attend, build_attention_mask, document_borders_of
from minillm.models.cpu_attention import _WrittenOut

CPU = torch.device("cpu")


def documents_of(*lengths: int) -> torch.Tensor:
    """[1, T], each run of equal numbers one document."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def inputs_of(length: int, dtype: torch.dtype, heads: int, shared: int, width: int, value_width: int):
    torch.manual_seed(0)
    shapes = [(2, heads, length, width), (2, shared, length, width), (2, shared, length, value_width)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def exact(inputs, documents: torch.Tensor, scale: float | None, gradient: torch.Tensor) -> list[torch.Tensor]:
    """The definition: every score, in fp64, masked."""
    query, key, value = (x.double().requires_grad_() for x in inputs)
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    mask = same & torch.ones(length, length, dtype=torch.bool).tril()
    scores = query @ key.repeat_interleave(groups, 1).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    output = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value.repeat_interleave(groups, 1)
    output.backward(gradient.double())
    return [output.detach(), query.grad, key.grad, value.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(40, 1, 87), (128,), (5, 123)])
@pytest.mark.parametrize("heads, shared, width, value_width, scale", [(4, 2, 16, 16, None), (3, 3, 24, 16, 0.3)])
def test_documents_one_by_one_equal_the_masked_definition(dtype, lengths, heads, shared, width, value_width, scale):
    documents = torch.cat((documents_of(*lengths), documents_of(*lengths[::-1])))
    inputs = inputs_of(128, dtype, heads, shared, width, value_width)
    gradient = torch.randn(2, heads, 128, value_width).to(dtype)
    mask = build_attention_mask(128, CPU, document_ids=documents)
    assert isinstance(mask, PackedDocuments)
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = attend(*leaves, mask, scale=scale)
    output.backward(gradient)
    tolerance = 2e-6 if dtype == torch.float32 else 8e-3  # two roundings of bf16
    for ours, theirs in zip([output, *(x.grad for x in leaves)], exact(inputs, documents, scale, gradient)):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_written_out_products_pass_the_gradient_check():
    query, key, value = (x.double()[0].transpose(0, 1) for x in inputs_of(12, torch.float32, 4, 2, 6, 5))
    leaves = [x.contiguous().requires_grad_() for x in (query, key, value)]

    def call(*parts):  # fp32 inside, so that steps and tolerance are wide
        return _WrittenOut.apply(*(x.float() for x in parts), [5, 1, 6], 0.4).double()

    assert torch.autograd.gradcheck(call, leaves, eps=1e-2, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("kind", ["many short", "window", "padding", "long in bf16"])
def test_where_documents_are_masked_or_left_to_the_kernel(kind, monkeypatch):
    if kind == "many short":  # calls would cost more than the mask
        assert build_attention_mask(64, CPU, document_ids=documents_of(*[4] * 16)).dtype == torch.bool
    elif kind == "window":
        mask = build_attention_mask(64, CPU, document_ids=documents_of(32, 32), sliding_window=8)
        assert mask.dtype == torch.bool
        wide = build_attention_mask(64, CPU, document_ids=documents_of(32, 32), sliding_window=64)
        assert isinstance(wide, PackedDocuments)
    elif kind == "padding":
        real = torch.ones(1, 64, dtype=torch.long)
        real[:, :3] = 0
        assert build_attention_mask(64, CPU, real, document_ids=documents_of(32, 32)).dtype == torch.bool
    else:  # weights of a long document would be kept whole
        documents, kernel = documents_of(600, 40), F.scaled_dot_product_attention
        calls = []
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
        inputs = [x[:1] for x in inputs_of(640, torch.bfloat16, 2, 1, 8, 8)]
        attend(*inputs, build_attention_mask(640, CPU, document_ids=documents))
        assert len(calls) == 2


def test_borders_of_a_loader_make_the_same_mask():
    """They end in the length several times."""
    documents = documents_of(40, 50, 38)
    borders = document_borders_of(documents)
    padded = torch.cat((borders, borders[-1:].expand(4)))
    inputs = [x[:1] for x in inputs_of(128, torch.float32, 2, 2, 8, 8)]
    outputs = [
        attend(*inputs, build_attention_mask(128, CPU, document_ids=documents, document_borders=given))
        for given in (None, padded)
    ]
    assert torch.equal(*outputs)
