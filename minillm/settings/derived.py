"""Which fields of a preset follow from others when one of them is changed.

Contract: stdlib only. What a user gives stands as given. What only the preset says gives way: a field that nothing
reads any more goes back to its default, and a size that has to agree with another one follows it. What still does not
fit is for `problems_of` to name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minillm.settings.architecture import (
    DEFAULTS,
    EXPERT_FIELDS,
    EXPERT_OPTIONS,
    GQA_FIELDS,
    KINDS,
    LINEAR_FIELDS,
    MLA_FIELDS,
    ROTARY_FIELDS,
    SIGMOID_FIELDS,
    Architecture,
    form_problems,
)


def derive(preset: Mapping[str, Any], given: Mapping[str, Any]) -> Architecture:
    """The architecture of a preset with the fields in `given` changed, and with what follows from them.

    Args:
        preset: its fields; those it leaves out have their defaults.
        given: a user's, of the types that `coerce` makes.
    """
    arch = Architecture(**{**DEFAULTS, **preset, **given})
    if form_problems(arch):
        return arch
    fields = dict(arch)
    for follow in (_attention, _positions, _layers, _experts, _tokens):
        fields |= {name: value for name, value in follow(Architecture(**fields)).items() if name not in given}
    if "num_attention_heads" in given and "num_key_value_heads" not in given:
        fields["num_key_value_heads"] = _key_value_heads(Architecture(**{**DEFAULTS, **preset}), arch)
    return Architecture(**fields)


def _unread(names: tuple[str, ...] | list[str]) -> dict[str, Any]:
    return {name: DEFAULTS[name] for name in names}


def _key_value_heads(preset: Architecture, arch: Architecture) -> int:
    """One for each query head where the preset has it so, else the preset's number as far as it divides."""
    if arch.attention_type == "mla" or preset.num_key_value_heads == preset.num_attention_heads:
        return arch.num_attention_heads
    return math.gcd(arch.num_attention_heads, preset.num_key_value_heads)


def _attention(arch: Architecture) -> dict[str, Any]:
    if arch.attention_type != "mla":
        return _unread(("q_lora_rank", *MLA_FIELDS))
    follows = {**_unread(GQA_FIELDS), "num_key_value_heads": arch.num_attention_heads}
    if arch.qk_nope_head_dim and arch.qk_rope_head_dim:
        follows["head_dim"] = arch.qk_nope_head_dim + arch.qk_rope_head_dim
    return follows


def _positions(arch: Architecture) -> dict[str, Any]:
    return {} if arch.position_embedding_type == "rope" else _unread(ROTARY_FIELDS)


def _layers(arch: Architecture) -> dict[str, Any]:
    follows: dict[str, Any] = {}
    if "sliding_attention" not in arch.layer_types:
        follows |= _unread(("sliding_window",))
    if "linear_attention" not in arch.layer_types:
        follows |= _unread(LINEAR_FIELDS)
    if "sparse" not in arch.mlp_layer_types:
        follows |= _unread((*EXPERT_FIELDS, *EXPERT_OPTIONS))
    if not arch.num_nextn_predict_layers:
        follows |= _unread(("mtp_loss_coef",))
    if arch.mlp_type == "swiglu":
        follows |= {"hidden_act": "silu", "mlp_bias": False}
    return follows


def _experts(arch: Architecture) -> dict[str, Any]:
    experts, chosen = arch.num_experts, arch.num_experts_per_tok
    if "sparse" not in arch.mlp_layer_types or experts is None or chosen is None:
        return {}
    chosen = min(chosen, experts)
    follows: dict[str, Any] = {"num_experts_per_tok": chosen}
    if not arch.shared_expert_intermediate_size:
        follows |= _unread(("shared_expert_gate", "residual_moe"))
    if arch.router_type != "softmax":
        follows |= _unread(("router_noise",))
    if arch.router_type == "noisy_topk":
        follows["norm_topk_prob"] = True
    if arch.router_type != "sigmoid":
        return follows | _unread(SIGMOID_FIELDS)
    # Groups of equal size, of 2 experts or more (or one group), and enough of them for the experts of a token.
    groups = next(g for g in range(arch.n_group, 0, -1) if experts % g == 0 and (g == 1 or experts // g >= 2))
    needed = -(-chosen // (experts // groups))
    return follows | {"n_group": groups, "topk_group": min(groups, max(arch.topk_group, needed))}


def _tokens(arch: Architecture) -> dict[str, Any]:
    """Ids past the end of a smaller vocabulary become its last; a run's are its tokenizer's."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    past = [name for name in names if isinstance(arch[name], int) and arch[name] >= arch.vocab_size]
    return dict.fromkeys(past, arch.vocab_size - 1)


def coerce(name: str, value: Any) -> Any:
    """A field's value in the field's type where nothing is lost (8.0 is a whole number); otherwise as it is."""
    kind = KINDS[name]
    if kind.type not in (int, float) or isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return value
    try:
        number = float(value)
        return int(number) if kind.type is int and number == int(number) else number if kind.type is float else value
    except (ValueError, OverflowError):
        return value
