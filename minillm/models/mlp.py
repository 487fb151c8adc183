"""Dense feed-forward blocks and the table that chooses one by `mlp_type`; [..., D] in and out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) without biases (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: MiniLLMConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh form, as GPT-2 has it (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_new": gelu_new}


class MLP(nn.Module):
    """down(activation(up(x))), two layers, with biases where `mlp_bias` says so (Vaswani et al., 2017, section 3.3)."""

    def __init__(self, config: MiniLLMConfig, intermediate_size: int):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


MLPS: dict[str, type[nn.Module]] = {"swiglu": SwiGLU, "mlp": MLP}


def build_dense_mlp(config: MiniLLMConfig, intermediate_size: int) -> nn.Module:
    """A dense block of `config.mlp_type`; ValueError with the valid names otherwise."""
    try:
        return MLPS[config.mlp_type](config, intermediate_size)
    except KeyError:
        raise ValueError(f"mlp_type is {config.mlp_type!r}: valid names are {', '.join(MLPS)}") from None
