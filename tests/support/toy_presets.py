"""Every preset at toy size: the same mechanisms in the same pattern, small enough for fp32 on a CPU in milliseconds."""

from __future__ import annotations

import torch

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.architecture import Architecture
from minillm.settings.presets import PRESETS, preset

_SHRUNK = {
    "vocab_size": 101, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8,
    "max_position_embeddings": 64, "sliding_window": 8, "initializer_range": 0.2,
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_NO_DROPOUT = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "embedding_dropout": 0.0}


def toy_architecture(name: str, **changes: object) -> Architecture:
    """The preset, shrunk; without dropout, and wide initialisation so that attention is far from uniform."""
    arch = PRESETS[name]
    shrunk = {k: v for k, v in _SHRUNK.items() if arch[k] not in (None, 0) or k.endswith("_id")} | _NO_DROPOUT
    groups = arch.num_attention_heads // arch.num_key_value_heads
    heads = 6 if groups in (1, 2, 3, 6) else 8
    shrunk |= {"num_attention_heads": heads, "num_key_value_heads": heads // groups}
    if arch.attention_type == "mla":
        del shrunk["head_dim"]  # it follows from its two parts
    elif arch.partial_rotary_factor < 1:
        shrunk["head_dim"] = 16
    if arch.mlp_layer_types[0] == "dense" and arch.mlp_layer_types[1:3] == ["dense", "dense"] and arch.num_experts:
        shrunk["mlp_layer_types"] = {"first": ["dense"], "repeat": ["sparse"]}  # of four layers, three with experts
    return preset(name, **{**shrunk, **changes})


def toy_fields(name: str, **changes: object) -> dict[str, object]:
    """The same as the fields of a MiniLLMConfig."""
    return dict(toy_architecture(name, **changes))


def toy_model(preset: str, **changes: object) -> MiniLLMForCausalLM:
    """A toy of the preset, the same weights at every call, in training mode."""
    torch.manual_seed(0)
    return MiniLLMForCausalLM(MiniLLMConfig(**toy_fields(preset, **changes))).train()
