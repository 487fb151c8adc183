"""Linear layers that multiply bf16 in fp32 where the processor has no bf16 instructions.

Contract: the parameters, state dict and results (to bf16 rounding) of nn.Linear. On a CPU without bf16 products (most
laptops, and servers before Cooper Lake) a bf16 product runs at about a quarter of the fp32 rate, so operands are
widened, multiplied in fp32 and the result rounded once: faster, and at least as accurate.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F
from torch import nn

# Below this many rows a product is bound by reading the weight, and widening it costs more than it saves.
MIN_ROWS_TO_WIDEN = 16


def _cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 product instructions: read from its feature flags, so that every run agrees."""
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


CPU_MULTIPLIES_BF16 = _cpu_multiplies_bf16()


def should_widen(x: torch.Tensor) -> bool:
    """True where products with `x` should run in fp32: bf16 on a CPU without bf16 instructions."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not CPU_MULTIPLIES_BF16


class _WidenedProduct(torch.autograd.Function):
    """x @ weight.T through fp32, which keeps the bf16 operands for backward and not their fp32 copies.

    It saves the parameter itself, never a view or a cast of it: under ZeRO-3 the parameter is emptied after forward
    and gathered again before the module's backward, and a saved parameter follows.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.float()
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ weight.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient.flatten(0, -2).t() @ x.flatten(0, -2).float()).to(weight.dtype)
        return of_x, of_weight


class Linear(nn.Linear):
    """nn.Linear, widened to fp32 where that is faster; [..., in_features] -> [..., out_features]."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not should_widen(x) or x.shape[:-1].numel() < MIN_ROWS_TO_WIDEN:
            return F.linear(x, self.weight, self.bias)
        if torch.compiler.is_compiling():  # the compiler fuses the casts and decides itself what to keep
            product = F.linear(x.float(), self.weight.float()).to(x.dtype)
        else:
            product = _WidenedProduct.apply(x, self.weight)
        return product if self.bias is None else product + self.bias
