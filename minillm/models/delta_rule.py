"""The gated delta rule (Yang, Kautz, Hatamizadeh, arXiv:2412.06464) in two equal forms, as functions of tensors.

Contract: a value head keeps a matrix S [key dim, value dim]. Token by token (the paper's equation 10, for S
transposed, with log decay g <= 0 and step size beta),

    S <- exp(g) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q,

with q and k of unit length and q times key_dim ** -0.5. `recurrent_gated_delta_rule` takes these steps, for decoding;
`chunked_gated_delta_rule` takes a chunk of tokens at a time by matrix products, for training and prefill. Both compute
in fp32 (fp64 for fp64 inputs) and may be differentiated once.

Within a chunk, with b the running sum of g from the chunk's start and S its incoming state, what each token writes is
the solution U of a triangular system (the WY form, the paper's section 3.3):

    (I + A) U = beta (V - e^b K S),       A[i, j] = beta_i e^(b_i - b_j) k_i . k_j  for j < i,
    O = e^b Q S + (Q K^T * e^(b_i - b_j)) U,
    S' = e^(b_last) S + K^T (e^(b_last - b) U).

Where a new segment (document) begins, a token sees and corrects only its own segment's writes, the incoming state
reaches only the first segment, and only the last segment's writes go out: masks on the four decays above.

Shapes: B batch, T time, K key heads, N value heads, G = N / K value heads of a key head, H key dim, V value dim,
C tokens of a chunk, n chunks, M = B K.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

try:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as flash_chunks
except ImportError:
    flash_chunks = None

CHUNK = 64
# Decays below e ** -FORGOTTEN are 0: far below fp32's precision, and products of them would be denormal numbers, with
# which CPUs multiply several times slower.
FORGOTTEN = 40.0
NORM_EPS = 1e-6  # inside the square root of the L2 norm, as in flash-linear-attention and transformers


def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A step a token.

    Args:
        q, k: [B, T, K, H], not normalised.
        v: [B, T, N, V]; value head n goes with key head n // (N / K).
        g: [B, T, N], log decays, 0 or less.
        beta: [B, T, N], 0 to 1.
        initial_state: [B, N, H, V]; absent: zeros.

    Returns:
        o [B, T, N, V] in v's dtype, and the last state [B, N, H, V] in fp32 (fp64).
    """
    groups, dtype = v.shape[2] // k.shape[2], torch.promote_types(v.dtype, torch.float32)
    q, k = normalised(q.to(dtype), k.to(dtype))
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))  # [B, T, N, H]
    wide, decay, beta = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    state = first_state(initial_state, k, wide)
    outputs = []
    for t in range(v.shape[1]):
        state = state * decay[:, t, :, None, None]
        known = k[:, t, :, None] @ state  # [B, N, 1, V]
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None, None] * (wide[:, t, :, None] - known))
        outputs.append(q[:, t, :, None] @ state)
    return torch.cat(outputs, dim=2).transpose(1, 2).to(v.dtype), state


def chunked_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk of tokens at a time. Arguments and results as of recurrent_gated_delta_rule, and:

    Args:
        segments: int64 [B, T], never falling along a row: the state begins at zero in each new segment, and
            segment 0 goes on from `initial_state`; absent: all is segment 0.
        chunk_size: tokens in a chunk; a row need not fill its last one.
    """
    if segments is None and flash_chunks is not None and v.is_cuda and v.dtype in (torch.bfloat16, torch.float16):
        return flash_gated_delta_rule(q, k, v, g, beta, initial_state)
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k = normalised(q.to(dtype), k.to(dtype))
    wide, g, beta = v.to(dtype), g.to(dtype), beta.to(dtype)
    state = first_state(initial_state, k, wide)
    # A power of two, so that a short prompt is not padded to a whole chunk and few shapes are compiled.
    size = min(chunk_size, 1 << (v.shape[1] - 1).bit_length())
    output, state = _Chunks.apply(q, k, wide, g, beta, state, segments, size)
    return output.to(v.dtype), state


def flash_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """chunked_gated_delta_rule by flash-linear-attention's kernels; arguments as there, on a GPU, without segments."""
    groups = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    return flash_chunks(
        q,
        k,
        v,
        g=g,
        beta=beta.to(v.dtype),
        initial_state=initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def normalised(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k at unit length over the last dimension, q times its dimension ** -0.5."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    return q * q.shape[-1] ** -0.5, k


def first_state(initial: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, N, H, V] in v's dtype: `initial`, or zeros."""
    if initial is not None:
        return initial.to(v.dtype)
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])


class _Chunks(torch.autograd.Function):
    """The chunked rule over normalised q and k, with its derivative written out.

    Written out because autograd would keep some twenty tensors of the size of v where seven do, and would fill a
    whole gradient for each chunk of each of them.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, segments, size):
        (batch, length, key_heads, key_dim), (value_heads, value_dim) = k.shape, v.shape[2:]
        groups = value_heads // key_heads
        qk = torch.cat((_key_chunks(q, size), _key_chunks(k, size)), dim=2)  # [n, M, 2C, H]
        v = _value_chunks(v, key_heads, size)  # [n, M, G, C, V]
        g, beta = (_value_chunks(x[..., None], key_heads, size) for x in (g, beta))  # [n, M, G, C, 1]
        pairs, incoming, outgoing, kept = _decays(g, segments, batch, size)
        scores = qk @ qk[:, :, size:].mT  # [n, M, 2C, C]
        within = scores[:, :, None, :size] * pairs
        inverse = _inverse(scores[:, :, None, size:] * pairs * beta)
        state = state.unflatten(1, (key_heads, groups)).flatten(0, 1).transpose(1, 2).flatten(2)  # [M, H, G V]
        states, written, outputs = [], torch.empty_like(v), torch.empty_like(v)
        for i in range(v.shape[0]):
            states.append(state)
            read = _by_head(qk[i] @ state, groups)  # [M, G, 2C, V]
            rest = (v[i] - incoming[i] * read[:, :, size:]).mul_(beta[i])
            torch.matmul(inverse[i], rest, out=written[i])
            torch.matmul(within[i], written[i], out=outputs[i])
            outputs[i].addcmul_(incoming[i], read[:, :, :size])
            update = _side_by_side(written[i] * outgoing[i])  # [M, C, G V]
            state = torch.baddbmm(_scaled(state, kept[i]), qk[i, :, size:].mT, update)
        ctx.save_for_backward(
            qk, v, beta, pairs, incoming, outgoing, kept, scores, inverse, torch.stack(states), written
        )
        ctx.size, ctx.shape = size, (batch, length, key_heads)
        return _value_tokens(outputs, ctx.shape), _state_by_head(state, key_heads, groups)

    @staticmethod
    def backward(ctx, d_output, d_state):
        qk, v, beta, pairs, incoming, outgoing, kept, scores, inverse, states, written = ctx.saved_tensors
        size, (_, _, key_heads) = ctx.size, ctx.shape
        k, groups = qk[:, :, size:], v.shape[2]
        d_output = _value_chunks(d_output, key_heads, size)
        d_state = d_state.unflatten(1, (key_heads, groups)).flatten(0, 1).transpose(1, 2).flatten(2)  # [M, H, G V]
        d_written = (scores[:, :, None, :size] * pairs).mT @ d_output  # [n, M, G, C, V]
        d_rest, d_outgoing, d_kept = torch.empty_like(v), torch.empty_like(beta), torch.empty_like(kept)
        d_reads, d_states = [None] * len(v), [None] * len(v)
        for i in reversed(range(len(v))):
            d_states[i] = d_state
            d_update = _by_head(k[i] @ d_state, groups)  # [M, G, C, V]
            d_outgoing[i] = (written[i] * d_update).sum(-1, keepdim=True)
            torch.matmul(inverse[i].mT, d_written[i].addcmul_(outgoing[i], d_update), out=d_rest[i])
            d_read = torch.cat((incoming[i] * d_output[i], -(incoming[i] * beta[i]) * d_rest[i]), dim=2)
            d_reads[i] = _side_by_side(d_read)  # [M, 2C, G V]
            d_kept[i] = _by_head(states[i] * d_state, groups).sum((-1, -2), keepdim=True)
            d_state = torch.baddbmm(_scaled(d_state, kept[i]), qk[i].mT, d_reads[i])
        d_reads, d_states = torch.stack(d_reads), torch.stack(d_states)

        read = _by_head(qk @ states, groups)  # [n, M, G, 2C, V]
        d_beta = (d_rest * (v - incoming * read[..., size:, :])).sum(-1, keepdim=True)
        d_incoming = (d_output * read[..., :size, :]).sum(-1, keepdim=True)
        d_incoming -= beta * (d_rest * read[..., size:, :]).sum(-1, keepdim=True)
        d_within = (d_output @ written.mT).mul_(pairs)  # [n, M, G, C, C], times the decays
        d_system = (d_rest @ written.mT).neg_().tril_(-1).mul_(pairs)
        d_scores = torch.cat((d_within.sum(2), (d_system * beta).sum(2)), dim=2)  # [n, M, 2C, C]
        d_system.mul_(scores[:, :, None, size:])
        d_beta += d_system.sum(-1, keepdim=True)
        d_pairs = d_within.mul_(scores[:, :, None, :size]).addcmul_(d_system, beta)
        d_sums = d_pairs.sum(-1, keepdim=True) - d_pairs.sum(-2)[..., None] + d_incoming * incoming
        d_outgoing *= outgoing
        d_sums -= d_outgoing
        d_sums[..., -1:, :] += d_outgoing.sum(-2, keepdim=True) + d_kept * kept

        d_qk = d_reads @ states.mT + d_scores @ k  # [n, M, 2C, H]
        d_k = d_qk[:, :, size:] + d_scores.mT @ qk + _side_by_side(written * outgoing) @ d_states.mT
        d_g = d_sums.flip(-2).cumsum(-2).flip(-2)
        d_q, d_k = (_key_tokens(x, ctx.shape) for x in (d_qk[:, :, :size], d_k))
        d_v, d_g, d_beta = (_value_tokens(x, ctx.shape) for x in (d_rest * beta, d_g, d_beta))
        return d_q, d_k, d_v, d_g[..., 0], d_beta[..., 0], _state_by_head(d_state, key_heads, groups), None, None


def _decays(g: torch.Tensor, segments: torch.Tensor | None, batch: int, size: int) -> tuple[torch.Tensor, ...]:
    """What is left of one token's write, of the incoming state, of a write at the chunk's end, of the state there.

    Args:
        g: [n, M, G, C, 1]; segments: [B, T] or None.

    Returns:
        [n, M, G, C, C] (read by row, written by column), [n, M, G, C, 1], [n, M, G, C, 1], [n, M, G, 1, 1]. All lie
        between 0 and 1.
    """
    sums = g.cumsum(-2)
    last = sums[..., -1:, :]
    pairs = _exp(sums - sums.mT).tril_()
    incoming, outgoing, kept = _exp(sums.clone()), _exp(last - sums), _exp(last.clone())
    if segments is not None:
        short = -segments.shape[1] % size
        segments = torch.cat((segments, segments[:, -1:].expand(-1, short)), dim=1)
        segments = segments.view(batch, -1, size).transpose(0, 1)[:, :, None, None, :, None]  # [n, B, 1, 1, C, 1]
        end = segments[..., -1:, :]
        begin = torch.cat((torch.zeros_like(end[:1]), end[:-1]))  # the segment the incoming state belongs to
        pairs.unflatten(1, (batch, -1)).mul_(segments == segments.mT)
        incoming, outgoing, kept = (
            (x.unflatten(1, (batch, -1)) * same).flatten(1, 2)
            for x, same in ((incoming, segments == begin), (outgoing, segments == end), (kept, end == begin))
        )
    return pairs, incoming, outgoing, kept


def _exp(x: torch.Tensor) -> torch.Tensor:
    """e ** x in place for x <= 0, and 0 where it is below fp32's precision by far; anything finite for x > 0."""
    return F.threshold_(x.clamp_(-FORGOTTEN, 0).exp_(), 2 * math.exp(-FORGOTTEN), 0.0)


def _inverse(system: torch.Tensor) -> torch.Tensor:
    """(I + the part of `system` below the diagonal) ** -1, [..., C, C]. Its entries are bounded: see the rule's form."""
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system, identity.expand_as(system), upper=False, unitriangular=True)


def _padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, heads, X] with zeros up to whole chunks: tokens that neither decay nor write."""
    short = -x.shape[1] % size
    return F.pad(x, (0, 0, 0, 0, 0, short)) if short else x


def _key_chunks(x: torch.Tensor, size: int) -> torch.Tensor:
    """[B, T, K, H] -> [n, M, C, H]."""
    return _padded(x, size).unflatten(1, (-1, size)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _key_tokens(x: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """[n, M, C, H] -> [B, T, K, H]."""
    batch, length, heads = shape
    return x.unflatten(1, (batch, heads)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length]


def _value_chunks(x: torch.Tensor, key_heads: int, size: int) -> torch.Tensor:
    """[B, T, N, X] -> [n, M, G, C, X], contiguous."""
    x = _padded(x, size).unflatten(2, (key_heads, -1)).unflatten(1, (-1, size))  # [B, n, C, K, G, X]
    return x.permute(1, 0, 3, 4, 2, 5).contiguous().flatten(1, 2)


def _value_tokens(x: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """[n, M, G, C, X] -> [B, T, N, X]."""
    batch, length, heads = shape
    return x.unflatten(1, (batch, heads)).permute(1, 0, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length]


def _by_head(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[..., C, G V] -> [..., G, C, V], a view."""
    return x.unflatten(-1, (groups, -1)).transpose(-2, -3)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """[..., G, C, V] -> [..., C, G V], a copy: value heads of a key head, side by side, share products with k."""
    return x.transpose(-2, -3).flatten(-2)


def _scaled(state: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[M, H, G V] times [M, G, 1, 1]."""
    return (state.unflatten(-1, (kept.shape[1], -1)) * kept.transpose(1, 2)).flatten(-2)


def _state_by_head(state: torch.Tensor, key_heads: int, groups: int) -> torch.Tensor:
    """[M, H, G V] -> [B, N, H, V]."""
    return _by_head(state, groups).unflatten(0, (-1, key_heads)).flatten(1, 2).contiguous()
