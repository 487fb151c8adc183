"""Every mechanism, and the model made of them, against transformers' Llama with the same weights (fp32, CPU)."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from minillm.models.attention import GroupedQueryAttention
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.mlp import SwiGLU
from minillm.models.modeling_minillm import MiniLLMForCausalLM
from minillm.models.normalization import RMSNorm
from minillm.models.positions import RotaryEmbedding

MODULE, MODEL = 1e-5, 1e-4
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    # Llama gives no gradient to its padding row; ours trains it, because here padding is <|endoftext|>, a real token.
    "pad_token_id": None,
    "initializer_range": 0.2,  # wide, so that attention is far from uniform and logits far from equal
}


def ours_and_theirs(**changes) -> tuple[MiniLLMConfig, LlamaConfig]:
    fields = {**SHAPE, "tie_word_embeddings": True, **changes}
    theirs = LlamaConfig(**fields, rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    theirs._attn_implementation = "eager"
    return MiniLLMConfig(**fields, rope_theta=5000.0), theirs


def copy_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    weights = {name.replace(".self_attn.", ".mixer."): value for name, value in theirs.state_dict().items()}
    ours.load_state_dict(weights, strict=True)


def assert_same_gradients(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    expected = {n.replace(".self_attn.", ".mixer."): p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_rmsnorm_equals_llama():
    ours, theirs = RMSNorm(ours_and_theirs()[0], 48), LlamaRMSNorm(48, eps=1e-5)
    weight = torch.randn(48)
    x = torch.randn(2, 5, 48)
    for norm in (ours, theirs):
        norm.weight.data.copy_(weight)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b), rtol=MODULE, atol=MODULE)
    ours(a).square().sum().backward()
    theirs(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=MODULE, atol=MODULE)
    assert_same_gradients(ours, theirs, MODULE)


def test_swiglu_equals_llama():
    config, llama = ours_and_theirs()
    ours, theirs = SwiGLU(config, config.intermediate_size), LlamaMLP(llama)
    copy_weights(ours, theirs)
    x = torch.randn(2, 5, 48)
    torch.testing.assert_close(ours(x), theirs(x), rtol=MODULE, atol=MODULE)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    assert_same_gradients(ours, theirs, MODULE)


@pytest.mark.parametrize("key_value_heads", [6, 2, 1])
def test_attention_equals_llama(key_value_heads):
    config, llama = ours_and_theirs(num_key_value_heads=key_value_heads)
    ours, theirs = GroupedQueryAttention(config, 0), LlamaAttention(llama, 0)
    copy_weights(ours, theirs)
    x, position_ids = torch.randn(2, 9, 48), torch.arange(3, 12)[None].expand(2, 9)
    causal = torch.full((9, 9), torch.finfo(torch.float32).min).triu(1)[None, None]
    expected, _ = theirs(x, LlamaRotaryEmbedding(llama)(x, position_ids), causal)
    actual = ours(x, RotaryEmbedding(config).rotation(position_ids))
    torch.testing.assert_close(actual, expected, rtol=MODULE, atol=MODULE)
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert_same_gradients(ours, theirs, MODULE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("key_value_heads", [6, 2])
def test_model_equals_llama(tied, key_value_heads):
    config, llama = ours_and_theirs(tie_word_embeddings=tied, num_key_value_heads=key_value_heads)
    ours, theirs = MiniLLMForCausalLM(config), LlamaForCausalLM(llama)
    copy_weights(ours, theirs)
    ids = torch.randint(0, 97, (2, 33))
    labels = ids.masked_fill(torch.rand(2, 33) < 0.3, -100)
    expected = theirs(ids, labels=labels)
    actual = ours(ids, labels=labels, return_logits=True)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=MODEL, atol=MODEL)
    torch.testing.assert_close(actual.loss, expected.loss, rtol=MODEL, atol=MODEL)
    actual.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, theirs, MODEL)


def test_padded_batch_equals_llama():
    config, llama = ours_and_theirs()
    ours, theirs = MiniLLMForCausalLM(config).eval(), LlamaForCausalLM(llama).eval()
    copy_weights(ours, theirs)
    ids, mask = torch.randint(0, 97, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    expected = theirs(ids, attention_mask=mask).logits
    actual = ours(ids, attention_mask=mask).logits
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=MODEL, atol=MODEL)


def test_greedy_generation_equals_llama():
    config, llama = ours_and_theirs()
    ours, theirs = MiniLLMForCausalLM(config).eval(), LlamaForCausalLM(llama).eval()
    copy_weights(ours, theirs)
    ids, mask = torch.randint(1, 97, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    mask[1, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}
    for cache in ("dynamic", "static"):
        actual = ours.generate(ids, cache_implementation=cache, disable_compile=True, **options)
        assert torch.equal(actual, theirs.generate(ids, **options)), cache
