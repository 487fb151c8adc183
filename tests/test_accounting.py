"""Predicted parameters, operations and cache bytes against built models, torch's own counter and a filled cache."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minillm.accounting import cache_bytes_per_token, flops_per_token, num_parameters
from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.presets import PRESETS

SMALL = {
    **PRESETS["demo"],
    "vocab_size": 70,
    "hidden_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "head_dim": 8,
    "intermediate_size": 56,
}


def build(fields: dict, device: str = "meta") -> MiniLLMForCausalLM:
    with torch.device(device):
        return MiniLLMForCausalLM(MiniLLMConfig(**fields))


@pytest.mark.parametrize("fields", [*PRESETS.values(), SMALL, {**SMALL, "tie_word_embeddings": False}])
def test_predicted_parameters_are_the_built_ones(fields):
    model, predicted = build(fields), num_parameters(fields)
    assert predicted["total"] == sum(p.numel() for p in model.parameters())
    embedding = {id(p): p.numel() for p in (model.model.embed_tokens.weight, model.lm_head.weight)}
    assert predicted["embedding"] == sum(embedding.values())
    assert predicted["non_embedding"] == predicted["total"] - predicted["embedding"]
    assert predicted["active"] == predicted["total"]


def test_published_counts():
    assert num_parameters(PRESETS["dense-26m"])["total"] == 25_829_888
    assert 1_000_000 <= num_parameters(PRESETS["demo"])["total"] <= 4_000_000


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_of_the_products(tied):
    fields, seq_len = {**SMALL, "tie_word_embeddings": tied}, 16
    model = build(fields, "cpu")
    ids = torch.randint(0, 70, (1, seq_len))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, shift_labels=ids).loss.backward()
    # The counter sees the whole square of attention, the prediction its causal half; norms are no products.
    norms = 6 * (2 * 2 + 1) * 40
    attention = 6 * 2 * (6 * 8) * seq_len
    assert flops_per_token(fields, seq_len) == counter.get_total_flops() // seq_len + norms - attention


def test_cache_bytes_are_those_of_a_filled_cache():
    cache = build(SMALL, "cpu").to(torch.bfloat16)(torch.ones(1, 5, dtype=torch.long), use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert cache_bytes_per_token(SMALL) == held // 5


def test_accounting_and_presets_do_not_import_torch():
    code = "import sys, minillm.accounting, minillm.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
