"""Parameters, floating-point operations and cache bytes predicted from a config, before anything is allocated.

Contract: stdlib only. `fields` is a mapping with the architecture fields of minillm.presets (an entry of PRESETS, or
one with overrides). The predictions equal what a built model counts, which tests assert for every preset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Fields = Mapping[str, object]


def _gqa_parameters(fields: Fields) -> int:
    """q, k, v and o projections without biases."""
    query_width = fields["num_attention_heads"] * fields["head_dim"]
    key_value_width = fields["num_key_value_heads"] * fields["head_dim"]
    return fields["hidden_size"] * (2 * query_width + 2 * key_value_width)


def _swiglu_parameters(fields: Fields) -> int:
    """gate, up and down projections without biases."""
    return 3 * fields["hidden_size"] * fields["intermediate_size"]


MIXER_PARAMETERS: dict[str, Callable[[Fields], int]] = {"gqa": _gqa_parameters}
MLP_PARAMETERS: dict[str, Callable[[Fields], int]] = {"swiglu": _swiglu_parameters}


def num_parameters(fields: Fields) -> dict[str, int]:
    """Count parameters.

    Returns:
        `total`: distinct parameters, a tied embedding once. `embedding`: the input embedding, plus the output matrix
        when untied. `non_embedding`: total - embedding. `active`: parameters one token passes through in a layer's
        forward (equal to total where no layer is sparse). `matmul`: the N of 6 N, every active parameter but an
        untied input embedding, which is a look-up and no product.
    """
    layers = fields["num_hidden_layers"]
    mixer = MIXER_PARAMETERS[fields["attention_type"]](fields)
    mlp = MLP_PARAMETERS[fields["mlp_type"]](fields)
    norms = (2 * layers + 1) * fields["hidden_size"]
    non_embedding = layers * (mixer + mlp) + norms
    table = fields["vocab_size"] * fields["hidden_size"]
    embedding = table if fields["tie_word_embeddings"] else 2 * table
    return {
        "total": non_embedding + embedding,
        "active": non_embedding + embedding,
        "non_embedding": non_embedding,
        "embedding": embedding,
        "matmul": non_embedding + table,
    }


def flops_per_token(fields: Fields, seq_len: int) -> int:
    """Floating-point operations a trained token costs, forward and backward: 6 N + 6 L D T.

    6 N: two operations a parameter forward, four backward. 6 L D T: the two attention products (12 L D T), halved
    because a causal query sees half of the sequence on average; D is the width of attention, heads x head_dim, and T
    the sequence length (PaLM, appendix B, arXiv:2204.02311, with the causal half). Recomputation is not counted.
    """
    width = fields["num_attention_heads"] * fields["head_dim"]
    return 6 * num_parameters(fields)["matmul"] + 6 * fields["num_hidden_layers"] * width * seq_len


def cache_bytes_per_token(fields: Fields, bytes_per_element: int = 2) -> int:
    """Bytes the key/value cache holds for each token of one sequence, over all layers (2 bytes an element: bf16)."""
    width = fields["num_key_value_heads"] * fields["head_dim"]
    return 2 * fields["num_hidden_layers"] * width * bytes_per_element
