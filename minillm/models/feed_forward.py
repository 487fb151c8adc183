"""Which feed-forward block a layer has.

The seam: a dense block is built as Block(config, intermediate_size) and called as `block(x)`, [B, T, D] in and out. A
sparse one is built as SparseMoE(config) and called as `moe(x, counted)`; it returns its output and what its router did
(minillm.models.balancing.Routing), or None for the latter where `counted` is None.
"""

from __future__ import annotations

from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.mlp import build_dense_mlp
from minillm.models.moe import SparseMoE


def build_mlp(config: MiniLLMConfig, layer_idx: int) -> nn.Module:
    """The feed-forward block of one layer: experts where `mlp_layer_types` says sparse, else `mlp_type`."""
    if config.is_sparse(layer_idx):
        return SparseMoE(config)
    return build_dense_mlp(config, config.intermediate_size)
