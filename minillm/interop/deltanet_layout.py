"""Rows of gated DeltaNet's input products: ours are grouped by kind, transformers' by key head.

Contract: pure functions of tensors, each pair inverse to the other, any dtype; views or copies of the rows, never
arithmetic. `fields` is a mapping with linear_num_key_heads (K), linear_num_value_heads (N), linear_key_head_dim (H) and
linear_value_head_dim (V). ValueError where the number of rows does not fit them.

Ours                                                theirs (Qwen3NextGatedDeltaNet)
    qkv_proj.weight [2 K H + N V, D], z_proj.weight     in_proj_qkvz.weight: for each key head q [H], k [H], the v of
    [N V, D]: each kind head by head                    its N / K value heads [N / K V], their z [N / K V]
    b_proj.weight, a_proj.weight [N, D]                 in_proj_ba.weight: for each key head b [N / K], a [N / K]
    conv.weight [2 K H + N V, 1, kernel]                conv1d.weight, the same (its channels are grouped by kind)
    A_log, dt_bias, norm.weight, o_proj.weight          A_log, dt_bias, norm.weight, out_proj.weight, the same
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

# What only changes its name, ours to theirs.
SAME_TENSORS = {
    "conv.weight": "conv1d.weight",
    "A_log": "A_log",
    "dt_bias": "dt_bias",
    "norm.weight": "norm.weight",
    "o_proj.weight": "out_proj.weight",
}


def split_qkvz(weight: torch.Tensor, fields: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """in_proj_qkvz.weight [2 K H + 2 N V, D] -> qkv_proj.weight [2 K H + N V, D], z_proj.weight [N V, D]."""
    q, k, v, z = _ungrouped(weight, _rows_qkvz(fields), fields)
    return torch.cat((q, k, v)), z


def join_qkvz(qkv: torch.Tensor, z: torch.Tensor, fields: Mapping[str, int]) -> torch.Tensor:
    """The inverse of split_qkvz."""
    rows = [fields["linear_num_key_heads"] * each for each in _rows_qkvz(fields)]
    if qkv.shape[0] != sum(rows[:3]):
        raise ValueError(f"qkv_proj has {qkv.shape[0]} rows: the linear_ fields make it {sum(rows[:3])}")
    return _grouped((*qkv.split(rows[:3]), z), _rows_qkvz(fields), fields)


def split_ba(weight: torch.Tensor, fields: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """in_proj_ba.weight [2 N, D] -> b_proj.weight, a_proj.weight, [N, D] each."""
    return _ungrouped(weight, _rows_ba(fields), fields)


def join_ba(b: torch.Tensor, a: torch.Tensor, fields: Mapping[str, int]) -> torch.Tensor:
    """The inverse of split_ba."""
    return _grouped((b, a), _rows_ba(fields), fields)


def _rows_qkvz(fields: Mapping[str, int]) -> list[int]:
    """Rows of q, k, v and z for one key head."""
    values = fields["linear_num_value_heads"] // fields["linear_num_key_heads"] * fields["linear_value_head_dim"]
    return [fields["linear_key_head_dim"]] * 2 + [values] * 2


def _rows_ba(fields: Mapping[str, int]) -> list[int]:
    """Rows of b and a for one key head."""
    return [fields["linear_num_value_heads"] // fields["linear_num_key_heads"]] * 2


def _ungrouped(weight: torch.Tensor, rows: list[int], fields: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    """Rows grouped by key head, `rows` of each kind a head -> one tensor a kind."""
    heads = fields["linear_num_key_heads"]
    if weight.shape[0] != heads * sum(rows):
        raise ValueError(f"an input product has {weight.shape[0]} rows: the linear_ fields make it {heads * sum(rows)}")
    parts = weight.unflatten(0, (heads, sum(rows))).split(rows, dim=1)
    return tuple(part.flatten(0, 1) for part in parts)


def _grouped(parts: tuple[torch.Tensor, ...], rows: list[int], fields: Mapping[str, int]) -> torch.Tensor:
    """The inverse of _ungrouped."""
    heads = fields["linear_num_key_heads"]
    for part, each in zip(parts, rows):
        if part.shape[0] != heads * each:
            raise ValueError(f"an input product has {part.shape[0]} rows: the linear_ fields make it {heads * each}")
    return torch.cat([part.unflatten(0, (heads, each)) for part, each in zip(parts, rows)], dim=1).flatten(0, 1)
