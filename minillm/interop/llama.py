"""Llama and the families that differ from it in an option: Mistral, Qwen3, and their mixtures of experts.

Weights have the same names and layouts but for the mixer (`self_attn` there); experts are fused in both.
"""

from __future__ import annotations

from minillm.interop.family import (
    DENSE,
    EXPERT_NAMES,
    FULL,
    PLAIN,
    SAME_NAMES,
    SLIDING,
    SOFTMAX_EXPERTS,
    SPARSE,
    Family,
    read_sparse_layers,
    read_window,
    same_mixer_everywhere,
    write_sparse_layers,
)
from minillm.settings.architecture import Architecture

ANY_BIAS = {name: value for name, value in PLAIN.items() if name != "attention_bias"}
BIAS = {"attention_bias": "attention_bias"}
ANY_WINDOW = frozenset({FULL, SLIDING})


def _llama_problems(arch: Architecture) -> list[str]:
    if arch.hidden_size % arch.num_attention_heads:
        return [
            f"hidden_size is {arch.hidden_size}: LlamaConfig wants a multiple of num_attention_heads "
            f"({arch.num_attention_heads})"
        ]
    return []


def _read_qwen3(config) -> dict[str, object]:
    sliding = SLIDING in config.layer_types
    return {"layer_types": list(config.layer_types), "sliding_window": config.sliding_window if sliding else None}


def _write_qwen3(arch: Architecture) -> dict[str, object]:
    window, kinds = arch.sliding_window, list(arch.layer_types)
    first = kinds.index(SLIDING) if window is not None else len(kinds)
    return {
        "layer_types": kinds,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": first,
    }


def _read_mixtral(config) -> dict[str, object]:
    return {
        **read_window(config),
        "mlp_layer_types": [SPARSE] * config.num_hidden_layers,
        "moe_intermediate_size": config.intermediate_size,
        "intermediate_size": config.intermediate_size,
    }


def _write_mixtral(arch: Architecture) -> dict[str, object]:
    return {"sliding_window": arch.sliding_window, "intermediate_size": arch.moe_intermediate_size}


def _write_qwen3_moe(arch: Architecture) -> dict[str, object]:
    window = arch.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window, **write_sparse_layers(arch)}


LLAMA = Family(
    "llama", "LlamaConfig", "LlamaForCausalLM",
    names={**SAME_NAMES, **BIAS},
    fixed=ANY_BIAS,
    required={"hidden_act": "silu", "mlp_bias": False},
    problems=_llama_problems,
)  # fmt: skip
MISTRAL = Family(
    "mistral", "MistralConfig", "MistralForCausalLM",
    names=SAME_NAMES,
    fixed=PLAIN,
    mixers=ANY_WINDOW,
    read=read_window,
    write=lambda arch: {"sliding_window": arch.sliding_window},
    carried=("sliding_window", "layer_types"),
    problems=same_mixer_everywhere,
)  # fmt: skip
QWEN3 = Family(
    "qwen3", "Qwen3Config", "Qwen3ForCausalLM",
    names={**SAME_NAMES, **BIAS},
    fixed={**ANY_BIAS, "qk_norm": True},
    mixers=ANY_WINDOW,
    read=_read_qwen3,
    write=_write_qwen3,
    carried=("sliding_window", "layer_types"),
)  # fmt: skip
MIXTRAL = Family(
    "mixtral", "MixtralConfig", "MixtralForCausalLM",
    names={**SAME_NAMES, "num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok",
           "router_aux_loss_coef": "router_aux_loss_coef"},
    fixed=PLAIN,
    fixed_if_sparse={**SOFTMAX_EXPERTS, "norm_topk_prob": True},
    required={"hidden_act": "silu", "router_jitter_noise": 0.0},
    mixers=ANY_WINDOW,
    mlps=frozenset({SPARSE}),
    read=_read_mixtral,
    write=_write_mixtral,
    carried=("sliding_window", "layer_types", "mlp_layer_types", "moe_intermediate_size"),
    problems=same_mixer_everywhere,
)  # fmt: skip
QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
    names={**SAME_NAMES, **BIAS, **EXPERT_NAMES, "norm_topk_prob": "norm_topk_prob",
           "router_aux_loss_coef": "router_aux_loss_coef"},
    fixed={**ANY_BIAS, "qk_norm": True},
    fixed_if_sparse=SOFTMAX_EXPERTS,
    mixers=ANY_WINDOW,
    mlps=frozenset({DENSE, SPARSE}),
    read=lambda config: {**read_window(config), **read_sparse_layers(config)},
    write=_write_qwen3_moe,
    carried=("sliding_window", "layer_types", "mlp_layer_types"),
    problems=same_mixer_everywhere,
)  # fmt: skip
