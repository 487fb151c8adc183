"""Parameters, floating-point operations and cache bytes predicted from a config, before anything is allocated.

Contract: stdlib only. What is asked for is an Architecture, or a MiniLLMConfig, which has the same fields.
 The predictions equal what a built model counts, which tests assert for every preset.
Shapes of parameters are the one source: `describe_layers` and `num_parameters` count them.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from minillm.settings.architecture import Architecture

Shapes = dict[str, tuple[int, ...]]


def _linear(name: str, inputs: int, outputs: int, bias: object = False) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def _norm_shapes(arch: Architecture, name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), **({f"{name}.bias": (size,)} if arch.norm_type == "layernorm" else {})}


def _gqa_shapes(arch: Architecture) -> Shapes:
    hidden, head, bias = arch.hidden_size, arch.head_dim, arch.attention_bias
    query, key_value = arch.num_attention_heads * head, arch.num_key_value_heads * head
    return {
        **_linear("q_proj", hidden, query * (2 if arch.attention_output_gate else 1), bias),
        **_linear("k_proj", hidden, key_value, bias),
        **_linear("v_proj", hidden, key_value, bias),
        **_linear("o_proj", query, hidden, bias),
        **(_norm_shapes(arch, "q_norm", head) | _norm_shapes(arch, "k_norm", head) if arch.qk_norm else {}),
    }


def _mla_shapes(arch: Architecture) -> Shapes:
    hidden, heads = arch.hidden_size, arch.num_attention_heads
    query = heads * (arch.qk_nope_head_dim + arch.qk_rope_head_dim)
    rank, query_rank = arch.kv_lora_rank, arch.q_lora_rank
    if query_rank is None:
        shapes = _linear("q_proj", hidden, query)
    else:
        shapes = {
            **_linear("q_a_proj", hidden, query_rank),
            **_norm_shapes(arch, "q_a_layernorm", query_rank),
            **_linear("q_b_proj", query_rank, query),
        }
    return {
        **shapes,
        **_linear("kv_a_proj_with_mqa", hidden, rank + arch.qk_rope_head_dim),
        **_norm_shapes(arch, "kv_a_layernorm", rank),
        **_linear("kv_b_proj", rank, heads * (arch.qk_nope_head_dim + arch.v_head_dim)),
        **_linear("o_proj", heads * arch.v_head_dim, hidden),
    }


def _gated_deltanet_shapes(arch: Architecture) -> Shapes:
    hidden, heads = arch.hidden_size, arch.linear_num_value_heads
    key = arch.linear_num_key_heads * arch.linear_key_head_dim
    value = heads * arch.linear_value_head_dim
    return {
        "A_log": (heads,),
        "dt_bias": (heads,),
        **_linear("qkv_proj", hidden, 2 * key + value),
        **_linear("z_proj", hidden, value),
        **_linear("b_proj", hidden, heads),
        **_linear("a_proj", hidden, heads),
        "conv.weight": (2 * key + value, 1, arch.linear_conv_kernel_dim),
        "norm.weight": (arch.linear_value_head_dim,),
        **_linear("o_proj", value, hidden),
    }


MIXER_SHAPES: dict[str, Callable[[Architecture], Shapes]] = {"gqa": _gqa_shapes, "mla": _mla_shapes}


def _dense_shapes(arch: Architecture, size: int) -> Shapes:
    hidden, bias = arch.hidden_size, arch.mlp_bias
    gate = _linear("gate_proj", hidden, size) if arch.mlp_type == "swiglu" else {}
    return {**gate, **_linear("up_proj", hidden, size, bias), **_linear("down_proj", size, hidden, bias)}


def _sparse_shapes(arch: Architecture) -> Shapes:
    hidden, experts, size = arch.hidden_size, arch.num_experts, arch.moe_intermediate_size
    if arch.router_type == "noisy_topk":
        shapes = _linear("gate.router", hidden, experts, True) | _linear("gate.noise", hidden, experts, True)
    else:
        shapes = {"gate.weight": (experts, hidden)}
    swiglu = arch.mlp_type == "swiglu"
    name, width = ("gate_up_proj", 2 * size) if swiglu else ("up_proj", size)
    shapes |= {f"experts.{name}": (experts, width, hidden), "experts.down_proj": (experts, hidden, size)}
    if arch.mlp_bias:
        shapes |= {"experts.up_bias": (experts, size), "experts.down_bias": (experts, hidden)}
    if arch.shared_expert_intermediate_size:
        shared = _dense_shapes(arch, arch.shared_expert_intermediate_size)
        shapes |= {f"shared_expert.{part}": shape for part, shape in shared.items()}
        shapes |= _linear("shared_expert_gate", hidden, 1) if arch.shared_expert_gate else {}
    return shapes | (_linear("coefficient", hidden, 2, True) if arch.residual_moe else {})


def _layer_shapes(arch: Architecture, mixer: str, mlp: str) -> Shapes:
    kind = _gated_deltanet_shapes if mixer == "linear_attention" else MIXER_SHAPES[arch.attention_type]
    block = _sparse_shapes(arch) if mlp == "sparse" else _dense_shapes(arch, arch.intermediate_size)
    return {
        **_norm_shapes(arch, "input_layernorm", arch.hidden_size),
        **{f"mixer.{part}": shape for part, shape in kind(arch).items()},
        **_norm_shapes(arch, "post_attention_layernorm", arch.hidden_size),
        **{f"mlp.{part}": shape for part, shape in block.items()},
    }


def parameter_shapes(arch: Architecture) -> Shapes:
    """Name -> shape of every parameter in the order of `MiniLLMForCausalLM.named_parameters()`, a tied one once: what
    padding, buckets and thresholds depend on, which totals do not say."""
    hidden, table = arch.hidden_size, (arch.vocab_size, arch.hidden_size)
    shapes: Shapes = {"model.embed_tokens.weight": table}
    kinds = list(zip(arch.layer_types, arch.mlp_layer_types, strict=True))
    for number, (mixer, mlp) in enumerate(kinds):
        shapes |= {f"model.layers.{number}.{n}": shape for n, shape in _layer_shapes(arch, mixer, mlp).items()}
    shapes |= _norm_shapes(arch, "model.norm", hidden)
    if arch.position_embedding_type == "learned":
        shapes["model.positions.embed_positions.weight"] = (arch.max_position_embeddings, hidden)
    for number in range(arch.num_nextn_predict_layers):
        layer = {f"layer.{name}": shape for name, shape in _layer_shapes(arch, *kinds[-1]).items()}
        module = {
            **_norm_shapes(arch, "enorm", hidden),
            **_norm_shapes(arch, "hnorm", hidden),
            **_linear("eh_proj", 2 * hidden, hidden),
            **layer,
            **_norm_shapes(arch, "norm", hidden),
        }
        shapes |= {f"model.multi_token_modules.{number}.{name}": shape for name, shape in module.items()}
    return shapes if arch.tie_word_embeddings else {**shapes, "lm_head.weight": table}


def describe_layers(arch: Architecture) -> list[dict[str, object]]:
    """One entry a layer: `mixer` and `mlp` (their kinds), `parts` (name -> parameters), `total`, `active`."""
    layers = []
    for mixer, mlp in zip(arch.layer_types, arch.mlp_layer_types, strict=True):
        parts: dict[str, int] = {}
        for name, shape in _layer_shapes(arch, mixer, mlp).items():
            place, *inner = name.split(".")
            part = "norms" if place.endswith("layernorm") else "mlp" if (place, mlp) == ("mlp", "dense") else inner[0]
            parts[part] = parts.get(part, 0) + prod(shape)
        total = sum(parts.values())
        idle = 0
        if mlp == "sparse":
            idle = parts["experts"] // arch.num_experts * (arch.num_experts - arch.num_experts_per_tok)
        layers.append({"mixer": mixer, "mlp": mlp, "parts": parts, "total": total, "active": total - idle})
    return layers


def _norm(arch: Architecture) -> int:
    """Of a norm over the hidden size."""
    return _count(_norm_shapes(arch, "norm", arch.hidden_size))


def _count(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


def _multi_token(arch: Architecture) -> tuple[int, int]:
    """Parameters of one multi-token module, and those a token uses: like the last layer, a projection, three norms."""
    last, hidden = describe_layers(arch)[-1], arch.hidden_size
    extra = 2 * hidden * hidden + 3 * _norm(arch)
    return last["total"] + extra, last["active"] + extra


def num_parameters(arch: Architecture) -> dict[str, int]:
    """Count parameters.

    Returns:
        `total`: distinct parameters, a tied embedding once. `embedding`: the input embedding, learned positions, and
        the output matrix when untied. `non_embedding`: total - embedding. `multi_token`: of the modules that predict
        further ahead, which only training uses (part of total). `routed`: of experts that a router chooses from, all of
        them (part of total): what expert parallelism shares out. `active`: parameters one generated token uses: the
        experts it goes to, no multi-token module. `matmul`: the N of 6 N in training: every parameter one token uses
        but look-ups (an untied input embedding, positions), with one more output product for each multi-token module.
    """
    layers, hidden = describe_layers(arch), arch.hidden_size
    table = arch.vocab_size * hidden
    positions = arch.max_position_embeddings * hidden if arch.position_embedding_type == "learned" else 0
    modules = arch.num_nextn_predict_layers
    module, module_active = _multi_token(arch) if modules else (0, 0)
    embedding = (table if arch.tie_word_embeddings else 2 * table) + positions
    last_norm = _norm(arch)
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


def flops_per_token(arch: Architecture, seq_len: int) -> int:
    """Floating-point operations a trained token costs, forward and backward: 6 N + the sequence mixing.

    6 N: two operations a parameter forward, four backward. Full attention: 6 L D T, the two attention products
    (12 L D T) halved because a causal query sees half of the sequence on average; D is the width of attention, heads
    x head_dim (the mean of the query's and the value's for MLA), and T the sequence length (PaLM, appendix B,
    arXiv:2204.02311, with the causal half). A sliding window W < T shows W - W^2 / 2T tokens instead of T / 2. Gated
    DeltaNet: three products of a value head's d_k x d_v state a token (decay aside), 18 d_k d_v. Recomputation is
    not counted.
    """
    heads = arch.num_attention_heads
    if arch.attention_type == "mla":
        width = heads * (arch.head_dim + arch.v_head_dim) / 2
    else:
        width = heads * arch.head_dim
    window = min(arch.sliding_window or seq_len, seq_len)
    mixing = {"full_attention": 6 * width * seq_len}
    mixing["sliding_attention"] = 12 * width * (window - window**2 / (2 * seq_len))
    if arch.linear_num_value_heads:
        state = arch.linear_key_head_dim * arch.linear_value_head_dim
        mixing["linear_attention"] = 18 * arch.linear_num_value_heads * state
    kinds = [*arch.layer_types, *[arch.layer_types[-1]] * arch.num_nextn_predict_layers]
    return 6 * num_parameters(arch)["matmul"] + round(sum(mixing[kind] for kind in kinds))


def cache_bytes(arch: Architecture, num_tokens: int, bytes_per_element: int = 2) -> int:
    """Bytes the cache of one sequence of `num_tokens` holds over all layers (2 bytes an element: bf16).

    Full attention holds keys and values of every token, MLA its latent and the shared rotary key, a sliding window the
    last W - 1 tokens, gated DeltaNet a convolution's inputs and an fp32 state, however long the sequence.
    """
    total = 0
    for kind in arch.layer_types:
        if kind == "linear_attention":
            total += _state_bytes(arch, bytes_per_element)
            continue
        width = 2 * arch.num_key_value_heads * arch.head_dim
        if arch.attention_type == "mla":
            width = arch.kv_lora_rank + arch.qk_rope_head_dim
        held = num_tokens if kind == "full_attention" else min(num_tokens, arch.sliding_window - 1)
        total += held * width * bytes_per_element
    return total


def _state_bytes(arch: Architecture, bytes_per_element: int) -> int:
    key = arch.linear_num_key_heads * arch.linear_key_head_dim
    value = arch.linear_num_value_heads * arch.linear_value_head_dim
    convolution = (2 * key + value) * arch.linear_conv_kernel_dim * bytes_per_element
    return convolution + 4 * value * arch.linear_key_head_dim
