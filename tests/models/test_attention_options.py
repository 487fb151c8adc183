"""Grouped-query attention with each of its options against transformers' class that has it: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen3Config, Qwen3NextConfig
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from minillm.models import MiniLLMConfig
from minillm.models import attention as attention_module
from minillm.models.attention import (
    GroupedQueryAttention,
    PackedDocuments,
    attend,
    build_attention_mask,
    document_borders_of,
)
from minillm.models.positions import RotaryEmbedding
from tests.support.toy_presets import toy_model

MODULE = {"rtol": 1e-5, "atol": 1e-5}
SHAPE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
SHAPE |= {"max_position_embeddings": 16, "rms_norm_eps": 1e-5, "vocab_size": 97, "num_hidden_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}


def causal(length: int, window: int | None = None) -> torch.Tensor:
    """The mask their eager attention adds to its scores."""
    hidden = torch.ones(length, length).triu(1).bool()
    if window is not None:
        hidden |= torch.ones(length, length).tril(-window).bool()
    return torch.zeros(length, length).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]


def randomise(module: nn.Module, spread: float = 0.2) -> None:
    for parameter in module.parameters():
        parameter.data.normal_(std=spread)


def theirs_config(kind: type, scaling: dict | None = None, **changes):
    rope = {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}
    if "partial_rotary_factor" in changes:
        rope["partial_rotary_factor"] = changes.pop("partial_rotary_factor")
    config = kind(**SHAPE, rope_parameters=rope, pad_token_id=None, **changes)
    config._attn_implementation = "eager"
    return config


def assert_equal(ours, theirs, run_ours, run_theirs, length: int = 20) -> None:
    """The same output, and the same gradients of a random product with it, for the input and every parameter."""
    x, weights = torch.randn(2, length, 48), torch.randn(2, length, 48) / 10
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, expected = run_ours(a), run_theirs(b)
    torch.testing.assert_close(actual, expected, **MODULE)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **MODULE)
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name, **MODULE)


def assert_equals_rotary_class(ours_fields, kind, rotary, config, window=None, length=20) -> None:
    mine = MiniLLMConfig(**SHAPE, rope_theta=500.0, **ours_fields)
    ours, theirs = GroupedQueryAttention(mine, 0), kind(config, 0)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    position_ids = torch.arange(length)[None].expand(2, length)
    mask = build_attention_mask(length, torch.device("cpu"), sliding_window=window)
    assert_equal(
        ours,
        theirs,
        lambda x: ours(x, RotaryEmbedding(mine).rotation(position_ids), mask),
        lambda x: theirs(x, rotary(config)(x, position_ids), causal(length, window))[0],
        length,
    )


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "dynamic", "factor": 4.0}, YARN, LLAMA3],
    ids=lambda scaling: scaling["rope_type"],
)
def test_scaled_attention_equals_llama(scaling):
    config = theirs_config(LlamaConfig, scaling)
    assert_equals_rotary_class({"rope_scaling": scaling}, LlamaAttention, LlamaRotaryEmbedding, config)


def test_biases_equal_llama():
    config = theirs_config(LlamaConfig, attention_bias=True)
    assert_equals_rotary_class({"attention_bias": True}, LlamaAttention, LlamaRotaryEmbedding, config)


def test_qk_norm_equals_qwen3():
    config = theirs_config(Qwen3Config)
    assert_equals_rotary_class({"qk_norm": True}, Qwen3Attention, Qwen3RotaryEmbedding, config)


@pytest.mark.parametrize("length", [5, 20, 300])  # shorter than the window; longer; longer than a block of queries
def test_sliding_window_equals_mistral(length):
    config = theirs_config(MistralConfig, sliding_window=8)
    fields = {"layer_types": ["sliding_attention"], "sliding_window": 8}
    assert_equals_rotary_class(fields, MistralAttention, MistralRotaryEmbedding, config, window=8, length=length)


def test_gate_partial_rotary_and_zero_centred_norms_equal_qwen3_next():
    config = theirs_config(Qwen3NextConfig, partial_rotary_factor=0.25, layer_types=["full_attention"])
    fields = {"qk_norm": True, "attention_output_gate": True, "norm_type": "zero_centered_rmsnorm"}
    fields["partial_rotary_factor"] = 0.25
    assert_equals_rotary_class(fields, Qwen3NextAttention, Qwen3NextRotaryEmbedding, config)


def test_attention_equals_gpt2():
    config = GPT2Config(n_embd=48, n_head=6, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager")
    theirs = GPT2Attention(config, layer_idx=0)
    randomise(theirs)
    fields = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}
    ours = GroupedQueryAttention(MiniLLMConfig(**fields, position_embedding_type="learned", attention_bias=True), 0)
    names = ("q_proj", "k_proj", "v_proj")
    for name, weight, bias in zip(names, theirs.c_attn.weight.split(48, dim=1), theirs.c_attn.bias.split(48)):
        getattr(ours, name).load_state_dict({"weight": weight.T, "bias": bias})  # Conv1D holds [in, out]
    ours.o_proj.load_state_dict({"weight": theirs.c_proj.weight.T, "bias": theirs.c_proj.bias})
    x, weights = torch.randn(2, 20, 48), torch.randn(2, 20, 48) / 10
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    actual, (expected, _) = ours(a), theirs(b, attention_mask=causal(20))
    torch.testing.assert_close(actual, expected, **MODULE)
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad, **MODULE)
    joined = torch.cat([getattr(ours, name).weight.grad.T for name in names], dim=1)
    torch.testing.assert_close(joined, theirs.c_attn.weight.grad, **MODULE)
    joined = torch.cat([getattr(ours, name).bias.grad for name in names])
    torch.testing.assert_close(joined, theirs.c_attn.bias.grad, **MODULE)
    torch.testing.assert_close(ours.o_proj.weight.grad.T, theirs.c_proj.weight.grad, **MODULE)
    torch.testing.assert_close(ours.o_proj.bias.grad, theirs.c_proj.bias.grad, **MODULE)


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


def written_out(query, key, value, mask, scale) -> torch.Tensor:
    """Attention in fp64, one head at a time."""
    output = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for n in range(query.shape[1]):
        k, v = (x[:, n * key.shape[1] // query.shape[1]].double() for x in (key, value))
        scores = query[:, n].double() @ k.transpose(1, 2) * scale
        output[:, n] = scores.masked_fill(~mask[:, 0], -torch.inf).softmax(-1) @ v
    return output.float()


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
