"""Qwen3-Next: layers of gated DeltaNet (`linear_attn` there) and of gated attention, and a gated shared expert."""

from __future__ import annotations

from minillm.interop.deltanet_layout import SAME_TENSORS, join_ba, join_qkvz, split_ba, split_qkvz
from minillm.interop.family import (
    DENSE,
    EXPERT_NAMES,
    FULL,
    LINEAR,
    PLAIN,
    SAME_NAMES,
    SPARSE,
    Family,
    read_sparse_layers,
    write_sparse_layers,
)
from minillm.interop.weights import Rule
from minillm.settings.architecture import Architecture

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


def _write(arch: Architecture) -> dict[str, object]:
    linear = {name: arch[name] for name in LINEAR_NAMES if arch[name] is not None}
    return {"layer_types": list(arch.layer_types), **linear, **write_sparse_layers(arch)}


def _problems(arch: Architecture) -> list[str]:
    if SPARSE in arch.mlp_layer_types and not arch[SHARED_EXPERT]:
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
            (f"{ours}.qkv_proj.weight", f"{ours}.z_proj.weight"),
            (f"{theirs}.in_proj_qkvz.weight",),
            lambda config, qkv, z: [join_qkvz(qkv, z, vars(config))],
            lambda config, qkvz: split_qkvz(qkvz, vars(config)),
        ),
        Rule(
            (f"{ours}.b_proj.weight", f"{ours}.a_proj.weight"),
            (f"{theirs}.in_proj_ba.weight",),
            lambda config, b, a: [join_ba(b, a, vars(config))],
            lambda config, ba: split_ba(ba, vars(config)),
        ),
        *(Rule.rename(f"{ours}.{our}", f"{theirs}.{their}") for our, their in SAME_TENSORS.items()),
    ]


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
    multi_token=lambda config: ("mtp.",),
)  # fmt: skip
