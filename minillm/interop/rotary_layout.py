"""Two layouts of the rotated dimensions of a head, and the permutation of weight rows between them.

Interleaved (DeepSeek, RoFormer): pair i is dimensions (2 i, 2 i + 1). Half-split (Llama, minillm): pair i is
(i, i + R / 2), R dimensions rotating. Queries and keys permuted alike have the same products, so a weight whose rows
are permuted computes the same attention in the other layout.
"""

from __future__ import annotations

import torch


def interleaved_to_split(weight: torch.Tensor, num_heads: int, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """Permute the last `rotary_dim` rows of each head from the interleaved to the half-split layout.

    Args:
        weight: [num_heads * head_dim, ...], a product's weight or its bias. For a product whose rotating rows come
            once behind others (kv_a_proj_with_mqa), that is one head of all its rows.

    Returns:
        A new tensor of the same shape and dtype.

    Raises:
        ValueError: the rows are not num_heads * head_dim, or rotary_dim is odd or above head_dim.
    """
    order = torch.cat((torch.arange(0, rotary_dim, 2), torch.arange(1, rotary_dim, 2)))
    return _permute(weight, order, num_heads, head_dim, rotary_dim)


def split_to_interleaved(weight: torch.Tensor, num_heads: int, head_dim: int, rotary_dim: int) -> torch.Tensor:
    """The inverse of `interleaved_to_split`, with the same arguments."""
    order = torch.arange(rotary_dim).view(2, -1).t().flatten() if rotary_dim % 2 == 0 else torch.empty(0)
    return _permute(weight, order, num_heads, head_dim, rotary_dim)


def _permute(weight: torch.Tensor, order: torch.Tensor, num_heads: int, head_dim: int, rotary_dim: int) -> torch.Tensor:
    if weight.shape[0] != num_heads * head_dim:
        raise ValueError(f"a weight of {weight.shape[0]} rows does not hold {num_heads} heads of {head_dim}")
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(f"{rotary_dim} of {head_dim} dimensions cannot rotate: pairs need an even number of them")
    still = head_dim - rotary_dim
    rows = torch.cat((torch.arange(still), still + order.long()))
    heads = weight.unflatten(0, (num_heads, head_dim))
    return heads.index_select(1, rows.to(weight.device)).flatten(0, 1)
