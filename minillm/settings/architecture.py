"""What an architecture is made of: every field with its type, its default and its meaning, and the rules between them.

Contract: stdlib only, so that a dry run refuses an impossible shape in a second, and so that an exported model can
carry this file. `problems_of` names every broken rule with field, value and fix; MiniLLMConfig raises them, and the run
configuration lists them beside its own. Field names are transformers' where transformers has one. Which fields follow
from others where a preset is changed is in minillm/settings/derived.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class Rule(NamedTuple):
    """What a number has to be."""

    text: str
    holds: Callable[[float], bool]


Count = Annotated[int, Rule("a whole number above 0", lambda x: x > 0)]
NotNegative = Annotated[float, Rule("a number, 0 or more", lambda x: x >= 0)]
WholeNotNegative = Annotated[int, Rule("a whole number, 0 or more", lambda x: x >= 0)]
Positive = Annotated[float, Rule("a number above 0", lambda x: x > 0)]
Probability = Annotated[float, Rule("a probability, from 0 to below 1", lambda x: 0 <= x < 1)]
Share = Annotated[float, Rule("a part of the head, above 0 and at most 1", lambda x: 0 < x <= 1)]
AboveOne = Annotated[float, Rule("a number above 1", lambda x: x > 1)]

LAYER_TYPES = ("full_attention", "sliding_attention", "linear_attention")
MLP_LAYER_TYPES = ("dense", "sparse")
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


@dataclasses.dataclass(frozen=True)
class Architecture(Mapping):
    """One decoder. It is a mapping too, for `MiniLLMConfig(**PRESETS["demo"])`.

    `layer_types` and `mlp_layer_types` may be given as null (all layers alike), as a list with one name a layer, or as
    a rule for any number of layers, {"first": [...], "repeat": [...]}; here they are lists.
    """

    # shape
    vocab_size: Count = 6400
    hidden_size: Count = 512
    intermediate_size: Count = 1408
    num_hidden_layers: Count = 8
    max_position_embeddings: Count = 32_768
    layer_types: list[str] | None = None  # the mixer of each layer, one name a layer; None: full_attention everywhere
    mlp_layer_types: list[str] | None = None  # dense or sparse for each layer; None: dense everywhere
    tie_word_embeddings: bool = True
    # the class behind each part
    attention_type: Literal["gqa", "mla"] = "gqa"
    mlp_type: Literal["swiglu", "mlp"] = "swiglu"  # swiglu: gate, up, down; mlp: up, activation, down
    norm_type: Literal["rmsnorm", "zero_centered_rmsnorm", "layernorm"] = "rmsnorm"
    position_embedding_type: Literal["rope", "learned", "sinusoidal"] = "rope"
    hidden_act: Literal["silu", "gelu", "gelu_new"] = "silu"
    # grouped-query attention
    num_attention_heads: Count = 8
    num_key_value_heads: Count = 2
    head_dim: Count = 64
    attention_bias: bool = False  # on q, k, v and o
    qk_norm: bool = False  # a norm over each query and key head (Qwen3)
    attention_output_gate: bool = False  # o_proj(attention * sigmoid(gate)) (Qwen3-Next)
    sliding_window: Count | None = None  # tokens a sliding_attention layer sees, the query's own included
    # multi-head latent attention (DeepSeek-V2)
    q_lora_rank: Count | None = None  # None: queries are not compressed
    kv_lora_rank: Count | None = None
    qk_nope_head_dim: Count | None = None
    qk_rope_head_dim: Count | None = None
    v_head_dim: Count | None = None
    # gated DeltaNet, the mixer of linear_attention layers
    linear_num_key_heads: Count | None = None
    linear_num_value_heads: Count | None = None
    linear_key_head_dim: Count | None = None
    linear_value_head_dim: Count | None = None
    linear_conv_kernel_dim: Count | None = None
    # positions
    rope_theta: AboveOne = 1_000_000.0
    rope_scaling: dict[str, Any] | None = None  # {rope_type: linear | dynamic | yarn | llama3, factor: ..., ...}
    partial_rotary_factor: Share = 1.0  # the part of each head that rotates
    # experts: sparse layers
    num_experts: Count | None = None
    num_experts_per_tok: Count | None = None
    moe_intermediate_size: Count | None = None
    shared_expert_intermediate_size: WholeNotNegative = 0  # 0: no shared expert
    shared_expert_gate: bool = False  # scale the shared expert by sigmoid(a product of its own)
    residual_moe: bool = False  # experts and shared expert weighted by two learned shares that add up to 1 (DeepSpeed)
    router_type: Literal["softmax", "sigmoid", "noisy_topk"] = "softmax"
    # softmax router in training: jitter on its input, or rsample: experts drawn by their odds
    router_noise: Literal["none", "jitter", "rsample"] = "none"
    norm_topk_prob: bool = True  # the weights of a token's experts add up to 1
    routed_scaling_factor: Positive = 1.0
    n_group: Count = 1  # sigmoid router: groups of experts, of which a token may use topk_group
    topk_group: Count = 1
    # balancing: each term is off at 0
    router_aux_loss_coef: NotNegative = 0.0  # load balancing of Switch
    router_importance_loss_coef: NotNegative = 0.0  # KL divergence of the mean probabilities from uniform
    router_z_loss_coef: NotNegative = 0.0
    router_sequence_loss_coef: NotNegative = 0.0  # DeepSeek-V3's, over its normalised sigmoid scores
    router_bias_update_speed: NotNegative = 0.0  # DeepSeek-V3's balancing by biases, without a loss
    # multi-token prediction (DeepSeek-V3)
    num_nextn_predict_layers: WholeNotNegative = 0
    mtp_loss_coef: NotNegative = 0.3
    # feed-forward, norms, dropout, initialisation
    mlp_bias: bool = False
    rms_norm_eps: Positive = 1e-5  # of either kind of norm
    attention_dropout: Probability = 0.0
    hidden_dropout: Probability = 0.0  # on what a mixer or MLP adds to the residual stream
    embedding_dropout: Probability = 0.0
    initializer_range: Positive = 0.02
    scale_residual_init: bool = False  # initializer_range / sqrt(2 layers) for what adds to the residual stream (GPT-2)
    # tokens
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self) -> None:
        for name, usual in (("layer_types", "full_attention"), ("mlp_layer_types", "dense")):
            spelled_out = expand_layers(getattr(self, name), self.num_hidden_layers, usual)
            object.__setattr__(self, name, spelled_out)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(DEFAULTS)

    def __len__(self) -> int:
        return len(DEFAULTS)


def expand_layers(stated: Any, num_layers: int, usual: str) -> Any:
    """One name for each layer.

    Args:
        stated: null, a list (taken as it is), or {"first": [...], "repeat": [...]}: the first layers, then the repeated
            ones until `num_layers` are there. At least one round of `repeat` fits: where there is no room for all of
            `first`, it is cut, and of a longer `repeat` its end remains.
        usual: the name that null stands for.

    Returns:
        The list; `stated` where it is none of these, for `problems_of` to name it.
    """
    if isinstance(stated, tuple):
        return list(stated)
    if not _is_number(num_layers, integer=True) or num_layers < 1:
        return stated
    rule = {"repeat": [usual]} if stated is None else stated
    if not isinstance(rule, Mapping) or set(rule) - {"first", "repeat"}:
        return stated
    first, repeat = rule.get("first") or [], rule.get("repeat")
    if not isinstance(first, list) or not isinstance(repeat, list) or not repeat:
        return stated
    repeat = repeat[-num_layers:]
    first = first[: num_layers - len(repeat)]
    rounds = -(-(num_layers - len(first)) // len(repeat))
    return [*first, *repeat * rounds][:num_layers]


DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Architecture)}


class Kind(NamedTuple):
    """What the values of a field may be, read from its annotation."""

    type: Any  # bool, int, float, str, or what `problems_of` looks at elsewhere
    rule: Rule | None
    choices: tuple[str, ...]
    optional: bool


def _kind(annotation: Any) -> Kind:
    optional = False
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        optional, annotation = len(parts) < len(get_args(annotation)), parts[0] if len(parts) == 1 else object
    if get_origin(annotation) is Literal:
        return Kind(str, None, get_args(annotation), optional)
    if get_origin(annotation) is Annotated:
        kind, rule = get_args(annotation)
        return Kind(kind, rule, (), optional)
    return Kind(annotation, None, (), optional)


KINDS: dict[str, Kind] = {
    name: _kind(annotation) for name, annotation in get_type_hints(Architecture, include_extras=True).items()
}

MLA_FIELDS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
LINEAR_FIELDS = tuple(name for name in DEFAULTS if name.startswith("linear_"))
ROTARY_FIELDS = ("rope_scaling", "partial_rotary_factor")
GQA_FIELDS = ("attention_bias", "qk_norm", "attention_output_gate", "partial_rotary_factor")
SIGMOID_FIELDS = ("n_group", "topk_group", "router_bias_update_speed", "router_sequence_loss_coef")
EXPERT_OPTIONS = (
    "shared_expert_intermediate_size shared_expert_gate residual_moe router_type router_noise norm_topk_prob "
    "routed_scaling_factor n_group topk_group router_aux_loss_coef router_importance_loss_coef router_z_loss_coef "
    "router_sequence_loss_coef router_bias_update_speed"
).split()
EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


def rotary_dim(arch: Architecture) -> int:
    """The dimensions of a head that rotate: all, a part (partial_rotary_factor), or MLA's own rotary part."""
    if arch.attention_type == "mla":
        return arch.qk_rope_head_dim
    return int(arch.head_dim * arch.partial_rotary_factor)


def problems_of(arch: Architecture) -> list[str]:
    """Every rule that `arch` breaks, one sentence each; later rules trust earlier ones."""
    return form_problems(arch) or _shapes(arch)


def form_problems(arch: Architecture) -> list[str]:
    """Values of another type or outside their own range, and lists of layers of another length."""
    return _types(arch) or _layers(arch)


def _is_number(value: object, integer: bool = False) -> bool:
    return not isinstance(value, bool) and isinstance(value, int if integer else (int, float)) and math.isfinite(value)


def _types(arch: Architecture) -> list[str]:
    problems = []
    for name, kind in KINDS.items():
        value = arch[name]
        if kind.optional and value is None:
            continue
        if kind.rule and not (_is_number(value, kind.type is int) and kind.rule.holds(value)):
            unused = ", or null where it is not used" if kind.optional else ""
            problems.append(f"{name} is {value!r}: it must be {kind.rule.text}{unused}")
        if kind.choices and value not in kind.choices:
            problems.append(f"{name} is {value!r}: valid names are {', '.join(kind.choices)}")
        if kind.type is bool and not isinstance(value, bool):
            problems.append(f"{name} is {value!r}: it must be true or false")
    return problems + _rope_scaling(arch.rope_scaling)


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


def _layers(arch: Architecture) -> list[str]:
    problems = []
    for name, valid in (("layer_types", LAYER_TYPES), ("mlp_layer_types", MLP_LAYER_TYPES)):
        values = arch[name]
        if not isinstance(values, list):
            problems.append(
                f"{name} is {values!r}: it must be a list with one name for each layer, or a rule for any number of "
                f"them, {{first: [...], repeat: [...]}}"
            )
            continue
        if len(values) != arch.num_hidden_layers:
            problems.append(
                f"{name} names {len(values)} layers: it must name num_hidden_layers ({arch.num_hidden_layers}); give "
                f"that too, or a rule, {{first: [...], repeat: [...]}}"
            )
        for value in sorted({str(v) for v in values} - set(valid)):
            problems.append(f"{name} holds {value!r}: valid names are {', '.join(valid)}")
    return problems


def _shapes(arch: Architecture) -> list[str]:
    problems = []
    kinds, mlps = set(arch.layer_types), set(arch.mlp_layer_types)
    if arch.num_attention_heads % arch.num_key_value_heads:
        problems.append(
            f"num_key_value_heads is {arch.num_key_value_heads}: it must divide num_attention_heads "
            f"({arch.num_attention_heads}), because each key/value head serves an equal group of query heads"
        )
    if ("sliding_attention" in kinds) != (arch.sliding_window is not None):
        problems.append(
            f"sliding_window is {arch.sliding_window}: sliding_attention layers need it, and nothing else reads it"
        )
    if arch.sliding_window == 1:
        problems.append("sliding_window is 1: a token would see itself alone; it must be 2 or more")
    if arch.mlp_type == "swiglu" and arch.hidden_act != "silu":
        problems.append(f"hidden_act is {arch.hidden_act!r}: swiglu is gated by silu; the others go with mlp")
    if arch.mlp_type == "swiglu" and arch.mlp_bias:
        problems.append("mlp_bias is true: swiglu has no biases; they go with mlp_type mlp")
    if arch.attention_type == "mla":
        problems += _mla(arch, kinds)
    elif extra := [name for name in ("q_lora_rank", *MLA_FIELDS) if arch[name] is not None]:
        problems.append(f"{', '.join(extra)}: only attention_type mla reads them; leave them null")
    if arch.position_embedding_type != "rope":
        problems += _unread(arch, ROTARY_FIELDS, "position_embedding_type rope")
    elif rotary_dim(arch) is not None and (rotary_dim(arch) % 2 or not rotary_dim(arch)):
        problems.append(
            f"head_dim is {arch.head_dim}, of which {rotary_dim(arch)} dimensions rotate: rotary positions turn "
            f"pairs, so that number must be even and above 0"
        )
    elif rotary_dim(arch) == 2 and (arch.rope_scaling or {}).get("rope_type") == "dynamic":
        problems.append("rope_scaling: dynamic needs more than 2 rotating dimensions, its exponent is R / (R - 2)")
    if "linear_attention" in kinds:
        problems += _linear(arch)
    elif extra := [name for name in LINEAR_FIELDS if arch[name] is not None]:
        problems.append(f"{', '.join(extra)}: only linear_attention layers read them; leave them null")
    if "sparse" in mlps:
        problems += _experts(arch)
    else:
        problems += _unread(arch, (*EXPERT_FIELDS, *EXPERT_OPTIONS), "sparse layers (mlp_layer_types)")
    if not arch.num_nextn_predict_layers:
        problems += _unread(arch, ("mtp_loss_coef",), "num_nextn_predict_layers above 0")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = arch[name]
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not 0 <= token < arch.vocab_size:
                problems.append(f"{name} is {token}: it must lie in the vocabulary, 0 to {arch.vocab_size - 1}")
    return problems


def _unread(arch: Architecture, names: tuple[str, ...], reader: str) -> list[str]:
    """Fields that nothing would read, and that are not at their defaults."""
    return [
        f"{name} is {arch[name]!r}: only {reader} reads it; leave it at {_typed(DEFAULTS[name])}"
        for name in names
        if arch[name] != DEFAULTS[name]
    ]


def _typed(value: Any) -> str:
    """A value as YAML has it."""
    return json.dumps(value)


def _mla(arch: Architecture, kinds: set[str]) -> list[str]:
    problems = [f"{name} is null: attention_type mla needs it" for name in MLA_FIELDS if arch[name] is None]
    if "sliding_attention" in kinds:
        problems.append("layer_types holds 'sliding_attention': mla has no sliding window; use full_attention, or gqa")
    if arch.position_embedding_type != "rope":
        problems.append(f"position_embedding_type is {arch.position_embedding_type!r}: mla needs rope")
    problems += _unread(arch, GQA_FIELDS, "attention_type gqa")
    if arch.num_key_value_heads != arch.num_attention_heads:
        problems.append(
            f"num_key_value_heads is {arch.num_key_value_heads}: mla has one key and value for each of the "
            f"{arch.num_attention_heads} heads, so the two must be equal"
        )
    if not problems and arch.head_dim != arch.qk_nope_head_dim + arch.qk_rope_head_dim:
        problems.append(
            f"head_dim is {arch.head_dim}: with mla it is qk_nope_head_dim + qk_rope_head_dim "
            f"({arch.qk_nope_head_dim + arch.qk_rope_head_dim})"
        )
    return problems


def _linear(arch: Architecture) -> list[str]:
    problems = [f"{name} is null: linear_attention layers need it" for name in LINEAR_FIELDS if arch[name] is None]
    if not problems and arch.linear_num_value_heads % arch.linear_num_key_heads:
        problems.append(
            f"linear_num_key_heads is {arch.linear_num_key_heads}: it must divide linear_num_value_heads "
            f"({arch.linear_num_value_heads}), because each key head serves an equal group of value heads"
        )
    if set(arch.layer_types) == {"linear_attention"}:
        # A cache of recurrent states alone does not know how many tokens it has seen, which `generate` asks.
        problems.append("layer_types holds linear_attention alone: one layer or more must be of another type")
    return problems


def _experts(arch: Architecture) -> list[str]:
    problems = [f"{name} is null: sparse layers need it" for name in EXPERT_FIELDS if arch[name] is None]
    if problems:
        return problems
    experts, top, groups = arch.num_experts, arch.num_experts_per_tok, arch.n_group
    if arch.shared_expert_gate and not arch.shared_expert_intermediate_size:
        problems.append("shared_expert_gate is true: there is no shared expert (shared_expert_intermediate_size is 0)")
    if arch.residual_moe and not arch.shared_expert_intermediate_size:
        problems.append("residual_moe is true: there is no shared expert (shared_expert_intermediate_size is 0)")
    if arch.residual_moe and arch.shared_expert_gate:
        problems.append("shared_expert_gate is true: residual_moe weights the shared expert already; choose one")
    if arch.router_noise != "none" and arch.router_type != "softmax":
        problems.append(
            f"router_noise is {arch.router_noise!r}: only router_type softmax has it; leave it at 'none'"
        )
    if arch.router_type == "noisy_topk" and not arch.norm_topk_prob:
        problems.append("norm_topk_prob is false: noisy_topk takes a softmax over the chosen, which adds up to 1")
    if top > experts:
        problems.append(f"num_experts_per_tok is {top}: there are only {experts} experts (num_experts)")
    if arch.router_type != "sigmoid":
        problems += _unread(arch, SIGMOID_FIELDS, "router_type sigmoid")
    elif experts % groups:
        problems.append(f"n_group is {groups}: it must divide num_experts ({experts}) into equal groups")
    elif arch.topk_group > groups:
        problems.append(f"topk_group is {arch.topk_group}: there are only {groups} groups (n_group)")
    elif groups > 1 and experts // groups < 2:
        problems.append(f"n_group is {groups}: a group needs 2 experts or more, its score is that of its best two")
    elif top > experts // groups * arch.topk_group:
        problems.append(
            f"num_experts_per_tok is {top}: topk_group {arch.topk_group} of {groups} groups leaves "
            f"{experts // groups * arch.topk_group} experts to choose from"
        )
    return problems
