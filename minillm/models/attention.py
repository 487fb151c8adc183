"""Grouped-query attention, of which multi-head and multi-query attention are the two ends (arXiv:2305.13245).

Contract: `attend` is the one place where queries meet keys; which tokens a query sees is decided by the masks of
build_attention_mask, once a forward. Biases, norms on queries and keys, an output gate, sliding windows and dropout
are options on the same path.

Shapes: B batch, T time (queries), S time (keys, cached ones included), D hidden, N query heads, K key/value heads,
H head dim, V head dim of the values.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Cache

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.cpu_attention import attend_documents, attend_on_cpu, is_causal, splits_documents
from minillm.models.linear import Linear, should_widen
from minillm.models.normalization import build_norm
from minillm.models.positions import apply_rotary

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch, or a build without it: documents are masked instead
    varlen_attn = None
_VARLEN_OPTIONS = set() if varlen_attn is None else set(inspect.signature(varlen_attn).parameters)
if "window_size" not in _VARLEN_OPTIONS:
    varlen_attn = None


class PackedDocuments(NamedTuple):
    """A mask as borders: causal attention within documents that lie end to end in the rows of a batch.

    Made where documents can be attended to one by one, without what a dense mask would compute and drop: by the
    variable-length kernel on CUDA, and on the CPU.
    """

    # int32 [documents + 1], where they begin in the flattened batch, and at the end its length (which may come several
    # times: documents of no tokens); None: one a row.
    borders: torch.Tensor | None
    window: int | None = None  # tokens a query sees, itself included

    def dense(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """The same as bool [B, 1, T, T] (B = 1 where every row is one document)."""
        places = torch.arange(length, device=device)
        mask = places <= places[:, None]
        if self.window is not None:
            mask = mask & (places > places[:, None] - self.window)
        if self.borders is None:
            return mask[None, None]
        tokens = torch.arange(batch * length, device=device, dtype=self.borders.dtype)
        document = torch.searchsorted(self.borders, tokens, right=True).view(batch, 1, length)
        return mask & (document[..., None] == document[..., None, :])


def document_borders_of(document_ids: torch.Tensor) -> torch.Tensor:
    """int32 [documents + 1], the borders between runs of equal numbers in document_ids [B, T], rows end to end.

    One wait for the device, to count them: a loader knows them beforehand.
    """
    begins = F.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=begins.numel()).int()


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | PackedDocuments | None,
    dropout: float = 0.0,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """softmax(scale q k^T) v.

    Args:
        query: [B, N, T, H]; key: [B, K, S, H] with K dividing N; value: [B, K, S, V].
        mask: None for causal attention over T == S (or one query that sees all keys), else bool [B, 1, T, S] that
            never lets a query look ahead; where T == S what lies above the diagonal may not even be computed.
        dropout: probability of dropping an attention weight.
        scale: 1 / sqrt(H) when absent.
        window: a promise that `mask` lets no query look further back than so many tokens, itself included.

    Returns:
        [B, N, T, V] in the query's dtype.
    """
    dtype = query.dtype
    if should_widen(query):
        query, key, value = query.float(), key.float(), value.float()
    if isinstance(mask, PackedDocuments):
        if _kernel_takes(query, value, dropout):
            return _attend_packed(query, key, value, mask, scale)
        if query.device.type == "cpu" and mask.window is None and mask.borders is not None:
            return attend_documents(query, key, value, mask.borders, dropout, scale).to(dtype)
        mask = mask.dense(query.shape[0], query.shape[2], query.device)
    if query.device.type == "cpu":
        output = attend_on_cpu(query, key, value, mask, window, dropout_p=dropout, scale=scale)
    elif mask is None:
        shared = query.shape[1] != key.shape[1]
        output = F.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal(query), enable_gqa=shared, dropout_p=dropout, scale=scale
        )
    elif query.shape[2] == 1 and query.shape[1] != key.shape[1]:
        output = _attend_from_one_token(query, key, value, mask, dropout_p=dropout, scale=scale)
    else:
        # CUDA's memory-efficient kernel takes a mask but no shared heads; without it SDPA would hold [T, S] in memory.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
    return output.to(dtype)


def _attend_from_one_token(query, key, value, mask: torch.Tensor, **options) -> torch.Tensor:
    """T = 1: query heads that share a key head are rows of one product, and nothing is repeated."""
    rows = query.unflatten(1, (key.shape[1], -1)).squeeze(3)  # [B, K, N / K, H]
    return F.scaled_dot_product_attention(rows, key, value, attn_mask=mask, **options).flatten(1, 2).unsqueeze(2)


def _kernel_takes(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    """Whether the variable-length kernel (FlashAttention 2) has these types and widths."""
    return (
        varlen_attn is not None
        and not dropout
        and query.device.type == "cuda"
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and value.shape[-1] <= query.shape[-1] <= 256
    )


def _attend_packed(query, key, value, packed: PackedDocuments, scale: float | None) -> torch.Tensor:
    """`attend` by the variable-length kernel, which sees the batch as one long row of documents."""
    batch, _, length, width = query.shape
    borders, value_dim = packed.borders, value.shape[-1]
    if borders is None:
        borders = torch.arange(0, (batch + 1) * length, length, device=query.device, dtype=torch.int32)
    if value_dim < width:
        value = F.pad(value, (0, width - value_dim))
    query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B T, N or K, H]
    options = {"scale": scale, "window_size": (-1 if packed.window is None else packed.window - 1, 0)}  # itself apart
    if "enable_gqa" in _VARLEN_OPTIONS:  # torch 2.11 has no such argument, and its kernel shares heads all the same
        options["enable_gqa"] = query.shape[1] != key.shape[1]
    # The longest document is not known without waiting for the device; a bound is enough.
    output = varlen_attn(query, key, value, borders, borders, length, length, **options)
    return output.unflatten(0, (batch, length)).transpose(1, 2)[..., :value_dim]


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with N query heads sharing K key/value heads and a cache.

    Options: `attention_bias`; `qk_norm`, a norm over each query and key head before it rotates (Qwen3,
    arXiv:2505.09388); `attention_output_gate`, each head's output times the sigmoid of a gate that q_proj makes beside
    the query (Qwen3-Next; arXiv:2505.06708); `sliding_window` in sliding_attention layers; `attention_dropout`.
    """

    def __init__(self, config: MiniLLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.has_gate, self.has_norms = config.attention_output_gate, config.qk_norm
        self.dropout = config.attention_dropout
        is_sliding = config.layer_type_of(layer_idx) == "sliding_attention"
        self.window = config.sliding_window if is_sliding else None
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        hidden_size, bias = config.hidden_size, config.attention_bias
        self.q_proj = Linear(hidden_size, 2 * query_width if self.has_gate else query_width, bias=bias)
        self.k_proj = Linear(hidden_size, key_value_width, bias=bias)
        self.v_proj = Linear(hidden_size, key_value_width, bias=bias)
        self.o_proj = Linear(query_width, hidden_size, bias=bias)
        if self.has_norms:
            self.q_norm = build_norm(config, config.head_dim)
            self.k_norm = build_norm(config, config.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor | None = None,
        attention_mask: torch.Tensor | PackedDocuments | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; `positions` is the rotation [B, T, 1, R], or None where nothing rotates."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key = self.q_proj(hidden_states), self.k_proj(hidden_states).view(shape)  # [B, T, K, H]
        if self.has_gate:  # in q_proj's output each head's query is followed by its gate
            query, gate = query.view(*shape[:-1], 2 * self.head_dim).chunk(2, dim=-1)
        else:
            query = query.view(shape)  # [B, T, N, H]
        if self.has_norms:
            query, key = self.q_norm(query), self.k_norm(key)
        query = apply_rotary(query, positions).transpose(1, 2)  # [B, N, T, H]
        key = apply_rotary(key, positions).transpose(1, 2)  # [B, K, T, H]
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)  # [B, K, S, H]
        dropout = self.dropout if self.training else 0.0
        mixed = attend(query, key, value, attention_mask, dropout=dropout, window=self.window)
        mixed = mixed.transpose(1, 2).flatten(2)
        if self.has_gate:
            mixed = mixed * gate.flatten(2).sigmoid()
        return self.o_proj(mixed)


def build_attention_mask(
    length: int,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    document_borders: torch.Tensor | None = None,
    layer_idx: int = 0,
    sliding_window: int | None = None,
) -> torch.Tensor | PackedDocuments | None:
    """The mask all attention layers of one kind share in one forward.

    Args:
        length: T, the number of new tokens.
        attention_mask: 0/1 [B, cached + T], 0 at padding; or a finished causal mask [B, 1, T, S], returned as it is
            (where T == S, cut to the window).
        document_ids: [B, T], equal within a document, which is one run of neighbours; only without cached tokens.
        cache: the cache, before this forward's keys are added.
        document_borders: int32, the same as document_ids (PackedDocuments.borders), where they are known.
        layer_idx: a layer of this kind, whose part of the cache is asked.
        sliding_window: tokens a query sees, itself included.

    Returns:
        None where plain causal attention over the T new tokens (or one query that sees everything) is right, else
        bool [B, 1, T, S], True where a query may look. Every query may look at itself, padding included, so that no
        row is empty: softmax over nothing is NaN on some backends. On CUDA, where a kernel works from the borders of
        documents, PackedDocuments in place of a dense mask over T == S.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return _cut_to_window(attention_mask, sliding_window)
    num_cached = 0 if cache is None else cache.get_seq_length(layer_idx)
    num_keys, offset = (length, 0) if cache is None else cache.get_mask_sizes(length, layer_idx)
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    fits = offset + num_keys == num_cached + length  # false for a static cache, whose tail holds no tokens yet
    in_window = sliding_window is None or num_keys <= sliding_window
    if attention_mask is None and document_ids is None and fits and in_window and (length == 1 or not num_cached):
        return None
    if attention_mask is None and cache is None and packs(device):
        if document_ids is not None and document_borders is None:
            document_borders = document_borders_of(document_ids)
        return PackedDocuments(document_borders, sliding_window)
    if attention_mask is None and cache is None and document_ids is not None and in_window and device.type == "cpu":
        if document_borders is None and not torch.compiler.is_compiling():
            document_borders = document_borders_of(document_ids)
        if splits_documents(document_borders):
            return PackedDocuments(document_borders)
    queries = torch.arange(num_cached, num_cached + length, device=device)[:, None]
    keys = torch.arange(offset, offset + num_keys, device=device)[None, :]
    mask = (keys <= queries)[None, None]  # [1, 1, T, S]
    if sliding_window is not None:
        mask = mask & (keys > queries - sliding_window)
    if document_ids is not None:
        mask = mask & (document_ids[:, None, :, None] == document_ids[:, None, None, :])
    if attention_mask is not None:
        real = attention_mask.bool()
        real = F.pad(real, (0, max(0, offset + num_keys - real.shape[1])))[:, offset : offset + num_keys]
        mask = mask & real[:, None, None, :] | (keys == queries)
    return mask


def packs(device: torch.device) -> bool:
    """Whether masks are made as borders: where the kernel runs, and outside compiled graphs, since finding the borders
    has a result of varying size. (Layers that are compiled one by one get the mask from outside.)"""
    if varlen_attn is None or device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _cut_to_window(mask: torch.Tensor, window: int | None) -> torch.Tensor:
    """A finished mask, and no further back than the window; over cached tokens its maker has seen to that."""
    if window is None or mask.shape[2] != mask.shape[3] or mask.shape[2] <= window:
        return mask
    places = torch.arange(mask.shape[2], device=mask.device)
    beyond = places <= places[:, None] - window
    return mask.masked_fill(beyond, False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min)
