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
C tokens of a chunk, n chunks, p chunks of a part, M = B K.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable

import torch
import torch.nn.functional as F

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
    q, k = (x.to(dtype) * torch.rsqrt(x.to(dtype).square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
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
    borders: torch.Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A chunk of tokens at a time. Arguments and results as of recurrent_gated_delta_rule, and:

    Args:
        segments: int64 [B, T], never falling along a row: the state begins at zero in each new segment, and
            segment 0 goes on from `initial_state`; absent: all is segment 0.
        borders: int64, where segments begin in the flattened batch and its length at the end; the same as `segments`,
            in the form that flash-linear-attention takes. With it the last state is None where that kernel runs.
        chunk_size: tokens in a chunk; a row need not fill its last one.
    """
    if v.is_cuda and v.dtype in (torch.bfloat16, torch.float16) and _has_flash_kernel(v.device):
        if segments is None:
            return flash_gated_delta_rule(q, k, v, g, beta, initial_state)
        if borders is not None and initial_state is None:
            joined = (x.flatten(0, 1)[None] for x in (q, k, v, g, beta))
            output, _ = flash_gated_delta_rule(*joined, borders=borders)
            return output.view_as(v), None
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, wide, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    state = first_state(initial_state, k, wide)
    # A power of two, so that a short prompt is not padded to a whole chunk and few shapes are compiled.
    size = min(chunk_size, 1 << (v.shape[1] - 1).bit_length())
    output, state = _Chunks.apply(q, k, wide, g, beta, state, segments, size)
    return output.to(v.dtype), state


def _flash_kernel() -> Callable | None:
    """flash-linear-attention's chunked rule; None where it is not installed. By name: nothing here requires it."""
    try:
        return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except (ImportError, RuntimeError, AttributeError, OSError):  # also a Triton without a driver, or of another age
        return None


flash_chunks = _flash_kernel()


@torch.compiler.assume_constant_result
def _has_flash_kernel(device: torch.device) -> bool:
    """Whether flash-linear-attention is there and right: on Hopper its backward pass is wrong with Triton 3.4 to 3.7.0,
    and raises (its issue 640), unless tilelang stands in."""
    if flash_chunks is None:
        return False
    if torch.cuda.get_device_capability(device)[0] != 9 or importlib.util.find_spec("tilelang") is not None:
        return True
    release = tuple(int(part) for part in re.findall(r"\d+", importlib.import_module("triton").__version__)[:3])
    return not (3, 4) <= release < (3, 7, 1)


def flash_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    borders: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """chunked_gated_delta_rule by flash-linear-attention's kernels: bf16 or fp16 on a GPU.

    With `borders` the batch is one row of segments, and no state comes back.
    """
    groups = v.shape[2] // k.shape[2]
    q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
    return flash_chunks(
        q,
        k,
        v,
        g=g,
        beta=beta.to(v.dtype),
        initial_state=initial_state,
        output_final_state=borders is None,
        cu_seqlens=borders,
        use_qk_l2norm_in_kernel=True,
    )


def first_state(initial: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """[B, N, H, V] in v's dtype: `initial`, or zeros."""
    if initial is not None:
        return initial.to(v.dtype)
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])


class _Chunks(torch.autograd.Function):
    """The chunked rule over unnormalised q and k, with its derivative written out.

    Written out because autograd would keep some twenty tensors of the size of v where eight do, and would fill a
    whole gradient for each chunk of each of them. Chunks are worked on in parts (see `_parts`): first what each chunk
    of a part needs by itself, then the states one after the other.
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, segments, size):
        batch, length, heads = k.shape[:3]
        groups = v.shape[2] // heads
        ctx.size, ctx.shape = size, (batch, length, heads)
        output = v.new_empty(batch, length + -length % size, *v.shape[2:])
        into = _chunked(output, heads, size)
        q, k, v, g, beta = (_chunked(x, heads, size) for x in (q, k, v, g[..., None], beta[..., None]))
        decays = _decays(g.flatten(1, 2), segments, batch, size)
        state = state.unflatten(1, (heads, groups)).flatten(0, 1).transpose(1, 2).flatten(2)  # [M, H, G V]
        saved = []
        for part in _parts(len(v), output.device):
            qk, lengths = _normalised(torch.cat((q[part], k[part]), dim=-2).flatten(1, 3))  # [p, M, 2C, H]
            values, steps = v[part].flatten(1, 2), beta[part].flatten(1, 2)  # [p, M, G, C, V], [p, M, G, C, 1]
            incoming, outgoing, kept, pairs = _decays_of(part, decays, batch)
            scores = qk @ qk[:, :, size:].mT  # [p, M, 2C, C]
            within = scores[:, :, None, :size] * pairs
            inverse = _inverse((scores[:, :, None, size:] * pairs).mul_(steps))
            states, written, outputs = [], torch.empty_like(values), torch.empty_like(values)
            for i in range(len(values)):
                states.append(state)
                read = _by_head(qk[i] @ state, groups)  # [M, G, 2C, V]
                rest = (values[i] - incoming[i] * read[:, :, size:]).mul_(steps[i])
                torch.matmul(inverse[i], rest, out=written[i])
                torch.matmul(within[i], written[i], out=outputs[i])
                outputs[i].addcmul_(incoming[i], read[:, :, :size])
                update = _side_by_side(written[i] * outgoing[i])  # [M, C, G V]
                state = torch.baddbmm(_scaled(state, kept[i]), qk[i, :, size:].mT, update)
            into[part] = outputs.unflatten(1, (batch, heads))
            states = _stacked(states)
            saved += [qk, lengths, values, steps, incoming, outgoing, kept, pairs, scores, inverse, states, written]
        ctx.save_for_backward(*saved)
        return output[:, :length], _state_by_head(state, heads, groups)

    @staticmethod
    def backward(ctx, d_output, d_state):
        saved, size, (batch, length, heads) = ctx.saved_tensors, ctx.size, ctx.shape
        groups, kinds = d_state.shape[1] // heads, 12
        rows = (batch, length + -length % size)
        d_state = d_state.unflatten(1, (heads, groups)).flatten(0, 1).transpose(1, 2).flatten(2)  # [M, H, G V]
        gradients = [
            d_output.new_empty(*rows, count, width)
            for count, width in (
                (heads, saved[0].shape[-1]),
                (heads, saved[0].shape[-1]),
                d_output.shape[2:],
                (heads * groups, 1),
                (heads * groups, 1),
            )
        ]
        d_output = _chunked(d_output, heads, size)
        into = [_chunked(x, heads, size) for x in gradients]  # of q, k, v, g, beta: [n, B, K, 1 or G, C, X]
        parts = _parts(len(d_output), d_output.device)
        for number, part in reversed(list(enumerate(parts))):
            tensors = saved[number * kinds : (number + 1) * kinds]
            d_state, d_qk, *d_values = _part_backward(tensors, d_output[part].flatten(1, 2), d_state, size)
            d_keys = (x[:, :, None] for x in d_qk.split(size, dim=2))
            for whole, gradient in zip(into, (*d_keys, *d_values)):
                whole[part] = gradient.unflatten(1, (batch, heads))
        d_q, d_k, d_v, d_g, d_beta = (x[:, :length] for x in gradients)
        return d_q, d_k, d_v, d_g[..., 0], d_beta[..., 0], _state_by_head(d_state, heads, groups), None, None


def _part_backward(saved: tuple[torch.Tensor, ...], d_output: torch.Tensor, d_state: torch.Tensor, size: int):
    """Gradients of a part's first state, qk, values, decays g and steps, from those of its outputs and last state."""
    qk, lengths, values, steps, incoming, outgoing, kept, pairs, scores, inverse, states, written = saved
    groups, k = values.shape[2], qk[:, :, size:]
    # The states, from the last chunk to the first.
    d_written = (scores[:, :, None, :size] * pairs).mT @ d_output  # [p, M, G, C, V]
    d_rest, d_outgoing, d_kept = torch.empty_like(values), torch.empty_like(steps), torch.empty_like(kept)
    d_reads = values.new_empty(len(values), qk.shape[1], 2, size, groups, values.shape[-1])
    d_reads_by_head, d_reads = d_reads.transpose(3, 4), d_reads.flatten(4).flatten(2, 3)  # the latter [p, M, 2C, G V]
    d_states = []
    for i in reversed(range(len(values))):
        d_states.append(d_state)
        d_update = _by_head(k[i] @ d_state, groups)  # [M, G, C, V]
        d_outgoing[i] = (written[i] * d_update).sum(-1, keepdim=True)
        torch.matmul(inverse[i].mT, d_written[i].addcmul_(outgoing[i], d_update), out=d_rest[i])
        d_reads_by_head[i, :, 0] = d_output[i] * incoming[i]
        d_reads_by_head[i, :, 1] = d_rest[i] * -(incoming[i] * steps[i])
        d_kept[i] = _by_head(states[i] * d_state, groups).sum((-1, -2), keepdim=True)
        d_state = torch.baddbmm(_scaled(d_state, kept[i]), qk[i].mT, d_reads[i])
    d_states = _stacked(d_states[::-1])
    # What each chunk did by itself.
    read = _by_head(qk @ states, groups)  # [p, M, G, 2C, V]
    d_steps = (d_rest * (values - incoming * read[..., size:, :])).sum(-1, keepdim=True)
    d_incoming = (d_output * read[..., :size, :]).sum(-1, keepdim=True)
    d_incoming -= steps * (d_rest * read[..., size:, :]).sum(-1, keepdim=True)
    d_within = (d_output @ written.mT).mul_(pairs)  # [p, M, G, C, C], times the decays
    d_system = (d_rest @ written.mT).neg_().tril_(-1).mul_(pairs)
    d_scores = torch.cat((d_within.sum(2), (d_system * steps).sum(2)), dim=2)  # [p, M, 2C, C]
    d_system.mul_(scores[:, :, None, size:])
    d_steps += d_system.sum(-1, keepdim=True)
    d_pairs = d_within.mul_(scores[:, :, None, :size]).addcmul_(d_system, steps)
    d_sums = d_pairs.sum(-1, keepdim=True) - d_pairs.sum(-2)[..., None] + d_incoming * incoming
    d_outgoing *= outgoing
    d_sums -= d_outgoing
    d_sums[..., -1:, :] += d_outgoing.sum(-2, keepdim=True) + d_kept * kept
    d_g = _running_sum(d_sums.flip(-2)).flip(-2)
    # q and k: by the reads, the scores, the written updates, and last through their norms.
    d_qk = d_reads @ states.mT + d_scores @ k  # [p, M, 2C, H]
    d_qk[:, :, size:] += d_scores.mT @ qk
    d_qk[:, :, size:] += _side_by_side(written * outgoing) @ d_states.mT
    along = (d_qk * qk).sum(-1, keepdim=True)
    along[:, :, :size] *= qk.shape[-1]
    d_qk = d_qk.addcmul_(qk, along, value=-1).mul_(lengths)
    return d_state, d_qk, d_rest * steps, d_g, d_steps


def _parts(count: int, device: torch.device) -> list[slice]:
    """Chunks worked on together: one by one on CPUs, whose caches hold a chunk of all heads; elsewhere all at once."""
    together = 1 if device.type == "cpu" and not torch.compiler.is_compiling() else count
    return [slice(start, start + together) for start in range(0, count, together)]


def _normalised(qk: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q over k [p, M, 2C, H] at unit length, q times H ** -0.5, in place; and what each was multiplied by."""
    lengths = (qk.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt_()
    lengths[:, :, : qk.shape[2] // 2] *= qk.shape[-1] ** -0.5
    return qk.mul_(lengths), lengths


def _decays(g: torch.Tensor, segments: torch.Tensor | None, batch: int, size: int):
    """The running sums of g [n, M, G, C, 1], and the decays of one value a token.

    Returns:
        The sums of the whole and of the fractional parts of g, [n, M, G, C, 1] each: one sum over strong decays would
        lose the weak ones in rounding. Then what is left, from 0 to 1, of the incoming state at each token, of each
        token's write at the chunk's end, both [n, M, G, C, 1], and of the incoming state there, [n, M, G, 1, 1]. Last,
        bool [n, B, 1, 1, C, C], which pairs are of one segment, or None.
    """
    g = g.clamp(min=-FORGOTTEN)
    whole = g.round()
    fraction, whole = _running_sum(g - whole), _running_sum(whole)
    incoming = _exp(whole + fraction)
    outgoing = _exp((whole[..., -1:, :] - whole).add_(fraction[..., -1:, :] - fraction))
    kept = incoming[..., -1:, :]
    if segments is None:
        return whole, fraction, incoming, outgoing, kept, None
    short = -segments.shape[1] % size
    segments = torch.cat((segments, segments[:, -1:].expand(-1, short)), dim=1)
    segments = segments.view(batch, -1, size).transpose(0, 1)[:, :, None, None, :, None]  # [n, B, 1, 1, C, 1]
    end = segments[..., -1:, :]
    begin = torch.cat((torch.zeros_like(end[:1]), end[:-1]))  # the segment the incoming state belongs to
    incoming, outgoing, kept = (
        (x.unflatten(1, (batch, -1)) * same).flatten(1, 2)
        for x, same in ((incoming, segments == begin), (outgoing, segments == end), (kept, end == begin))
    )
    return whole, fraction, incoming, outgoing, kept, segments == segments.mT


def _running_sum(x: torch.Tensor) -> torch.Tensor:
    """Along the last dimension but one; on CUDA cumsum adds up in an order that changes."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x.new_ones(x.shape[-2], x.shape[-2]).tril() @ x
    return x.cumsum(-2)


def _decays_of(part: slice, decays: tuple[torch.Tensor | None, ...], batch: int) -> list[torch.Tensor]:
    """Of a part: the decays of one value a token, and what is left of one token's write at another.

    The last is [p, M, G, C, C], read by row, written by column, from 0 to 1, and 0 above the diagonal.
    """
    whole, fraction, *of_tokens, same = decays
    whole, fraction = whole[part], fraction[part]
    pairs = _exp((whole - whole.mT).add_(fraction).sub_(fraction.mT)).tril_()
    if same is not None:
        pairs.unflatten(1, (batch, -1)).mul_(same[part])
    return [*(x[part] for x in of_tokens), pairs]


def _exp(x: torch.Tensor) -> torch.Tensor:
    """e ** x in place for x <= 0, and 0 where it is below fp32's precision by far; anything finite for x > 0."""
    return F.threshold_(x.clamp_(-FORGOTTEN, 0).exp_(), 2 * math.exp(-FORGOTTEN), 0.0)


def _inverse(system: torch.Tensor) -> torch.Tensor:
    """(I + the part of `system` below the diagonal) ** -1, [..., C, C].

    Its entries stay within -1 and 1: each is a key, taken through the steps I - beta k k^T between, times a key.
    """
    identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    return torch.linalg.solve_triangular(system, identity.expand_as(system), upper=False, unitriangular=True)


def _chunked(x: torch.Tensor, key_heads: int, size: int) -> torch.Tensor:
    """[B, T, K or N, X] -> [n, B, K, 1 or G, C, X]: a view where chunks fill T, else padded with zeros.

    Zeros are tokens that neither decay nor write.
    """
    if short := -x.shape[1] % size:
        x = F.pad(x, (0, 0, 0, 0, 0, short))
    return x.unflatten(2, (key_heads, -1)).unflatten(1, (-1, size)).permute(1, 0, 3, 4, 2, 5)


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


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
