"""Norms, dense feed-forward blocks and grouped-query attention against transformers' classes with the same weights.

A row of MECHANISMS is one mechanism and the class that has it: outputs, and gradients of the input and of every
parameter, in fp32. Latent attention, gated DeltaNet and experts have files of their own; whole models are compared in
tests/interop/test_native_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

from minillm.models import MiniLLMConfig
from minillm.models.attention import GroupedQueryAttention, build_attention_mask
from minillm.models.mlp import build_dense_mlp
from minillm.models.normalization import NORMS, build_norm
from minillm.models.positions import ROPE_TYPES, RotaryEmbedding
from tests.support.parity import assert_same, outputs_and_gradients, randomise

SHAPE = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
         "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "vocab_size": 97, "num_hidden_layers": 1}  # fmt: skip
SCALINGS = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
Tensors = dict[str, torch.Tensor]


@dataclass
class Pair:
    """Our module and theirs, how each is called on [2, length, 48], and their tensors under our names."""

    ours: nn.Module
    theirs: nn.Module
    run_ours: Callable | None = None
    run_theirs: Callable | None = None
    renamed: Callable[[Tensors], Tensors] = dict
    length: int = 20
    spread: float = 0.2  # of the weights
    scale: float = 1.0  # of the input
    gradient: float = 1.0  # of the output's elements, at most


def norm(norm_type: str, theirs: nn.Module) -> Pair:
    config = MiniLLMConfig(hidden_size=48, norm_type=norm_type, rms_norm_eps=1e-3)
    return Pair(build_norm(config), theirs, spread=1.0, scale=0.05)  # so small an input that eps is felt


def swiglu() -> Pair:
    config = llama.LlamaConfig(**SHAPE, intermediate_size=80)
    return Pair(build_dense_mlp(MiniLLMConfig(hidden_size=48, mlp_type="swiglu"), 80), llama.LlamaMLP(config))


def gelu_mlp() -> Pair:
    config = MiniLLMConfig(hidden_size=48, mlp_type="mlp", mlp_bias=True, hidden_act="gelu_new")

    def renamed(theirs: Tensors) -> Tensors:
        ours = {name.replace("c_fc", "up_proj").replace("c_proj", "down_proj"): theirs[name] for name in theirs}
        return {name: turned(value) for name, value in ours.items()}

    theirs = GPT2MLP(64, GPT2Config(n_embd=48, resid_pdrop=0.0))
    return Pair(build_dense_mlp(config, 64), theirs, renamed=renamed)


def turned(value: torch.Tensor) -> torch.Tensor:
    """GPT-2's Conv1D holds its weight [in, out]."""
    return value.T if value.dim() == 2 else value


def causal(length: int, window: int | None = None) -> torch.Tensor:
    """The mask their eager attention adds to its scores."""
    hidden = torch.ones(length, length).triu(1).bool()
    if window is not None:
        hidden |= torch.ones(length, length).tril(-window).bool()
    return torch.zeros(length, length).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]


def attention(module, family: str, ours: dict | None = None, rope: dict | None = None, length=20, **theirs) -> Pair:
    """Rotary attention of the first layer; `ours`: fields by our names, `rope` and `theirs`: by those of the family."""
    heads = {name: theirs.pop(name) for name in SHAPE if name in theirs}
    mine = MiniLLMConfig(**{**SHAPE, **heads, "rope_theta": 500.0, **(ours or {})})
    rope = {"rope_theta": 500.0, "rope_type": "default", **(rope or {})}
    config = getattr(module, f"{family}Config")(**{**SHAPE, **heads}, rope_parameters=rope, pad_token_id=None, **theirs)
    config._attn_implementation = "eager"
    window = mine.sliding_window
    positions = torch.arange(3, 3 + length)[None].expand(2, length)
    layer, other = GroupedQueryAttention(mine, 0), getattr(module, f"{family}Attention")(config, 0)
    rotation, rotary = RotaryEmbedding(mine).rotation(positions), getattr(module, f"{family}RotaryEmbedding")(config)
    mask = build_attention_mask(length, torch.device("cpu"), sliding_window=window)
    return Pair(
        layer, other, lambda x: layer(x, rotation, mask),
        lambda x: other(x, rotary(x, positions), causal(length, window)), length=length,
    )  # fmt: skip


def scaled(rope_type: str) -> Pair:
    scaling = {"rope_type": rope_type, **SCALINGS[rope_type]}
    return attention(llama, "Llama", {"rope_scaling": scaling}, scaling)


def windowed(length: int) -> Pair:
    ours = {"layer_types": ["sliding_attention"], "sliding_window": 8}
    pair = attention(mistral, "Mistral", ours, length=length, sliding_window=8)
    return replace(pair, gradient=min(1.0, 20 / length))  # sums over so many rows round further apart


def gated() -> Pair:
    ours = {"qk_norm": True, "attention_output_gate": True, "norm_type": "zero_centered_rmsnorm",
            "partial_rotary_factor": 0.25}  # fmt: skip
    return attention(qwen3_next, "Qwen3Next", ours, {"partial_rotary_factor": 0.25}, layer_types=["full_attention"])


def gpt2_attention() -> Pair:
    fields = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}
    ours = GroupedQueryAttention(MiniLLMConfig(**fields, position_embedding_type="learned", attention_bias=True), 0)
    config = GPT2Config(n_embd=48, n_head=6, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="eager")
    theirs = GPT2Attention(config, layer_idx=0)

    def renamed(theirs: Tensors) -> Tensors:
        found = {f"o_proj.{part}": turned(theirs[f"c_proj.{part}"]) for part in ("weight", "bias")}
        for part in ("weight", "bias"):
            for name, rows in zip("qkv", turned(theirs[f"c_attn.{part}"]).split(48)):
                found[f"{name}_proj.{part}"] = rows
        return found

    return Pair(ours, theirs, None, lambda x: theirs(x, attention_mask=causal(20)), renamed)


MECHANISMS: dict[str, Callable[[], Pair]] = {
    "rmsnorm": lambda: norm("rmsnorm", llama.LlamaRMSNorm(48, eps=1e-3)),
    "zero_centered_rmsnorm": lambda: norm("zero_centered_rmsnorm", qwen3_next.Qwen3NextRMSNorm(48, eps=1e-3)),
    "layernorm": lambda: norm("layernorm", nn.LayerNorm(48, eps=1e-3)),  # GPT-2's
    "SwiGLU of Llama": swiglu,
    "MLP of GPT-2": gelu_mlp,
    "multi-head attention of Llama": lambda: attention(llama, "Llama", num_key_value_heads=6),
    "grouped queries of Llama": lambda: attention(llama, "Llama"),
    "multi-query attention of Llama": lambda: attention(llama, "Llama", num_key_value_heads=1),
    "biases of Llama": lambda: attention(llama, "Llama", {"attention_bias": True}, attention_bias=True),
    **{f"{rope_type} of Llama": lambda rope_type=rope_type: scaled(rope_type) for rope_type in SCALINGS},
    "norms on queries and keys of Qwen3": lambda: attention(qwen3, "Qwen3", {"qk_norm": True}),
    "a window longer than the row of Mistral": lambda: windowed(5),
    "a window of Mistral": lambda: windowed(20),
    "a window of Mistral, blocks of queries": lambda: windowed(300),
    "gate, partial rotary positions and zero-centred norms of Qwen3-Next": gated,
    "attention of GPT-2": gpt2_attention,
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_mechanism_equals_the_class_that_has_it(name):
    pair = MECHANISMS[name]()
    randomise(pair.theirs, pair.spread)
    pair.ours.load_state_dict(pair.renamed(pair.theirs.state_dict()), strict=True)
    x = torch.randn(2, pair.length, 48, generator=torch.Generator().manual_seed(2)) * pair.scale
    theirs = outputs_and_gradients(pair.theirs, x, pair.run_theirs, pair.gradient)
    ours = outputs_and_gradients(pair.ours, x, pair.run_ours, pair.gradient)
    both = {name: theirs.pop(name) for name in ("output", "input")}
    assert_same(ours, both | pair.renamed(theirs))


def test_every_norm_and_scaling_has_a_row():
    assert set(NORMS) <= set(MECHANISMS)
    assert set(SCALINGS) | {"default"} == set(ROPE_TYPES)
