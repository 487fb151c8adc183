"""Normalisation layers and the table that chooses one by `norm_type`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from minillm.compat.transformers_api import init
from minillm.models.configuration_minillm import MiniLLMConfig


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32; x's dtype out."""
    if x.is_cuda and x.dtype == weight.dtype and not torch.compiler.is_compiling():
        # One kernel in place of six, in fp32 inside as well; CPUs have none, and the compiler makes its own.
        return F.rms_norm(x, weight.shape, weight, eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in fp32 (Zhang and Sennrich, arXiv:1910.07467).

    Any shape [..., D] in and out, in the input's dtype.
    """

    def __init__(self, config: MiniLLMConfig, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ZeroCenteredRMSNorm(RMSNorm):
    """x / rms(x) * (1 + weight), weight 0 at first, so that decay pulls the scale to 1 (Qwen3-Next, Gemma)."""

    def __init__(self, config: MiniLLMConfig, size: int):
        super().__init__(config, size)
        nn.init.zeros_(self.weight)

    def init_weights(self, config: MiniLLMConfig) -> None:
        init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, 1.0 + self.weight.float(), self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / deviation * weight + bias (Ba et al., arXiv:1607.06450).

    Any shape [..., D] in and out, in the input's dtype; the kernel takes mean and variance in fp32. `rms_norm_eps` is
    the epsilon.
    """

    def __init__(self, config: MiniLLMConfig, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = config.rms_norm_eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


NORMS: dict[str, type[nn.Module]] = {
    "rmsnorm": RMSNorm,
    "zero_centered_rmsnorm": ZeroCenteredRMSNorm,
    "layernorm": LayerNorm,
}


def build_norm(config: MiniLLMConfig, size: int | None = None) -> nn.Module:
    """The normalisation of `config.norm_type` over `size` (default: the hidden size); ValueError for other names."""
    try:
        return NORMS[config.norm_type](config, size or config.hidden_size)
    except KeyError:
        raise ValueError(f"norm_type is {config.norm_type!r}: valid names are {', '.join(NORMS)}") from None
