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
from dataclasses import dataclass

from minillm.settings.architecture import Architecture, rotary_dim

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
    arch: Architecture, low: int, batch: int, length: int, backend: str = "torch", size: int = 1
) -> Activations:
    """What one micro-batch of `batch` rows of `length` tokens leaves.

    Args:
        low: bytes of an element: 2 for bf16 and fp16, 4 for fp32.
        backend, size: who runs the experts, and among how many ranks.
    """
    tokens, hidden, vocabulary = batch * length, arch.hidden_size, arch.vocab_size
    kinds = list(zip(arch.layer_types, arch.mlp_layer_types, strict=True))
    modules = arch.num_nextn_predict_layers
    kinds += [kinds[-1]] * modules
    layers = [round(tokens * _layer(arch, low, length, *kind, backend, size)) for kind in kinds]
    outside = _norm(arch, low, hidden) + low * hidden + _dropout(arch.embedding_dropout, hidden)
    outside += 8 + 8 * (1 + modules) + 4 * (rotary_dim(arch) or 0)  # token ids, targets, angles
    # Two norms into one product, the norm of the result, and the state the loss is made of.
    shared = low * hidden if low == 4 or arch.norm_type == "rmsnorm" else 0  # the decoder's own states
    outside += modules * (3 * _norm(arch, low, hidden) + 3 * low * hidden - shared)
    return Activations(
        layers=tuple(layers),
        outside=round(tokens * outside),
        inputs=len(layers) * tokens * low * hidden,
        log_probabilities=(1 + modules) * 4 * tokens * vocabulary,
        # fp32 log-probabilities, their gradient and that of the logits at once; the first is counted above.
        loss_peak=2 * 4 * tokens * vocabulary,
    )


def _layer(arch: Architecture, low: int, length: int, mixer: str, mlp: str, backend: str, size: int) -> float:
    hidden = arch.hidden_size
    both = 2 * (_norm(arch, low, hidden) + low * hidden + _dropout(arch.hidden_dropout, hidden))
    if mixer == "linear_attention":
        mixed = _gated_deltanet(arch, low, length)
    else:
        mixed = (_mla if arch.attention_type == "mla" else _gqa)(arch, low)
    if mlp == "sparse":
        return both + mixed + _sparse(arch, low, backend, size)
    return both + mixed + _dense(arch, low, arch.intermediate_size)


def _norm(arch: Architecture, low: int, size: int, rows: int = 1) -> int:
    """Without its output, which the next product keeps: RMSNorm its input and 1 / root mean square; LayerNorm its
    input, mean and deviation; the zero-centred norm, which has no kernel, an fp32 copy of its input (at fp32 the input
    itself), the same divided by its root mean square, and that."""
    if arch.norm_type == "zero_centered_rmsnorm":
        return 8 * size + 4 * rows
    return low * size + (8 if arch.norm_type == "layernorm" else 4) * rows


def _dropout(probability: float, size: int) -> int:
    """One byte an element: what was kept."""
    return size if probability else 0


def _gqa(arch: Architecture, low: int) -> int:
    head, total = arch.head_dim, 0
    for heads in (arch.num_attention_heads, arch.num_key_value_heads):
        width = heads * head
        if arch.qk_norm:
            total += _norm(arch, low, width, heads)
        total += low * width  # what attention keeps; a rotation by given angles keeps nothing
    query = arch.num_attention_heads * head
    total += low * arch.num_key_value_heads * head  # values
    total += low * query + 4 * arch.num_attention_heads  # output, log of the sum of exponentials
    if arch.attention_output_gate:
        total += 2 * low * query  # the sigmoid, and its product with the output
        total += 4 * query if low == 4 and arch.qk_norm else 0  # gates between the queries that the norm keeps
    return total


def _mla(arch: Architecture, low: int) -> int:
    heads, rank, rotating = arch.num_attention_heads, arch.kv_lora_rank, arch.qk_rope_head_dim
    width, value = arch.qk_nope_head_dim + rotating, arch.v_head_dim
    total = 0
    if arch.q_lora_rank is not None:
        total += _norm(arch, low, arch.q_lora_rank) + low * arch.q_lora_rank
    total += _norm(arch, low, rank) + low * rank
    total += 4 * rotating if low == 4 else 0  # beside the latent that its norm keeps
    total += 2 * low * heads * width  # queries and keys
    padded = width if value < width else value
    total += low * heads * (padded if value < width else arch.qk_nope_head_dim + value)  # values
    total += low * heads * padded + 4 * heads  # output, log of the sum of exponentials
    return total + (low * heads * value if value < width else 0)  # cut to the values, for the last product


def _gated_deltanet(arch: Architecture, low: int, length: int) -> float:
    key_heads, heads = arch.linear_num_key_heads, arch.linear_num_value_heads
    key, value = arch.linear_key_head_dim, heads * arch.linear_value_head_dim
    chunk = min(CHUNK, 1 << (length - 1).bit_length())
    full = math.ceil(length / chunk) * chunk / length  # rows are filled up to whole chunks
    channels = 2 * key_heads * key + value
    convolution = 2 * low * channels
    decays = 12 * heads  # step size, softplus and its input, fp32
    rule = 2 * key_heads * (key + 1) + 2 * value + 3 * heads  # q and k and their lengths; values, writes; decays
    rule += 2 * heads * chunk + 2 * key_heads * chunk  # decays of pairs, inverse, scores
    rule += heads * key * arch.linear_value_head_dim / chunk + heads / chunk  # states
    output = 4 * heads + 5 * 4 * value + low * value  # norm, weight, gate and its SiLU in fp32; what is projected
    return convolution + decays + 4 * full * rule + output


def _dense(arch: Architecture, low: int, size: int) -> int:
    return low * size * (4 if arch.mlp_type == "swiglu" else 2)


def _sparse(arch: Architecture, low: int, backend: str, size: int) -> float:
    hidden, top = arch.hidden_size, arch.num_experts_per_tok
    total = _router(arch, low) + 4 + 4 * top + _experts(arch, low, backend, size)
    total += 8 * top if backend == "torch" else 0  # order of the rows
    if arch.shared_expert_intermediate_size:
        total += _dense(arch, low, arch.shared_expert_intermediate_size)
        if arch.residual_moe:
            total += 2 * low * hidden + 2 * low
        elif arch.shared_expert_gate:
            total += low * hidden + low
    return total


def _router(arch: Architecture, low: int) -> int:
    """Scores in fp32; the choice, its weights before and after they are made to add up."""
    hidden, top, experts = arch.hidden_size, arch.num_experts_per_tok, arch.num_experts
    wide = 4 * hidden if low == 2 else 0
    if arch.router_type == "noisy_topk":
        return 2 * wide + 4 * 4 * experts + 4 + 8 * top + 4 * top  # logits, noise and its width, probabilities
    if arch.router_noise == "jitter":
        wide = 8 * hidden  # factors and product
    normalised = 4 * top + 4 if arch.norm_topk_prob else 0
    return wide + 8 * experts + 4 + 8 * top + normalised + (4 if arch.router_type == "sigmoid" else 0)


def _experts(arch: Architecture, low: int, backend: str, size: int) -> float:
    """Of a token's K rows; shared out, the rows a rank has are on average as many."""
    hidden, top, width = arch.hidden_size, arch.num_experts_per_tok, arch.moe_intermediate_size
    inner = width * (2 if arch.mlp_type == "swiglu" else 1)
    if backend == "torch":
        return low * top * inner
    if backend == "deepspeed":  # buffers as large as the fullest expert: rows in, and results to combine
        return IMBALANCE * top * (low * (2 * hidden + inner) + 12)
    return low * top * (3 * hidden + 4 * width)  # AutoEP: rows sorted, exchanged and back; gate, SiLU, up, product
