"""What an architecture is made of, as data: every field with its default, the valid names, and the rules between them.

Contract: stdlib only, so that a dry run refuses an impossible shape in a second. `problems_of` names every broken rule
with field, value and fix; MiniLLMConfig raises them, and the run configuration lists them beside its own.
Field names are transformers' where transformers has one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

Fields = Mapping[str, object]

LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
MLP_LAYER_TYPES = ("dense", "sparse")
CHOICES: dict[str, tuple[str, ...]] = {
    "attention_type": ("gqa", "mla"),
    "mlp_type": ("swiglu", "mlp"),
    "norm_type": ("rmsnorm", "zero_centered_rmsnorm", "layernorm"),
    "position_embedding_type": ("rope", "learned", "sinusoidal"),
    "hidden_act": ("silu", "gelu", "gelu_new"),
    "router_type": ("softmax", "sigmoid", "noisy_topk"),
    "router_noise": ("none", "jitter", "rsample"),
}
# What each kind of rope_scaling needs beside `rope_type` and `factor`, and what it may have (transformers' names).
ROPE_SCALING: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "dynamic": ((), ("original_max_position_embeddings",)),
    "yarn": (
        ("original_max_position_embeddings",),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
    "llama3": (("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
}

DEFAULTS: dict[str, object] = {
    # shape
    "vocab_size": 6400,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "max_position_embeddings": 32_768,
    "layer_types": None,  # the mixer of each layer, one name a layer; None: full_attention everywhere
    "mlp_layer_types": None,  # dense or sparse for each layer; None: dense everywhere
    "tie_word_embeddings": True,
    # the class behind each part
    "attention_type": "gqa",
    "mlp_type": "swiglu",  # swiglu: gate, up, down; mlp: up, activation, down
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
    "hidden_act": "silu",
    # grouped-query attention
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": False,  # on q, k, v and o
    "qk_norm": False,  # a norm over each query and key head (Qwen3)
    "attention_output_gate": False,  # o_proj(attention * sigmoid(gate)) (Qwen3-Next)
    "sliding_window": None,  # tokens a sliding_attention layer sees, the query's own included
    # multi-head latent attention (DeepSeek-V2)
    "q_lora_rank": None,  # None: queries are not compressed
    "kv_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    # gated DeltaNet, the mixer of linear_attention layers
    "linear_num_key_heads": None,
    "linear_num_value_heads": None,
    "linear_key_head_dim": None,
    "linear_value_head_dim": None,
    "linear_conv_kernel_dim": None,
    # positions
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,  # {rope_type: linear | dynamic | yarn | llama3, factor: ..., ...}
    "partial_rotary_factor": 1.0,  # the part of each head that rotates
    # experts: sparse layers
    "num_experts": None,
    "num_experts_per_tok": None,
    "moe_intermediate_size": None,
    "shared_expert_intermediate_size": 0,  # 0: no shared expert
    "shared_expert_gate": False,  # scale the shared expert by sigmoid(a product of its own)
    "residual_moe": False,  # experts and shared expert weighted by two learned shares that add up to 1 (DeepSpeed)
    "router_type": "softmax",
    "router_noise": "none",  # softmax router in training: jitter on its input, or rsample: experts drawn by their odds
    "norm_topk_prob": True,  # the weights of a token's experts add up to 1
    "routed_scaling_factor": 1.0,
    "n_group": 1,  # sigmoid router: groups of experts, of which a token may use topk_group
    "topk_group": 1,
    # balancing: each term is off at 0
    "router_aux_loss_coef": 0.0,  # load balancing of Switch
    "router_importance_loss_coef": 0.0,  # KL divergence of the mean probabilities from uniform
    "router_z_loss_coef": 0.0,
    "router_sequence_loss_coef": 0.0,  # DeepSeek-V3's, over its normalised sigmoid scores
    "router_bias_update_speed": 0.0,  # DeepSeek-V3's balancing by biases, without a loss
    # multi-token prediction (DeepSeek-V3)
    "num_nextn_predict_layers": 0,
    "mtp_loss_coef": 0.3,
    # feed-forward, norms, dropout, initialisation
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,  # of either kind of norm
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,  # on what a mixer or MLP adds to the residual stream
    "embedding_dropout": 0.0,
    "initializer_range": 0.02,
    "scale_residual_init": False,  # initializer_range / sqrt(2 layers) for what adds to the residual stream (GPT-2)
    # tokens
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

_POSITIVE_INTEGERS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings n_group topk_group"
).split()
_POSITIVE = "rms_norm_eps initializer_range routed_scaling_factor".split()
_NOT_NEGATIVE = (
    "shared_expert_intermediate_size router_aux_loss_coef router_importance_loss_coef router_z_loss_coef "
    "router_sequence_loss_coef router_bias_update_speed num_nextn_predict_layers mtp_loss_coef"
).split()
_DROPOUTS = ("attention_dropout", "hidden_dropout", "embedding_dropout")
MLA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
LINEAR_FIELDS = tuple(name for name in DEFAULTS if name.startswith("linear_"))
_ROTARY = ("rope_scaling", "partial_rotary_factor")
EXPERT_OPTIONS = (
    "shared_expert_intermediate_size shared_expert_gate residual_moe router_type router_noise norm_topk_prob "
    "routed_scaling_factor n_group topk_group router_aux_loss_coef router_importance_loss_coef router_z_loss_coef "
    "router_sequence_loss_coef router_bias_update_speed"
).split()
EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def layer_types(fields: Fields) -> list[str]:
    """The mixer of each layer, spelled out."""
    return list(fields["layer_types"] or ["full_attention"] * fields["num_hidden_layers"])


def mlp_layer_types(fields: Fields) -> list[str]:
    """dense or sparse for each layer, spelled out."""
    return list(fields["mlp_layer_types"] or ["dense"] * fields["num_hidden_layers"])


def rotary_dim(fields: Fields) -> int:
    """The dimensions of a head that rotate: all, a part (partial_rotary_factor), or MLA's own rotary part."""
    if fields["attention_type"] == "mla":
        return fields["qk_rope_head_dim"]
    return int(fields["head_dim"] * fields["partial_rotary_factor"])


def problems_of(fields: Fields) -> list[str]:
    """Every rule that `fields` (all of DEFAULTS' names) breaks, one sentence each; later rules trust earlier ones."""
    for rules in (_types, _layers, _shapes):
        if problems := rules(fields):
            return problems
    return []


def context_problems(overrides: Fields) -> list[str]:
    """What is wrong with those fields alone that may differ from the weights a run starts with."""
    return _types({**DEFAULTS, **{name: value for name, value in overrides.items() if name in DEFAULTS}})


def _is_number(value: object, integer: bool = False) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if integer else (int, float)) and math.isfinite(value)


def _types(fields: Fields) -> list[str]:
    problems = []
    for names, integer, rule, holds in (
        (_POSITIVE_INTEGERS, True, "a whole number above 0", lambda x: x > 0),
        (_POSITIVE, False, "a number above 0", lambda x: x > 0),
        (("partial_rotary_factor",), False, "a part of the head, above 0 and at most 1", lambda x: 0 < x <= 1),
        (("rope_theta",), False, "a number above 1", lambda x: x > 1),
        (_NOT_NEGATIVE, False, "a number, 0 or more", lambda x: x >= 0),
        (_DROPOUTS, False, "a probability, from 0 to below 1", lambda x: 0 <= x < 1),
    ):
        for name in names:
            if not _is_number(fields[name], integer) or not holds(fields[name]):
                problems.append(f"{name} is {fields[name]!r}: it must be {rule}")
    for name in ("q_lora_rank", *MLA_FIELDS, *LINEAR_FIELDS, *EXPERT_FIELDS, "sliding_window"):
        value = fields[name]
        if value is not None and (not _is_number(value, integer=True) or value <= 0):
            problems.append(f"{name} is {value!r}: it must be a whole number above 0, or null where it is not used")
    for name, valid in CHOICES.items():
        if fields[name] not in valid:
            problems.append(f"{name} is {fields[name]!r}: valid names are {', '.join(valid)}")
    for name, default in DEFAULTS.items():
        if isinstance(default, bool) and not isinstance(fields[name], bool):
            problems.append(f"{name} is {fields[name]!r}: it must be true or false")
    return problems + _rope_scaling(fields["rope_scaling"])


def _rope_scaling(scaling: object) -> list[str]:
    if scaling is None:
        return []
    if not isinstance(scaling, Mapping):
        return [f"rope_scaling is {scaling!r}: it must be null or a mapping with rope_type and factor"]
    kind = scaling.get("rope_type")
    if not isinstance(kind, str) or kind not in ROPE_SCALING:
        names = ", ".join(ROPE_SCALING)
        return [f"rope_scaling: rope_type is {kind!r}: valid names are {names} (and null in its place for none)"]
    needed, optional = ROPE_SCALING[kind]
    problems = [f"rope_scaling: {kind} needs {name}" for name in ("factor", *needed) if name not in scaling]
    known = {"rope_type", "factor", *needed, *optional}
    problems += [f"rope_scaling: {kind} does not know {name}" for name in sorted(map(str, set(scaling) - known))]
    for name, value in scaling.items():
        if name not in ("rope_type", "truncate") and name in known and not (_is_number(value) and value > 0):
            problems.append(f"rope_scaling: {name} is {value!r}: it must be a number above 0")
    if not problems and scaling["factor"] < 1:
        problems.append(f"rope_scaling: factor is {scaling['factor']}: it stretches the context, so it is 1 or more")
    if not problems and kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        problems.append(
            f"rope_scaling: low_freq_factor is {scaling['low_freq_factor']}: it must be below high_freq_factor "
            f"({scaling['high_freq_factor']})"
        )
    return problems


def _layers(fields: Fields) -> list[str]:
    problems = []
    for name, valid in (("layer_types", LAYER_TYPES), ("mlp_layer_types", MLP_LAYER_TYPES)):
        values = fields[name]
        if values is None:
            continue
        if isinstance(values, str) or not isinstance(values, (list, tuple)):
            problems.append(f"{name} is {values!r}: it must be a list with one name for each layer")
            continue
        if len(values) != fields["num_hidden_layers"]:
            problems.append(
                f"{name} names {len(values)} layers: it must name num_hidden_layers ({fields['num_hidden_layers']}); "
                f"give it too (null: all of them {'full_attention' if name == 'layer_types' else 'dense'})"
            )
        for value in sorted({str(v) for v in values} - set(valid)):
            problems.append(f"{name} holds {value!r}: valid names are {', '.join(valid)}")
    return problems


def _shapes(fields: Fields) -> list[str]:
    problems = []
    kinds, mlps = set(layer_types(fields)), set(mlp_layer_types(fields))
    if fields["num_attention_heads"] % fields["num_key_value_heads"]:
        problems.append(
            f"num_key_value_heads is {fields['num_key_value_heads']}: it must divide num_attention_heads "
            f"({fields['num_attention_heads']}), because each key/value head serves an equal group of query heads"
        )
    if ("sliding_attention" in kinds) != (fields["sliding_window"] is not None):
        problems.append(
            f"sliding_window is {fields['sliding_window']}: sliding_attention layers need it, and nothing else reads it"
        )
    if fields["sliding_window"] == 1:
        problems.append("sliding_window is 1: a token would see itself alone; it must be 2 or more")
    if fields["mlp_type"] == "swiglu" and fields["hidden_act"] != "silu":
        problems.append(f"hidden_act is {fields['hidden_act']!r}: swiglu is gated by silu; the others go with mlp")
    if fields["mlp_type"] == "swiglu" and fields["mlp_bias"]:
        problems.append("mlp_bias is true: swiglu has no biases; they go with mlp_type mlp")
    if fields["attention_type"] == "mla":
        problems += _mla(fields, kinds)
    elif extra := [name for name in ("q_lora_rank", *MLA_FIELDS) if fields[name] is not None]:
        problems.append(f"{', '.join(extra)}: only attention_type mla reads them; leave them null")
    if fields["position_embedding_type"] != "rope":
        problems += _unread(fields, _ROTARY, "position_embedding_type rope")
    elif rotary_dim(fields) is not None and (rotary_dim(fields) % 2 or not rotary_dim(fields)):
        problems.append(
            f"head_dim is {fields['head_dim']}, of which {rotary_dim(fields)} dimensions rotate: rotary positions turn "
            f"pairs, so that number must be even and above 0"
        )
    elif rotary_dim(fields) == 2 and (fields["rope_scaling"] or {}).get("rope_type") == "dynamic":
        problems.append("rope_scaling: dynamic needs more than 2 rotating dimensions, its exponent is R / (R - 2)")
    if "linear_attention" in kinds:
        problems += _linear(fields)
    elif extra := [name for name in LINEAR_FIELDS if fields[name] is not None]:
        problems.append(f"{', '.join(extra)}: only linear_attention layers read them; leave them null")
    if "sparse" in mlps:
        problems += _experts(fields)
    else:
        problems += _unread(fields, (*EXPERT_FIELDS, *EXPERT_OPTIONS), "sparse layers (mlp_layer_types)")
    if not fields["num_nextn_predict_layers"]:
        problems += _unread(fields, ("mtp_loss_coef",), "num_nextn_predict_layers above 0")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = fields[name]
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < fields["vocab_size"]:
                problems.append(f"{name} is {token}: it must lie in the vocabulary, 0 to {fields['vocab_size'] - 1}")
    return problems


def _unread(fields: Fields, names: tuple[str, ...], reader: str) -> list[str]:
    """Fields that nothing would read, and that are not at their defaults."""
    return [
        f"{name} is {fields[name]!r}: only {reader} reads it; leave it at {DEFAULTS[name]!r}"
        for name in names
        if fields[name] != DEFAULTS[name]
    ]


def _mla(fields: Fields, kinds: set[str]) -> list[str]:
    problems = [f"{name} is null: attention_type mla needs it" for name in MLA_FIELDS if fields[name] is None]
    if "sliding_attention" in kinds:
        problems.append("layer_types holds 'sliding_attention': mla has no sliding window; use full_attention, or gqa")
    if fields["position_embedding_type"] != "rope":
        problems.append(f"position_embedding_type is {fields['position_embedding_type']!r}: mla needs rope")
    problems += _unread(
        fields, ("attention_bias", "qk_norm", "attention_output_gate", "partial_rotary_factor"), "attention_type gqa"
    )
    if fields["num_key_value_heads"] != fields["num_attention_heads"]:
        problems.append(
            f"num_key_value_heads is {fields['num_key_value_heads']}: mla has one key and value for each of the "
            f"{fields['num_attention_heads']} heads, so the two must be equal"
        )
    if not problems and fields["head_dim"] != fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"]:
        problems.append(
            f"head_dim is {fields['head_dim']}: with mla it is qk_nope_head_dim + qk_rope_head_dim "
            f"({fields['qk_nope_head_dim'] + fields['qk_rope_head_dim']})"
        )
    return problems


def _linear(fields: Fields) -> list[str]:
    problems = [f"{name} is null: linear_attention layers need it" for name in LINEAR_FIELDS if fields[name] is None]
    if not problems and fields["linear_num_value_heads"] % fields["linear_num_key_heads"]:
        problems.append(
            f"linear_num_key_heads is {fields['linear_num_key_heads']}: it must divide linear_num_value_heads "
            f"({fields['linear_num_value_heads']}), because each key head serves an equal group of value heads"
        )
    if set(layer_types(fields)) == {"linear_attention"}:
        # A cache of recurrent states alone does not know how many tokens it has seen, which `generate` asks.
        problems.append("layer_types holds linear_attention alone: one layer or more must be of another type")
    return problems


def _experts(fields: Fields) -> list[str]:
    problems = [f"{name} is null: sparse layers need it" for name in EXPERT_FIELDS if fields[name] is None]
    if problems:
        return problems
    experts, top, groups = fields["num_experts"], fields["num_experts_per_tok"], fields["n_group"]
    if fields["shared_expert_gate"] and not fields["shared_expert_intermediate_size"]:
        problems.append("shared_expert_gate is true: there is no shared expert (shared_expert_intermediate_size is 0)")
    if fields["residual_moe"] and not fields["shared_expert_intermediate_size"]:
        problems.append("residual_moe is true: there is no shared expert (shared_expert_intermediate_size is 0)")
    if fields["residual_moe"] and fields["shared_expert_gate"]:
        problems.append("shared_expert_gate is true: residual_moe weights the shared expert already; choose one")
    if fields["router_noise"] != "none" and fields["router_type"] != "softmax":
        problems.append(
            f"router_noise is {fields['router_noise']!r}: only router_type softmax has it; leave it at 'none'"
        )
    if fields["router_type"] == "noisy_topk" and not fields["norm_topk_prob"]:
        problems.append("norm_topk_prob is false: noisy_topk takes a softmax over the chosen, which adds up to 1")
    if top > experts:
        problems.append(f"num_experts_per_tok is {top}: there are only {experts} experts (num_experts)")
    if fields["router_type"] != "sigmoid":
        for name, off in (("n_group", 1), ("topk_group", 1), ("router_bias_update_speed", 0.0),
                          ("router_sequence_loss_coef", 0.0)):  # fmt: skip
            if fields[name] != off:
                problems.append(f"{name} is {fields[name]}: only router_type sigmoid has it; leave it at {off}")
    elif experts % groups:
        problems.append(f"n_group is {groups}: it must divide num_experts ({experts}) into equal groups")
    elif fields["topk_group"] > groups:
        problems.append(f"topk_group is {fields['topk_group']}: there are only {groups} groups (n_group)")
    elif groups > 1 and experts // groups < 2:
        problems.append(f"n_group is {groups}: a group needs 2 experts or more, its score is that of its best two")
    elif top > experts // groups * fields["topk_group"]:
        problems.append(
            f"num_experts_per_tok is {top}: topk_group {fields['topk_group']} of {groups} groups leaves "
            f"{experts // groups * fields['topk_group']} experts to choose from"
        )
    return problems
