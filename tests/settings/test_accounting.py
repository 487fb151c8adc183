"""Predicted parameters, operations and cache bytes against built models, torch's own counter and a filled cache."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.accounting import cache_bytes, flops_per_token, num_parameters
from minillm.settings.architecture import Architecture
from minillm.settings.presets import PRESETS, preset
from tests.support.toy_presets import toy_architecture

SMALL = {
    "vocab_size": 70, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 6, "head_dim": 8,
    "intermediate_size": 56,
}  # fmt: skip
TOYS = {name: toy_architecture(name) for name in PRESETS}


def build(arch: Architecture, device: str = "meta") -> MiniLLMForCausalLM:
    with torch.device(device):
        return MiniLLMForCausalLM(MiniLLMConfig(**arch))


@pytest.mark.parametrize(
    "arch",
    [*PRESETS.values(), *TOYS.values(), preset("demo", **SMALL), preset("demo", **SMALL, tie_word_embeddings=False)],
)
def test_predicted_parameters_are_the_built_ones(arch):
    model, predicted = build(arch), num_parameters(arch)
    assert predicted["total"] == sum(p.numel() for p in model.parameters())
    embedding = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    embedding |= {id(p): p.numel() for p in model.model.positions.parameters()}
    assert predicted["embedding"] == sum(embedding.values())
    assert predicted["non_embedding"] == predicted["total"] - predicted["embedding"]
    ahead = sum(p.numel() for p in model.model.multi_token_modules.parameters())
    assert predicted["multi_token"] == ahead
    idle = 0
    for layer in model.model.layers:
        if layer.is_sparse:
            experts = sum(p.numel() for p in layer.mlp.experts.parameters())
            idle += experts * (arch.num_experts - arch.num_experts_per_tok) // arch.num_experts
    assert predicted["active"] == predicted["total"] - ahead - idle


def test_published_counts():
    published = {
        "dense-26m": 25_829_888,
        "gpt2-124m": 124_439_808,
        "dense-171m": 171_303_936,
        "moe-876m": 876_537_024,
        "qwen3-mini": 63_912_192,
        "qwen3-moe-mini": 198_416_640,
    }
    assert {name: num_parameters(PRESETS[name])["total"] for name in published} == published
    assert 1_000_000 <= num_parameters(PRESETS["demo"])["total"] <= 4_000_000
    assert 550_000 <= num_parameters(PRESETS["char-tiny"])["total"] <= 700_000
    assert round(num_parameters(PRESETS["qwen3-moe-mini"])["active"] / 1e6) == 64
    for name in ("llama3-mini", "qwen3-next-mini", "deepseek-v3-mini"):
        counts = num_parameters(PRESETS[name])
        assert 100e6 <= counts["total"] - counts["multi_token"] <= 200e6


def norm_parameters(model: MiniLLMForCausalLM) -> int:
    """6 N counts norms and other vectors as if they were products, of experts' biases those a token uses."""
    named = [(name, p) for name, p in model.model.named_parameters() if "positions" not in name]
    used = {"up_bias": model.config.num_experts_per_tok, "down_bias": model.config.num_experts_per_tok}
    vectors = sum(p.numel() for name, p in named if p.dim() < 2)
    return vectors + sum(p[0].numel() * used[name.split(".")[-1]] for name, p in named if name.endswith("_bias"))


@pytest.mark.parametrize(
    "name",
    ["demo", "char-tiny", "gpt2-124m", "dense-171m", "llama3-mini", "qwen3-mini", "mistral-mini", "moe-demo",
     "residual-moe-mini", "moe-876m", "mixtral-mini"],
)  # fmt: skip
@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_products(name, tied):
    arch, seq_len = toy_architecture(name, tie_word_embeddings=tied), 16
    model = build(arch, "cpu")
    ids = torch.randint(0, 70, (1, seq_len))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, shift_labels=ids).loss.backward()
    # The counter sees the whole square of attention, the prediction its causal half (the causal band of a window).
    square = 12 * arch.num_attention_heads * arch.head_dim * seq_len
    window = min(arch.sliding_window or seq_len, seq_len)
    hidden_part = 1 - (window - window**2 / (2 * seq_len)) / seq_len
    attention = arch.num_hidden_layers * square * hidden_part
    found = counter.get_total_flops() // seq_len + 6 * norm_parameters(model) - attention
    assert flops_per_token(arch, seq_len) == found


@pytest.mark.parametrize("name", ["moe-876m", "qwen3-moe-mini", "mixtral-mini"])
def test_flops_of_experts_are_those_of_a_dense_block_as_wide_as_the_active_ones(name):
    """A token's K experts of width H cost what a dense block of width K H costs, and the router its product."""
    arch = TOYS[name]
    wide = arch.num_experts_per_tok * arch.moe_intermediate_size
    dense = toy_architecture(name, mlp_layer_types=None, intermediate_size=wide, mlp_bias=False)
    experts, hidden, top = arch.num_experts, arch.hidden_size, arch.num_experts_per_tok
    routers = {"noisy_topk": 2 * (hidden * experts + experts)}.get(arch.router_type, hidden * experts)
    biases = top * (arch.moe_intermediate_size + hidden) if arch.mlp_bias else 0
    extra = 6 * arch.num_hidden_layers * (routers + biases)
    assert flops_per_token(arch, 16) == flops_per_token(dense, 16) + extra


@pytest.mark.parametrize("name", PRESETS)
def test_cache_bytes_are_those_of_a_filled_cache(name):
    arch = TOYS[name]
    model = build(arch, "cpu").eval().to(torch.bfloat16)
    for length in (1, 5, 20):
        cache = model(torch.ones(1, length, dtype=torch.long), use_cache=True).cache
        assert cache_bytes(arch, length) == sum(held_bytes(layer) for layer in cache.layers), length


def held_bytes(layer) -> int:
    """Every tensor a cache layer holds for tokens, not the whole storage a view stands in."""
    found = []
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        found += [x for x in (held.values() if isinstance(held, dict) else held if isinstance(held, list) else [held])]
    return sum(x.numel() * x.element_size() for x in found if isinstance(x, torch.Tensor))


def test_accounting_and_presets_do_not_import_torch():
    code = "import sys, minillm.settings.accounting, minillm.settings.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
