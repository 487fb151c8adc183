"""Attention on the CPU: PyTorch's flash kernel, in pieces that leave out what a mask would drop.

Contract: the numbers of scaled_dot_product_attention to rounding. Masks with a square are taken in blocks of queries;
documents that lie end to end in rows one by one, and in bf16 by products written out: the kernel's backward pass runs
at a fifth of what the processor multiplies.

Shapes: B batch, T time, S keys, N query heads, K key/value heads, G = N / K, H head dim, V head dim of the values,
n tokens of a document.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

FEWEST_TOKENS = 32  # a document on average: below, calls cost more than the mask they spare
MOST_TOKENS = 512  # of a document whose [n, n] weights are kept for backward


def is_causal(query: torch.Tensor) -> bool:
    """Whether several queries [B, N, T, H] need a causal mask; a branch, because the compiler's own truth of a length
    that varies is nothing that SDPA takes."""
    if query.shape[2] > 1:
        return True
    return False


def attend_on_cpu(query, key, value, mask: torch.Tensor | None, window: int | None, **options) -> torch.Tensor:
    """attention.attend without PackedDocuments; `options` are scaled_dot_product_attention's dropout_p and scale."""
    options["enable_gqa"] = query.shape[1] != key.shape[1]
    value_dim, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing > 0:
        # The CPU's flash kernel wants one width. Forward + backward of 4 x 512 tokens, 12 heads of 96 and 64, one
        # core: 300 ms with zeros appended, 480 ms without.
        value = F.pad(value, (0, missing))
    if mask is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal(query), **options)
    elif mask.shape[2] == mask.shape[3]:
        output = _attend_in_blocks(query, key, value, mask, window, **options)
    else:
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    return output[..., :value_dim] if missing > 0 else output


def _attend_in_blocks(query, key, value, mask: torch.Tensor, window: int | None, **options) -> torch.Tensor:
    """Masked attention over T == S, a block of queries at a time against the keys that the block can see.

    Every mask here is causal, and SDPA does not know it: whole-square attention computes the upper triangle for
    nothing, and with a window most of the lower one. Forward + backward of 4 x 512 tokens, 8/2 heads of 64, fp32, one
    core: 104 ms whole, 83 ms in blocks; of 1 x 2048 tokens 400 and 235 ms.
    """
    length = query.shape[2]
    block = max(128, length // 8 if window is None else min(length // 8, window))
    outputs = []
    for begin in range(0, length, block):
        end = min(length, begin + block)
        first = 0 if window is None else max(0, begin - window + 1)
        rows = mask[:, :, begin:end, first:end]
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, begin:end], key[:, :, first:end], value[:, :, first:end], attn_mask=rows, **options
            )
        )
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def splits_documents(borders: torch.Tensor | None) -> bool:
    """Whether documents are attended to one by one; `borders` as of attention.PackedDocuments, on the CPU."""
    if borders is None or torch.compiler.is_compiling():
        return False
    total = int(borders[-1])
    return total >= FEWEST_TOKENS * int((borders < total).sum())


@torch.compiler.disable  # how many documents there are, and how long, is different in every batch
def attend_documents(query, key, value, borders: torch.Tensor, dropout_p: float, scale: float | None) -> torch.Tensor:
    """Causal attention within documents, [B, N, T, H], [B, K, T, H] and [B, K, T, V] -> [B, N, T, V]."""
    batch, _, length, width = query.shape
    lengths = [n for n in borders.diff().tolist() if n]
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B T, heads, width]
    if query.dtype == torch.bfloat16 and not dropout_p and max(lengths) <= MOST_TOKENS:
        joined = _WrittenOut.apply(query, key, value, lengths, width**-0.5 if scale is None else scale)
    else:  # each of the three is split once, so that its gradient is one concatenation
        parts = [x.transpose(0, 1)[None].split(lengths, dim=2) for x in (query, key, value)]
        outputs = [attend_on_cpu(q, k, v, None, None, dropout_p=dropout_p, scale=scale) for q, k, v in zip(*parts)]
        joined = torch.cat(outputs, dim=2)[0].transpose(0, 1)
    return joined.unflatten(0, (batch, length)).transpose(1, 2)


class _WrittenOut(torch.autograd.Function):
    """softmax(scale q k^T) v and its gradient, document by document: [B T, N, H], [B T, K, H], [B T, K, V].

    Scores and their gradients are fp32, as are sums inside the products. Forward + backward of 12 documents of 170
    tokens, 8/2 heads of 64, bf16, one core of a Zen 4: 31 ms, by the flash kernel 68 ms; of fp32, where there is
    nothing to win, 36 and 40 ms.
    """

    @staticmethod
    def forward(ctx, query, key, value, lengths: list[int], scale: float):
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        weights = []
        for part, n in _parts(lengths):
            q, k, v = _by_key_head(query[part], key.shape[1]), key[part].transpose(0, 1), value[part].transpose(0, 1)
            scores = (q.float() @ k.float().mT).mul_(scale).unflatten(1, (-1, n))  # [K, G, n, n]
            weight = scores.add_(_future(MOST_TOKENS)[:n, :n]).softmax(-1).to(query.dtype).flatten(1, 2)
            output[part] = _by_token(weight @ v, n)
            weights.append(weight)
        ctx.save_for_backward(query, key, value, output, *weights)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, output, *weights = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(x) for x in (query, key, value))
        # FlashAttention (arXiv:2205.14135), section B.2: each row's dot product of P and dP is that of O and dO.
        dots = (gradient.float() * output.float()).sum(-1, keepdim=True)  # [B T, N, 1]
        heads = key.shape[1]
        for (part, n), weight in zip(_parts(ctx.lengths), weights):
            q, g, dot = (_by_key_head(x[part], heads) for x in (query, gradient, dots))
            k, v = key[part].transpose(0, 1), value[part].transpose(0, 1)
            of_value[part] = (weight.mT @ g).transpose(0, 1)
            of_scores = (g.float() @ v.float().mT).sub_(dot).mul_(weight).mul_(ctx.scale).to(query.dtype)
            of_query[part] = _by_token(of_scores @ k, n)
            of_key[part] = (of_scores.mT @ q).transpose(0, 1)
        return of_query, of_key, of_value, None, None


def _parts(lengths: list[int]):
    """The place and the length of each document."""
    start = 0
    for n in lengths:
        yield slice(start, start + n), n
        start += n


def _by_key_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[n, N, W] -> [K, G n, W], a copy: rows that share a key head are rows of one product."""
    return x.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_token(x: torch.Tensor, n: int) -> torch.Tensor:
    """[K, G n, W] -> [n, N, W]."""
    return x.unflatten(1, (-1, n)).permute(2, 0, 1, 3).flatten(1, 2)


@functools.cache
def _future(size: int) -> torch.Tensor:
    """fp32 [size, size], -inf above the diagonal, else 0."""
    return torch.full((size, size), float("-inf")).triu(1)
