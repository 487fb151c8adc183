"""Bytes that the forward pass of this decoder leaves for its backward pass, and those of the loss.

Contract: stdlib only. After Korthikanti et al. (arXiv:2205.05198), section 4, with what this decoder's own modules keep
in place of GPT's: tests hold the sum against what autograd saved. Counted are eager modules with the kernels they have
on a GPU (attention without its matrix of weights; RMSNorm in one kernel); compiled modules keep less. Not counted:
what does not grow with tokens, and flash-linear-attention's kernels, which keep less than the chunked rule that is
counted for gated DeltaNet. Shared-out experts are an estimate: how many rows a rank gets follows the tokens.

Shapes: D hidden, N heads, K key/value heads, H head dim, R rotating dimensions, E experts, I intermediate; `low` is the
bytes of an element of the model's type. Numbers are bytes of one token unless said otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minillm.settings.architecture import layer_types, mlp_layer_types, rotary_dim

Fields = Mapping[str, object]

CHUNK = 64  # minillm.models.delta_rule.CHUNK
IMBALANCE = 1.25  # tokens of the fullest expert over the mean, where buffers follow the fullest


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch.

    Attributes:
        layers: of each layer, multi-token modules' layers last.
        outside: embedding, last norm, multi-token modules around their layers.
        inputs: of all layers: what checkpointing keeps of them.
        log_probabilities: fp32 [tokens, vocabulary] a loss term keeps, all terms.
        loss_peak: on top of all saved, while the loss turns into the gradient of the logits.
    """

    layers: tuple[int, ...]
    outside: int
    inputs: int
    log_probabilities: int
    loss_peak: int

    def saved(self, checkpointing: bool) -> int:
        """At the end of the forward pass, logits apart."""
        return self.outside + (self.inputs if checkpointing else sum(self.layers))

    def recomputed(self, checkpointing: bool) -> int:
        """The layer that backward makes again."""
        return max(self.layers) if checkpointing else 0

    @property
    def logits(self) -> int:
        """At the peak, between the forward and the backward pass."""
        return self.log_probabilities + self.loss_peak


def activations(
    fields: Fields, low: int, batch: int, length: int, backend: str = "torch", size: int = 1
) -> Activations:
    """What one micro-batch of `batch` rows of `length` tokens leaves.

    Args:
        low: bytes of an element: 2 for bf16 and fp16, 4 for fp32.
        backend, size: who runs the experts, and among how many ranks.
    """
    tokens, hidden, vocabulary = batch * length, fields["hidden_size"], fields["vocab_size"]
    kinds = list(zip(layer_types(fields), mlp_layer_types(fields), strict=True))
    modules = fields["num_nextn_predict_layers"]
    kinds += [kinds[-1]] * modules
    layers = [round(tokens * _layer(fields, low, length, *kind, backend, size)) for kind in kinds]
    outside = _norm(fields, low, hidden) + low * hidden + _dropout(fields["embedding_dropout"], hidden)
    outside += 8 + 8 * (1 + modules) + 4 * (rotary_dim(fields) or 0)  # token ids, targets, angles
    # Two norms into one product, the norm of the result, and the state the loss is made of.
    shared = low * hidden if low == 4 or fields["norm_type"] == "rmsnorm" else 0  # the decoder's own states
    outside += modules * (3 * _norm(fields, low, hidden) + 3 * low * hidden - shared)
    return Activations(
        layers=tuple(layers),
        outside=round(tokens * outside),
        inputs=len(layers) * tokens * low * hidden,
        log_probabilities=(1 + modules) * 4 * tokens * vocabulary,
        # fp32 log-probabilities, their gradient and that of the logits at once; the first is counted above.
        loss_peak=2 * 4 * tokens * vocabulary,
    )


def _layer(fields: Fields, low: int, length: int, mixer: str, mlp: str, backend: str, size: int) -> float:
    hidden = fields["hidden_size"]
    both = 2 * (_norm(fields, low, hidden) + low * hidden + _dropout(fields["hidden_dropout"], hidden))
    if mixer == "linear_attention":
        mixed = _gated_deltanet(fields, low, length)
    else:
        mixed = (_mla if fields["attention_type"] == "mla" else _gqa)(fields, low)
    if mlp == "sparse":
        return both + mixed + _sparse(fields, low, backend, size)
    return both + mixed + _dense(fields, low, fields["intermediate_size"])


def _norm(fields: Fields, low: int, size: int, rows: int = 1) -> int:
    """Without its output, which the next product keeps: RMSNorm its input and 1 / root mean square; LayerNorm its
    input, mean and deviation; the zero-centred norm, which has no kernel, an fp32 copy of its input (at fp32 the input
    itself), the same divided by its root mean square, and that."""
    if fields["norm_type"] == "zero_centered_rmsnorm":
        return 8 * size + 4 * rows
    return low * size + (8 if fields["norm_type"] == "layernorm" else 4) * rows


def _dropout(probability: float, size: int) -> int:
    """One byte an element: what was kept."""
    return size if probability else 0


def _gqa(fields: Fields, low: int) -> int:
    head, total = fields["head_dim"], 0
    for heads in (fields["num_attention_heads"], fields["num_key_value_heads"]):
        width = heads * head
        if fields["qk_norm"]:
            total += _norm(fields, low, width, heads)
        total += low * width  # what attention keeps; a rotation by given angles keeps nothing
    query = fields["num_attention_heads"] * head
    total += low * fields["num_key_value_heads"] * head  # values
    total += low * query + 4 * fields["num_attention_heads"]  # output, log of the sum of exponentials
    if fields["attention_output_gate"]:
        total += 2 * low * query  # the sigmoid, and its product with the output
        total += 4 * query if low == 4 and fields["qk_norm"] else 0  # gates between the queries that the norm keeps
    return total


def _mla(fields: Fields, low: int) -> int:
    heads, rank, rotating = fields["num_attention_heads"], fields["kv_lora_rank"], fields["qk_rope_head_dim"]
    width, value = fields["qk_nope_head_dim"] + rotating, fields["v_head_dim"]
    total = 0
    if fields["q_lora_rank"] is not None:
        total += _norm(fields, low, fields["q_lora_rank"]) + low * fields["q_lora_rank"]
    total += _norm(fields, low, rank) + low * rank
    total += 4 * rotating if low == 4 else 0  # beside the latent that its norm keeps
    total += 2 * low * heads * width  # queries and keys
    padded = width if value < width else value
    total += low * heads * (padded if value < width else fields["qk_nope_head_dim"] + value)  # values
    total += low * heads * padded + 4 * heads  # output, log of the sum of exponentials
    return total + (low * heads * value if value < width else 0)  # cut to the values, for the last product


def _gated_deltanet(fields: Fields, low: int, length: int) -> float:
    key_heads, heads = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    key, value = fields["linear_key_head_dim"], heads * fields["linear_value_head_dim"]
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    full = math.ceil(length / chunk) * chunk / length  # rows are filled up to whole chunks
    channels = 2 * key_heads * key + value
    convolution = 2 * low * channels
    decays = 12 * heads  # step size, softplus and its input, fp32
    rule = 2 * key_heads * (key + 1) + 2 * value + 3 * heads  # q and k and their lengths; values, writes; decays
    rule += 2 * heads * chunk + 2 * key_heads * chunk  # decays of pairs, inverse, scores
    rule += heads * key * fields["linear_value_head_dim"] / chunk + heads / chunk  # states
    output = 4 * heads + 5 * 4 * value + low * value  # norm, weight, gate and its SiLU in fp32; what is projected
    return convolution + decays + 4 * full * rule + output


def _dense(fields: Fields, low: int, size: int) -> int:
    return low * size * (4 if fields["mlp_type"] == "swiglu" else 2)


def _sparse(fields: Fields, low: int, backend: str, size: int) -> float:
    hidden, top = fields["hidden_size"], fields["num_experts_per_tok"]
    total = _router(fields, low) + 4 + 4 * top + _experts(fields, low, backend, size)
    total += 8 * top if backend == "torch" else 0  # order of the rows
    if fields["shared_expert_intermediate_size"]:
        total += _dense(fields, low, fields["shared_expert_intermediate_size"])
        if fields["residual_moe"]:
            total += 2 * low * hidden + 2 * low
        elif fields["shared_expert_gate"]:
            total += low * hidden + low
    return total


def _router(fields: Fields, low: int) -> int:
    """Scores in fp32; the choice, its weights before and after they are made to add up."""
    hidden, top, experts = fields["hidden_size"], fields["num_experts_per_tok"], fields["num_experts"]
    wide = 4 * hidden if low == 2 else 0
    if fields["router_type"] == "noisy_topk":
        return 2 * wide + 4 * 4 * experts + 4 + 8 * top + 4 * top  # logits, noise and its width, probabilities
    if fields["router_noise"] == "jitter":
        wide = 8 * hidden  # factors and product
    normalised = 4 * top + 4 if fields["norm_topk_prob"] else 0
    return wide + 8 * experts + 4 + 8 * top + normalised + (4 if fields["router_type"] == "sigmoid" else 0)


def _experts(fields: Fields, low: int, backend: str, size: int) -> float:
    """Of a token's K rows; shared out, the rows a rank has are on average as many."""
    hidden, top, width = fields["hidden_size"], fields["num_experts_per_tok"], fields["moe_intermediate_size"]
    inner = width * (2 if fields["mlp_type"] == "swiglu" else 1)
    if backend == "torch":
        return low * top * inner
    if backend == "deepspeed":  # buffers as large as the fullest expert: rows in, and results to combine
        return IMBALANCE * top * (low * (2 * hidden + inner) + 12)
    return low * top * (3 * hidden + 4 * width)  # AutoEP: rows sorted, exchanged and back; gate, SiLU, up, product
