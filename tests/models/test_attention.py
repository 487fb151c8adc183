"""Attention against its definition: widths, scales, windows, masks, packed documents; CUDA's kernel where it is."""

from __future__ import annotations

import pytest
import torch

from minillm.models import MiniLLMConfig
from minillm.models import attention as attention_module
from minillm.models.attention import (
    GroupedQueryAttention,
    PackedDocuments,
    attend,
    build_attention_mask,
    document_borders_of,
)
from tests.support.toy_presets import toy_model

MODULE = {"rtol": 1e-5, "atol": 1e-5}
SHAPE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
SHAPE |= {"max_position_embeddings": 16, "rms_norm_eps": 1e-5, "vocab_size": 97, "num_hidden_layers": 1}


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    layer = GroupedQueryAttention(MiniLLMConfig(**SHAPE, attention_dropout=0.5), 0)
    exact = GroupedQueryAttention(MiniLLMConfig(**SHAPE), 0)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, 48)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), exact(x))
        layer.train()
        assert not torch.equal(layer(x), layer(x))
        mean = layer(x.repeat(1000, 1, 1)).unflatten(0, (1000, 2)).mean(0)
        error = (mean - exact(x)).norm() / exact(x).norm()
    assert error < 0.1  # what is kept is scaled up, so that the mean is right


def written_out(query, key, value, mask, scale=8**-0.5) -> torch.Tensor:
    """Attention in fp64, one head at a time."""
    output = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for n in range(query.shape[1]):
        k, v = (x[:, n * key.shape[1] // query.shape[1]].double() for x in (key, value))
        scores = query[:, n].double() @ k.transpose(1, 2) * scale
        output[:, n] = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ v
    return output.float()


@pytest.mark.parametrize("length", [1, 7, 129, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_it_equals_attention_written_out(length, masked):
    query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length)
    if masked:
        documents = torch.arange(length)[None] // torch.tensor([[5], [70]])
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    expected_inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    actual, expected = attend(*inputs, mask if masked else None), written_out(*expected_inputs, mask)
    torch.testing.assert_close(actual, expected, **MODULE)
    weights = torch.randn_like(actual)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(inputs, expected_inputs):
        torch.testing.assert_close(ours.grad, theirs.grad, **MODULE)


@pytest.mark.parametrize("value_dim", [4, 8, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_values_of_another_width_and_a_scale(value_dim, masked):
    query, key, value = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, value_dim)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 1, 9, 9)
    if masked:
        mask = mask & (torch.rand(2, 1, 9, 9) < 0.5) | torch.eye(9, dtype=torch.bool)
    actual = attend(query, key, value, mask if masked else None, scale=0.7)
    torch.testing.assert_close(actual, written_out(query, key, value, mask, 0.7), **MODULE)


@pytest.mark.parametrize("window, length", [(1, 40), (8, 300), (140, 300), (400, 300)])
def test_a_window_cuts_the_work_and_nothing_else(window, length, monkeypatch):
    query, key, value = (torch.randn(2, 2, length, 8) for _ in range(3))
    mask = build_attention_mask(length, torch.device("cpu"), sliding_window=window)
    seen = []
    exact = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, k, *rest, **options: seen.append(k.shape[2]) or exact(q, k, *rest, **options),
    )
    actual = attend(query, key, value, mask, window=window)
    dense = torch.ones(length, length).tril().triu(1 - window).bool().expand(2, 1, length, length)
    torch.testing.assert_close(actual, written_out(query, key, value, dense, 8**-0.5), **MODULE)
    assert max(seen) <= max(128, length if window > length else 0) + window


def test_a_finished_mask_is_cut_to_the_window():
    whole = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    expected = whole.triu(-7)
    device = torch.device("cpu")
    assert torch.equal(build_attention_mask(20, device, whole, sliding_window=8), expected)
    added = torch.zeros(1, 1, 20, 20).masked_fill(~whole, torch.finfo(torch.float32).min)
    assert torch.equal(build_attention_mask(20, device, added, sliding_window=8) == 0, expected)
    assert build_attention_mask(20, device, whole) is whole


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 3 + [2] * 4, [7] * 1 + [8] * 11])


def pack_documents(document_ids: torch.Tensor | None, window: int | None = None) -> PackedDocuments:
    return PackedDocuments(None if document_ids is None else document_borders_of(document_ids), window)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("document_ids", [DOCUMENTS, None])
def test_borders_are_the_dense_mask(document_ids, window):
    packed = pack_documents(document_ids, window)
    dense = build_attention_mask(12, torch.device("cpu"), document_ids=document_ids, sliding_window=window)
    if dense is None:
        dense = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    assert torch.equal(packed.dense(2, 12, torch.device("cpu")), dense)
    if document_ids is not None:
        # Row 1 begins a document even where its first number is the last of row 0.
        assert packed.borders.tolist() == [0, 5, 8, 12, 13, 24] and packed.borders.dtype == torch.int32
        assert document_borders_of(torch.zeros(3, 4, dtype=torch.long)).tolist() == [0, 4, 8, 12]
        padded = PackedDocuments(torch.cat((packed.borders, packed.borders[-1:].expand(3))), window)
        assert torch.equal(padded.dense(2, 12, torch.device("cpu")), dense)  # documents of no tokens


def varlen_reference(query, key, value, borders, key_borders, longest, _, *, scale, window_size, enable_gqa=None):
    """What torch.nn.attention.varlen.varlen_attn documents: [tokens, heads, H], documents one after another."""
    assert torch.equal(borders, key_borders) and (borders.diff() <= longest).all() and window_size[1] == 0
    assert query.shape[-1] == value.shape[-1]
    if {"enable_gqa"} & attention_module._VARLEN_OPTIONS:  # torch 2.11 has no such argument
        assert enable_gqa == (query.shape[1] != key.shape[1])
    else:
        assert enable_gqa is None
    output = []
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist()):
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
        mask = torch.ones(end - begin, end - begin).tril().bool()
        if window_size[0] >= 0:
            mask = mask.triu(-window_size[0])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        output.append(written_out(q, k, v, mask[None, None], scale)[0].transpose(0, 1))
    return torch.cat(output)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("document_ids", [DOCUMENTS, None])
@pytest.mark.parametrize("value_dim, scale", [(8, None), (6, 0.3)])
@pytest.mark.parametrize("options", [{"window_size"}, {"window_size", "enable_gqa"}], ids=["2.11", "2.12"])
def test_packed_documents_reach_the_kernel_and_the_dense_mask_alike(
    monkeypatch, window, document_ids, value_dim, scale, options
):
    """The kernel itself is for CUDA; what it is given is checked here by a slow function of the same signature."""
    query, key, value = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, value_dim)
    packed = pack_documents(document_ids, window)
    expected = attend(query, key, value, packed.dense(2, 12, torch.device("cpu")), scale=scale, window=window)
    torch.testing.assert_close(attend(query, key, value, packed, scale=scale, window=window), expected, **MODULE)
    monkeypatch.setattr(attention_module, "varlen_attn", varlen_reference)
    monkeypatch.setattr(attention_module, "_VARLEN_OPTIONS", options)
    monkeypatch.setattr(attention_module, "_kernel_takes", lambda *_: True)
    torch.testing.assert_close(attend(query, key, value, packed, scale=scale, window=window), expected, **MODULE)


def test_one_token_with_shared_heads_equals_the_definition():
    """What CUDA takes for a token over a cache of fixed size, some of whose places hold nothing yet."""
    query, key, value = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 5)
    mask = (torch.arange(11) < torch.tensor([4, 9])[:, None])[:, None, None]
    actual = attention_module._attend_from_one_token(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(actual, written_out(query, key, value, mask, 0.3), **MODULE)


def test_masks_stay_dense_without_cuda():
    assert isinstance(build_attention_mask(12, torch.device("cpu"), document_ids=DOCUMENTS), torch.Tensor)


needs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available()
    or attention_module.varlen_attn is None
    or torch.cuda.get_device_capability() < (8, 0),
    reason="torch's variable-length attention runs on CUDA devices of capability 8.0 and above",
)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("value_dim", [64, 48])
def test_the_kernel_equals_the_dense_mask(window, value_dim):
    packed = pack_documents(DOCUMENTS.cuda(), window)
    shapes = (2, 4, 12, 64), (2, 2, 12, 64), (2, 2, 12, value_dim)
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
    exact = [x.detach().float().cpu().requires_grad_() for x in inputs]
    assert attention_module._kernel_takes(inputs[0], inputs[2], 0.0)
    actual = attend(*inputs, packed)
    expected = attend(*exact, packed.dense(2, 12, torch.device("cuda")).cpu())
    torch.testing.assert_close(actual.float().cpu(), expected, rtol=2e-2, atol=2e-2)
    weights = torch.randn(actual.shape)
    (actual * weights.cuda().bfloat16()).sum().backward()
    (expected * weights.bfloat16().float()).sum().backward()
    for x, y in zip(inputs, exact):
        torch.testing.assert_close(x.grad.float().cpu(), y.grad, rtol=3e-2, atol=3e-2)


@pytest.mark.gpu
@needs_kernel
@pytest.mark.parametrize("preset", ["llama3-mini", "mistral-mini", "gpt2-124m"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_with_the_kernel_equals_one_without(preset, checkpointing, monkeypatch):
    ids = torch.arange(24).view(2, 12) % 101
    gradients = []
    for kernel in (True, False):
        model = toy_model(preset).cuda().bfloat16()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not kernel:
            monkeypatch.setattr(attention_module, "varlen_attn", None)
        masks = build_attention_mask(12, torch.device("cuda"), document_ids=DOCUMENTS.cuda())
        assert isinstance(masks, PackedDocuments) == kernel
        model(ids.cuda(), labels=ids.cuda(), document_ids=DOCUMENTS.cuda()).loss.backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99
