"""Qwen3-Next: layers of gated DeltaNet (`linear_attn` there) and of gated attention, and a gated shared expert."""

from __future__ import annotations

import torch

from minillm.interop.family import (
    DENSE,
    EXPERT_NAMES,
    FULL,
    LINEAR,
    PLAIN,
    SAME_NAMES,
    SPARSE,
    Family,
    Fields,
    read_sparse_layers,
    write_sparse_layers,
)
from minillm.interop.weights import Rule

LINEAR_NAMES = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
FIXED = {
    **{name: value for name, value in PLAIN.items() if name not in ("attention_bias", "partial_rotary_factor")},
    "norm_type": "zero_centered_rmsnorm",
    "qk_norm": True,
    "attention_output_gate": True,
}
SHARED_EXPERT = "shared_expert_intermediate_size"


def _read(config) -> dict[str, object]:
    values = {"layer_types": list(config.layer_types), **read_sparse_layers(config)}
    if LINEAR in config.layer_types:
        values |= {name: getattr(config, name) for name in LINEAR_NAMES}
    return values


def _write(fields: Fields) -> dict[str, object]:
    linear = {name: fields[name] for name in LINEAR_NAMES if fields[name] is not None}
    return {"layer_types": list(fields["layer_types"]), **linear, **write_sparse_layers(fields)}


def _problems(fields: Fields) -> list[str]:
    if SPARSE in fields["mlp_layer_types"] and not fields[SHARED_EXPERT]:
        return [f"{SHARED_EXPERT} is 0: every sparse layer there has a shared expert"]
    return []


def _rules(config) -> list[Rule]:
    """o_proj is part of both mixers here, and there only of attention: each layer has rules of its own."""
    return [rule for layer, kind in enumerate(config.layer_types) for rule in _rules_of_layer(layer, kind)]


def _rules_of_layer(layer: int, kind: str) -> list[Rule]:
    ours, theirs = f"model.layers.{layer}.mixer", f"model.layers.{layer}"
    if kind == FULL:
        return [Rule.rename(f"{ours}.**", f"{theirs}.self_attn.**")]
    theirs = f"{theirs}.linear_attn"
    return [
        Rule(
            tuple(f"{ours}.{name}.weight" for name in ("qkv_proj", "z_proj", "b_proj", "a_proj")),
            tuple(f"{theirs}.{name}.weight" for name in ("in_proj_qkvz", "in_proj_ba")),
            _group,
            _ungroup,
        ),
        Rule.rename(f"{ours}.conv.weight", f"{theirs}.conv1d.weight"),
        Rule.rename(f"{ours}.o_proj.weight", f"{theirs}.out_proj.weight"),
        Rule.rename(f"{ours}.**", f"{theirs}.**"),
    ]


def _group(config, qkv: torch.Tensor, z: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> list[torch.Tensor]:
    keys, key_width = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    q, k, v = qkv.split((key_width, key_width, z.shape[0]))
    by_head = lambda *parts: torch.cat([x.unflatten(0, (keys, -1)) for x in parts], dim=1).flatten(0, 1)  # noqa: E731
    return [by_head(q, k, v, z), by_head(b, a)]


def _ungroup(config, qkvz: torch.Tensor, ba: torch.Tensor) -> list[torch.Tensor]:
    keys, key = config.linear_num_key_heads, config.linear_key_head_dim
    values = config.linear_num_value_heads // keys
    value = values * config.linear_value_head_dim
    q, k, v, z = (x.flatten(0, 1) for x in qkvz.unflatten(0, (keys, -1)).split((key, key, value, value), dim=1))
    b, a = (x.flatten(0, 1) for x in ba.unflatten(0, (keys, -1)).split((values, values), dim=1))
    return [torch.cat((q, k, v)), z, b, a]


QWEN3_NEXT = Family(
    "qwen3_next", "Qwen3NextConfig", "Qwen3NextForCausalLM",
    names={**SAME_NAMES, **EXPERT_NAMES, "attention_bias": "attention_bias", "norm_topk_prob": "norm_topk_prob",
           SHARED_EXPERT: SHARED_EXPERT, "router_aux_loss_coef": "router_aux_loss_coef"},
    fixed=FIXED,
    fixed_if_sparse={"router_type": "softmax", "routed_scaling_factor": 1.0, "shared_expert_gate": True},
    mixers=frozenset({FULL, LINEAR}),
    mlps=frozenset({DENSE, SPARSE}),
    read=_read,
    write=_write,
    carried=("layer_types", "mlp_layer_types", "partial_rotary_factor", *LINEAR_NAMES),
    problems=_problems,
    rules=_rules,
)  # fmt: skip
