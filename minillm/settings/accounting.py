"""Parameters, floating-point operations and cache bytes predicted from a config, before anything is allocated.

Contract: stdlib only. `fields` is a mapping with the architecture fields (an entry of PRESETS, one with overrides, or
MiniLLMConfig.fields()). The predictions equal what a built model counts, which tests assert for every preset.
Shapes of parameters are the one source: `describe_layers` and `num_parameters` count them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

from minillm.settings.architecture import layer_types, mlp_layer_types

Fields = Mapping[str, object]
Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int, bias: object = False) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _norm_shapes(fields: Fields, name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if fields["norm_type"] == "layernorm" else {})}


def _gqa_shapes(fields: Fields) -> Shapes:
    hidden, head, bias = fields["hidden_size"], fields["head_dim"], fields["attention_bias"]
    query, key_value = fields["num_attention_heads"] * head, fields["num_key_value_heads"] * head
    return {
        **_linear("q_proj", hidden, query * (2 if fields["attention_output_gate"] else 1), bias),
        **_linear("k_proj", hidden, key_value, bias),
        **_linear("v_proj", hidden, key_value, bias),
        **_linear("o_proj", query, hidden, bias),
        **(_norm_shapes(fields, "q_norm", head) | _norm_shapes(fields, "k_norm", head) if fields["qk_norm"] else {}),
    }


def _mla_shapes(fields: Fields) -> Shapes:
    hidden, heads = fields["hidden_size"], fields["num_attention_heads"]
    query = heads * (fields["qk_nope_head_dim"] + fields["qk_rope_head_dim"])
    rank, query_rank = fields["kv_lora_rank"], fields["q_lora_rank"]
    if query_rank is None:
        shapes = _linear("q_proj", hidden, query)
    else:
        shapes = {
            **_linear("q_a_proj", hidden, query_rank),
            **_norm_shapes(fields, "q_a_layernorm", query_rank),
            **_linear("q_b_proj", query_rank, query),
        }
    return {
        **shapes,
        **_linear("kv_a_proj_with_mqa", hidden, rank + fields["qk_rope_head_dim"]),
        **_norm_shapes(fields, "kv_a_layernorm", rank),
        **_linear("kv_b_proj", rank, heads * (fields["qk_nope_head_dim"] + fields["v_head_dim"])),
        **_linear("o_proj", heads * fields["v_head_dim"], hidden),
    }


def _gated_deltanet_shapes(fields: Fields) -> Shapes:
    hidden, heads = fields["hidden_size"], fields["linear_num_value_heads"]
    key = fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    value = heads * fields["linear_value_head_dim"]
    return {
        "A_log": (heads,),
        "dt_bias": (heads,),
        **_linear("qkv_proj", hidden, 2 * key + value),
        **_linear("z_proj", hidden, value),
        **_linear("b_proj", hidden, heads),
        **_linear("a_proj", hidden, heads),
        "conv.weight": (2 * key + value, 1, fields["linear_conv_kernel_dim"]),
        "norm.weight": (fields["linear_value_head_dim"],),
        **_linear("o_proj", value, hidden),
    }


MIXER_SHAPES: dict[str, Callable[[Fields], Shapes]] = {"gqa": _gqa_shapes, "mla": _mla_shapes}


def _dense_shapes(fields: Fields, size: int) -> Shapes:
    hidden, bias = fields["hidden_size"], fields["mlp_bias"]
    gate = _linear("gate_proj", hidden, size) if fields["mlp_type"] == "swiglu" else {}
    return {**gate, **_linear("up_proj", hidden, size, bias), **_linear("down_proj", size, hidden, bias)}


def _sparse_shapes(fields: Fields) -> Shapes:
    hidden, experts, size = fields["hidden_size"], fields["num_experts"], fields["moe_intermediate_size"]
    if fields["router_type"] == "noisy_topk":
        shapes = _linear("gate.router", hidden, experts, True) | _linear("gate.noise", hidden, experts, True)
    else:
        shapes = {"gate.weight": (experts, hidden)}
    swiglu = fields["mlp_type"] == "swiglu"
    name, width = ("gate_up_proj", 2 * size) if swiglu else ("up_proj", size)
    shapes |= {f"experts.{name}": (experts, width, hidden), "experts.down_proj": (experts, hidden, size)}
    if fields["mlp_bias"]:
        shapes |= {"experts.up_bias": (experts, size), "experts.down_bias": (experts, hidden)}
    if fields["shared_expert_intermediate_size"]:
        shared = _dense_shapes(fields, fields["shared_expert_intermediate_size"])
        shapes |= {f"shared_expert.{part}": shape for part, shape in shared.items()}
        shapes |= _linear("shared_expert_gate", hidden, 1) if fields["shared_expert_gate"] else {}
    return shapes | (_linear("coefficient", hidden, 2, True) if fields["residual_moe"] else {})


def _layer_shapes(fields: Fields, mixer: str, mlp: str) -> Shapes:
    kind = _gated_deltanet_shapes if mixer == "linear_attention" else MIXER_SHAPES[fields["attention_type"]]
    block = _sparse_shapes(fields) if mlp == "sparse" else _dense_shapes(fields, fields["intermediate_size"])
    return {
        **_norm_shapes(fields, "input_layernorm", fields["hidden_size"]),
        **{f"mixer.{part}": shape for part, shape in kind(fields).items()},
        **_norm_shapes(fields, "post_attention_layernorm", fields["hidden_size"]),
        **{f"mlp.{part}": shape for part, shape in block.items()},
    }


def parameter_shapes(fields: Fields) -> Shapes:
    """Name -> shape of every parameter in the order of `MiniLLMForCausalLM.named_parameters()`, a tied one once: what
    padding, buckets and thresholds depend on, which totals do not say."""
    hidden, table = fields["hidden_size"], (fields["vocab_size"], fields["hidden_size"])
    shapes: Shapes = {"model.embed_tokens.weight": table}
    kinds = list(zip(layer_types(fields), mlp_layer_types(fields), strict=True))
    for number, (mixer, mlp) in enumerate(kinds):
        shapes |= {f"model.layers.{number}.{n}": shape for n, shape in _layer_shapes(fields, mixer, mlp).items()}
    shapes |= _norm_shapes(fields, "model.norm", hidden)
    if fields["position_embedding_type"] == "learned":
        shapes["model.positions.embed_positions.weight"] = (fields["max_position_embeddings"], hidden)
    for number in range(fields["num_nextn_predict_layers"]):
        layer = {f"layer.{name}": shape for name, shape in _layer_shapes(fields, *kinds[-1]).items()}
        module = {
            **_norm_shapes(fields, "enorm", hidden),
            **_norm_shapes(fields, "hnorm", hidden),
            **_linear("eh_proj", 2 * hidden, hidden),
            **layer,
            **_norm_shapes(fields, "norm", hidden),
        }
        shapes |= {f"model.multi_token_modules.{number}.{name}": shape for name, shape in module.items()}
    return shapes if fields["tie_word_embeddings"] else {**shapes, "lm_head.weight": table}


def describe_layers(fields: Fields) -> list[dict[str, object]]:
    """One entry a layer: `mixer` and `mlp` (their kinds), `parts` (name -> parameters), `total`, `active`."""
    layers = []
    for mixer, mlp in zip(layer_types(fields), mlp_layer_types(fields), strict=True):
        parts: dict[str, int] = {}
        for name, shape in _layer_shapes(fields, mixer, mlp).items():
            place, *inner = name.split(".")
            part = "norms" if place.endswith("layernorm") else "mlp" if (place, mlp) == ("mlp", "dense") else inner[0]
            parts[part] = parts.get(part, 0) + prod(shape)
        total = sum(parts.values())
        idle = 0
        if mlp == "sparse":
            idle = parts["experts"] // fields["num_experts"] * (fields["num_experts"] - fields["num_experts_per_tok"])
        layers.append({"mixer": mixer, "mlp": mlp, "parts": parts, "total": total, "active": total - idle})
    return layers


def _norm(fields: Fields) -> int:
    """Of a norm over the hidden size."""
    return _count(_norm_shapes(fields, "norm", fields["hidden_size"]))


def _count(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


def _multi_token(fields: Fields) -> tuple[int, int]:
    """Parameters of one multi-token module, and those a token uses: like the last layer, a projection, three norms."""
    last, hidden = describe_layers(fields)[-1], fields["hidden_size"]
    extra = 2 * hidden * hidden + 3 * _norm(fields)
    return last["total"] + extra, last["active"] + extra


def num_parameters(fields: Fields) -> dict[str, int]:
    """Count parameters.

    Returns:
        `total`: distinct parameters, a tied embedding once. `embedding`: the input embedding, learned positions, and
        the output matrix when untied. `non_embedding`: total - embedding. `multi_token`: of the modules that predict
        further ahead, which only training uses (part of total). `routed`: of experts that a router chooses from, all of
        them (part of total): what expert parallelism shares out. `active`: parameters one generated token uses: the
        experts it goes to, no multi-token module. `matmul`: the N of 6 N in training: every parameter one token uses
        but look-ups (an untied input embedding, positions), with one more output product for each multi-token module.
    """
    layers, hidden = describe_layers(fields), fields["hidden_size"]
    table = fields["vocab_size"] * hidden
    positions = fields["max_position_embeddings"] * hidden if fields["position_embedding_type"] == "learned" else 0
    modules = fields["num_nextn_predict_layers"]
    module, module_active = _multi_token(fields) if modules else (0, 0)
    embedding = (table if fields["tie_word_embeddings"] else 2 * table) + positions
    last_norm = _norm(fields)
    routed = [layer["parts"].get("experts", 0) for layer in layers]
    active = sum(layer["active"] for layer in layers) + last_norm
    non_embedding = sum(layer["total"] for layer in layers) + last_norm + modules * module
    return {
        "total": non_embedding + embedding,
        "active": active + embedding,
        "non_embedding": non_embedding,
        "embedding": embedding,
        "multi_token": modules * module,
        "routed": sum(routed) + modules * routed[-1],
        "matmul": active + table + modules * (module_active + table),
    }


def flops_per_token(fields: Fields, seq_len: int) -> int:
    """Floating-point operations a trained token costs, forward and backward: 6 N + the sequence mixing.

    6 N: two operations a parameter forward, four backward. Full attention: 6 L D T, the two attention products
    (12 L D T) halved because a causal query sees half of the sequence on average; D is the width of attention, heads
    x head_dim (the mean of the query's and the value's for MLA), and T the sequence length (PaLM, appendix B,
    arXiv:2204.02311, with the causal half). A sliding window W < T shows W - W^2 / 2T tokens instead of T / 2. Gated
    DeltaNet: three products of a value head's d_k x d_v state a token (decay aside), 18 d_k d_v. Recomputation is
    not counted.
    """
    heads = fields["num_attention_heads"]
    if fields["attention_type"] == "mla":
        width = heads * (fields["head_dim"] + fields["v_head_dim"]) / 2
    else:
        width = heads * fields["head_dim"]
    window = min(fields["sliding_window"] or seq_len, seq_len)
    mixing = {"full_attention": 6 * width * seq_len}
    mixing["sliding_attention"] = 12 * width * (window - window**2 / (2 * seq_len))
    if fields["linear_num_value_heads"]:
        state = fields["linear_key_head_dim"] * fields["linear_value_head_dim"]
        mixing["linear_attention"] = 18 * fields["linear_num_value_heads"] * state
    kinds = layer_types(fields)
    kinds += [kinds[-1]] * fields["num_nextn_predict_layers"]
    return 6 * num_parameters(fields)["matmul"] + round(sum(mixing[kind] for kind in kinds))


def cache_bytes(fields: Fields, num_tokens: int, bytes_per_element: int = 2) -> int:
    """Bytes the cache of one sequence of `num_tokens` holds over all layers (2 bytes an element: bf16).

    Full attention holds keys and values of every token, MLA its latent and the shared rotary key, a sliding window the
    last W - 1 tokens, gated DeltaNet a convolution's inputs and an fp32 state, however long the sequence.
    """
    total = 0
    for kind in layer_types(fields):
        if kind == "linear_attention":
            total += _state_bytes(fields, bytes_per_element)
            continue
        width = 2 * fields["num_key_value_heads"] * fields["head_dim"]
        if fields["attention_type"] == "mla":
            width = fields["kv_lora_rank"] + fields["qk_rope_head_dim"]
        held = num_tokens if kind == "full_attention" else min(num_tokens, fields["sliding_window"] - 1)
        total += held * width * bytes_per_element
    return total


def _state_bytes(fields: Fields, bytes_per_element: int) -> int:
    key = fields["linear_num_key_heads"] * fields["linear_key_head_dim"]
    value = fields["linear_num_value_heads"] * fields["linear_value_head_dim"]
    convolution = (2 * key + value) * fields["linear_conv_kernel_dim"] * bytes_per_element
    return convolution + 4 * value * fields["linear_key_head_dim"]


def cache_bytes_per_token(fields: Fields, bytes_per_element: int = 2) -> int:
    """Bytes each further token adds to the cache while it fits every sliding window."""
    return cache_bytes(fields, 1, bytes_per_element) - cache_bytes(fields, 0, bytes_per_element)
