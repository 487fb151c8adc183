"""Feed-forward blocks and the table that chooses one by `mlp_type`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer, arXiv:2002.05202); [..., D] in and out."""

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


MLPS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU}


def build_mlp(config: MiniLLMConfig, layer_idx: int) -> nn.Module:
    """The feed-forward block of one layer: `mlp_type` where `mlp_layer_types` says dense."""
    try:
        return MLPS[config.mlp_type](config)
    except KeyError:
        valid = ", ".join(MLPS)
        raise ValueError(f"mlp_type is {config.mlp_type!r} (layer {layer_idx}): valid names are {valid}") from None
