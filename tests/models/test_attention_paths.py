"""Causality, packing, padding and caching: one pass over the whole must equal the parts done alone."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.models.attention import attend

MODEL = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model() -> MiniLLMForCausalLM:
    torch.manual_seed(0)
    config = MiniLLMConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return MiniLLMForCausalLM(config).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(1, 101, shape, generator=torch.Generator().manual_seed(sum(shape)))


def oracle(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Attention written out in fp64, one head at a time."""
    output = torch.empty_like(query, dtype=torch.float64)
    for n in range(query.shape[1]):
        k, v = (x[:, n * key.shape[1] // query.shape[1]].double() for x in (key, value))
        scores = query[:, n].double() @ k.transpose(1, 2) / query.shape[-1] ** 0.5
        output[:, n] = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ v
    return output


@pytest.mark.parametrize("length", [1, 7, 129, 300])
@pytest.mark.parametrize("masked", [False, True])
def test_attend_equals_written_out_attention(length, masked):
    query, key, value = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(2, 1, length, length)
    if masked:
        documents = torch.arange(length)[None] // torch.tensor([[5], [70]])
        mask = mask & (documents[:, None, :, None] == documents[:, None, None, :])
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    expected_inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    actual, expected = attend(*inputs, mask if masked else None), oracle(*expected_inputs, mask)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)
    weights = torch.randn_like(actual)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    for ours, theirs in zip(inputs, expected_inputs):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits(model):
    ids = tokens(2, 20)
    changed = ids.clone()
    changed[:, 11:] = tokens(2, 9) % 7
    a, b = model(ids).logits, model(changed).logits
    torch.testing.assert_close(a[:, :11], b[:, :11], rtol=0, atol=1e-6)
    assert (a[:, 11] - b[:, 11]).abs().max() > 1e-3


def test_packed_documents_equal_separate_ones(model):
    documents = [tokens(1, length) for length in (5, 13, 1, 9)]
    packed = torch.cat(documents, dim=1)
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    document_ids = torch.cat([torch.full((d.shape[1],), i) for i, d in enumerate(documents)])[None]
    actual = model(packed, position_ids=position_ids, document_ids=document_ids).logits
    expected = torch.cat([model(d).logits for d in documents], dim=1)
    torch.testing.assert_close(actual, expected, **MODEL)


def test_packed_gradients_equal_separate_ones(model):
    documents = [tokens(1, length) for length in (6, 11)]
    position_ids = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    document_ids = torch.tensor([[0] * 6 + [1] * 11])
    targets = [torch.cat([d[:, 1:], torch.full((1, 1), -100)], dim=1) for d in documents]
    model.zero_grad()
    for ids, target in zip(documents, targets):
        model(ids, shift_labels=target, num_items_in_batch=15).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    packed, target = torch.cat(documents, dim=1), torch.cat(targets, dim=1)
    model(
        packed, position_ids=position_ids, document_ids=document_ids, shift_labels=target, num_items_in_batch=15
    ).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name, **MODEL)
    model.zero_grad()


@pytest.mark.parametrize("left", [True, False])
def test_padded_batch_equals_single_ones(model, left):
    rows = [tokens(1, length) for length in (4, 11, 7)]
    ids, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(11 - row.shape[1], None) if left else slice(row.shape[1])
        ids[i, where], mask[i, where] = row[0], 1
    logits = model(ids, attention_mask=mask).logits
    assert logits.isfinite().all()
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i][mask[i].bool()], model(row).logits[0], **MODEL)


@pytest.mark.parametrize("make_cache", ["dynamic", "static"])
@pytest.mark.parametrize("chunks", [[6, 1, 1, 1], [1, 5, 3], [9]])
def test_prefill_and_decode_equal_one_pass(model, make_cache, chunks):
    ids = tokens(2, 9)
    cache = DynamicCache() if make_cache == "dynamic" else StaticCache(config=model.config, max_cache_len=16)
    parts = [model(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids).logits, **MODEL)


def test_left_padded_decode_equals_single_one(model):
    long, short = tokens(1, 9), tokens(1, 5)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    cache = DynamicCache()
    logits = [model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache).logits]
    for t in (6, 7, 8):
        logits += [model(ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits]
    logits = torch.cat(logits, dim=1)
    torch.testing.assert_close(logits[0], model(long).logits[0], **MODEL)
    torch.testing.assert_close(logits[1, 4:], model(short).logits[0], **MODEL)


def test_document_ids_with_cached_tokens_are_refused(model):
    cache = DynamicCache()
    model(tokens(1, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="document_ids"):
        model(tokens(1, 2), document_ids=torch.zeros(1, 2, dtype=torch.long), past_key_values=cache)
