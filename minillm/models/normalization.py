"""Normalisation layers and the table that chooses one by `norm_type`."""

from __future__ import annotations

import torch
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32 (Zhang and Sennrich, arXiv:1910.07467).

    Any shape [..., D] in and out, in the input's dtype.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm}


def build_norm(config: MiniLLMConfig) -> nn.Module:
    """The normalisation of `config.norm_type` over the hidden size; ValueError with the valid names otherwise."""
    try:
        return NORMS[config.norm_type](config)
    except KeyError:
        raise ValueError(f"norm_type is {config.norm_type!r}: valid names are {', '.join(NORMS)}") from None
