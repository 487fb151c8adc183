"""Grouped-query attention, of which multi-head and multi-query attention are the two ends (arXiv:2305.13245).

Shapes: B batch, T time (queries), S time (keys, cached ones included), D hidden, N query heads, K key/value heads,
H head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import Linear, should_widen
from minillm.models.positions import apply_rotary


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(H)) v.

    Args:
        query: [B, N, T, H]; key, value: [B, K, S, H] with K dividing N.
        mask: None for causal attention over T == S (or one query that sees all keys), else bool [B, 1, T, S] that
            never lets a query look ahead; where T == S what lies above the diagonal may not even be computed.

    Returns:
        [B, N, T, H] in the query's dtype.
    """
    dtype = query.dtype
    if should_widen(query):
        query, key, value = query.float(), key.float(), value.float()
    options = {"enable_gqa": query.shape[1] != key.shape[1]}
    if mask is None:
        output = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, **options)
    elif query.device.type == "cpu" and mask.shape[2] == mask.shape[3]:
        output = _attend_in_blocks(query, key, value, mask, **options)
    elif query.device.type == "cpu":
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, **options)
    else:
        # CUDA's memory-efficient kernel takes a mask but no shared heads; without it SDPA would hold [T, S] in memory.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output.to(dtype)


def _attend_in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, **options
) -> torch.Tensor:
    """Masked attention over T == S, a block of queries at a time against the keys up to the block's end.

    Every mask here is causal, and SDPA does not know it: whole-square attention computes the upper triangle for
    nothing. Forward + backward of 4 x 512 tokens, 8/2 heads of 64, fp32, one core: 104 ms whole, 83 ms in blocks; of
    1 x 2048 tokens 400 and 235 ms.
    """
    length = query.shape[2]
    block = max(128, length // 8)
    outputs = []
    for start in range(0, length, block):
        end = min(length, start + block)
        rows = mask[:, :, start:end, :end]
        outputs.append(
            F.scaled_dot_product_attention(
                query[:, :, start:end], key[:, :, :end], value[:, :, :end], attn_mask=rows, **options
            )
        )
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


class GroupedQueryAttention(nn.Module):
    """Causal self-attention with N query heads sharing K key/value heads, rotary positions and a cache."""

    def __init__(self, config: MiniLLMConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        query_width = config.num_attention_heads * config.head_dim
        key_value_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width, bias=False)
        self.k_proj = Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = Linear(query_width, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]; `positions` is what RotaryEmbedding returned."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = apply_rotary(self.q_proj(hidden_states).view(shape), positions).transpose(1, 2)  # [B, N, T, H]
        key = apply_rotary(self.k_proj(hidden_states).view(shape), positions).transpose(1, 2)  # [B, K, T, H]
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)  # [B, K, S, H]
        mixed = attend(query, key, value, attention_mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def build_attention_mask(
    length: int,
    device: torch.device,
    attention_mask: torch.Tensor | None = None,
    document_ids: torch.Tensor | None = None,
    past_key_values: Cache | None = None,
    layer_idx: int = 0,
    sliding_window: int | None = None,
) -> torch.Tensor | None:
    """The mask all attention layers of one kind share in one forward.

    Args:
        length: T, the number of new tokens.
        attention_mask: 0/1 [B, cached + T], 0 at padding; or a finished causal mask [B, 1, T, S], returned as it is.
        document_ids: [B, T], equal within a document; only without cached tokens.
        past_key_values: the cache, before this forward's keys are added.
        layer_idx: a layer of this kind, whose part of the cache is asked.
        sliding_window: tokens a query sees, itself included.

    Returns:
        None where plain causal attention over the T new tokens (or one query that sees everything) is right, else
        bool [B, 1, T, S], True where a query may look. Every query may look at itself, padding included, so that no
        row is empty: softmax over nothing is NaN on some backends.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask
    num_cached = 0 if past_key_values is None else past_key_values.get_seq_length(layer_idx)
    num_keys, offset = (length, 0) if past_key_values is None else past_key_values.get_mask_sizes(length, layer_idx)
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    fits = offset + num_keys == num_cached + length  # false for a static cache, whose tail holds no tokens yet
    in_window = sliding_window is None or num_keys <= sliding_window
    if attention_mask is None and document_ids is None and fits and in_window and (length == 1 or not num_cached):
        return None
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
