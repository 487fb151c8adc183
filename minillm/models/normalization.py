"""Normalisation layers and the table that chooses one by `norm_type`."""

from __future__ import annotations

import torch
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32 (Zhang and Sennrich, arXiv:1910.07467).

    Any shape [..., D] in and out, in the input's dtype.
    """

    def __init__(self, config: MiniLLMConfig, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS: dict[str, type[nn.Module]] = {"rmsnorm": RMSNorm}


def build_norm(config: MiniLLMConfig, size: int | None = None) -> nn.Module:
    """The normalisation of `config.norm_type` over `size` (default: the hidden size); ValueError for other names."""
    try:
        return NORMS[config.norm_type](config, size or config.hidden_size)
    except KeyError:
        raise ValueError(f"norm_type is {config.norm_type!r}: valid names are {', '.join(NORMS)}") from None
