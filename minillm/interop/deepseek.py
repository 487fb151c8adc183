"""DeepSeek-V3: interleaved rotary rows, dense layers first, and shared experts counted in routed ones.

Its checkpoints keep the modules of multi-token prediction behind the last layer (model.layers.N.enorm, hnorm, eh_proj
and a layer, N from num_hidden_layers on). transformers' class has no place for them: they are left out both ways.
"""

from __future__ import annotations

from functools import partial

import torch

from minillm.interop.family import (
    ATTENTION_RULE,
    DENSE,
    PLAIN,
    SAME_NAMES,
    SPARSE,
    Family,
)
from minillm.interop.rotary_layout import interleaved_to_split, split_to_interleaved
from minillm.interop.weights import Rule
from minillm.settings.architecture import Architecture

NAMES = {
    **{ours: theirs for ours, theirs in SAME_NAMES.items() if ours != "head_dim"},
    **{
        name: name
        for name in (
            "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim moe_intermediate_size "
            "num_experts_per_tok n_group topk_group norm_topk_prob routed_scaling_factor"
        ).split()
    },
    "num_experts": "n_routed_experts",
}


def _read(config) -> dict[str, object]:
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    return {
        "mlp_layer_types": [DENSE] * dense + [SPARSE] * (config.num_hidden_layers - dense),
        "shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
        "num_key_value_heads": config.num_attention_heads,  # of the expanded keys; theirs ignores what it says
        "head_dim": config.qk_nope_head_dim + config.qk_rope_head_dim,
    }


def _write(arch: Architecture) -> dict[str, object]:
    values = {
        "q_lora_rank": arch.q_lora_rank,
        "first_k_dense_replace": arch.mlp_layer_types.count(DENSE),
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    }
    if SPARSE in arch.mlp_layer_types:
        values["n_shared_experts"] = arch.shared_expert_intermediate_size // arch.moe_intermediate_size
    return values


def _problems(arch: Architecture) -> list[str]:
    kinds, found = list(arch.mlp_layer_types), []
    if kinds != sorted(kinds):  # "dense" comes before "sparse"
        found.append("mlp_layer_types has a dense layer behind a sparse one")
    if SPARSE in kinds:
        shared, size = arch.shared_expert_intermediate_size, arch.moe_intermediate_size
        if shared == 0 or shared % size:
            found.append(
                f"shared_expert_intermediate_size is {shared}, not moe_intermediate_size ({size}) times a whole number"
            )
    return found


def _permute(permutation, kind: str, config, weight: torch.Tensor) -> list[torch.Tensor]:
    if not config.rope_interleave:
        return [weight]
    rotary = config.qk_rope_head_dim
    heads, width = {
        "query": (config.num_attention_heads, config.qk_nope_head_dim + rotary),
        "shared key": (1, config.kv_lora_rank + rotary),
    }[kind]
    return [permutation(weight, heads, width, rotary)]


def _rotary_rule(name: str, kind: str) -> Rule:
    return Rule.rename(
        f"model.layers.*.mixer.{name}.weight",
        f"model.layers.*.self_attn.{name}.weight",
        partial(_permute, split_to_interleaved, kind),
        partial(_permute, interleaved_to_split, kind),
    )


RULES = (
    _rotary_rule("q_proj", "query"),
    _rotary_rule("q_b_proj", "query"),
    _rotary_rule("kv_a_proj_with_mqa", "shared key"),
    ATTENTION_RULE,
    Rule.rename("model.layers.*.mlp.shared_expert.**", "model.layers.*.mlp.shared_experts.**"),
)


def _multi_token(config) -> tuple[str, ...]:
    first = config.num_hidden_layers
    return tuple(f"model.layers.{i}." for i in range(first, first + config.num_nextn_predict_layers))


DEEPSEEK_V3 = Family(
    "deepseek_v3", "DeepseekV3Config", "DeepseekV3ForCausalLM",
    names=NAMES,
    fixed={**PLAIN, "attention_type": "mla"},
    fixed_if_sparse={"router_type": "sigmoid", "shared_expert_gate": False},
    required={"hidden_act": "silu", "attention_bias": False},
    mlps=frozenset({DENSE, SPARSE}),
    read=_read,
    write=_write,
    carried=("mlp_layer_types", "shared_expert_intermediate_size", "head_dim"),
    problems=_problems,
    rules=lambda config: RULES,
    multi_token=_multi_token,
)  # fmt: skip
