"""Two modules that should be the same function: outputs, and gradients of the input and of every parameter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


@torch.no_grad()
def randomise(module: nn.Module, spread: float = 0.2, seed: int = 1) -> nn.Module:
    """Every parameter from a normal distribution of this deviation: no norm stays 1 and no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(std=spread, generator=generator)
    return module


def outputs_and_gradients(
    module: nn.Module,
    x: torch.Tensor,
    call: Callable[[torch.Tensor], torch.Tensor | tuple] | None = None,
    gradient: float = 1.0,
) -> dict[str, torch.Tensor]:
    """The output of `call` (default: the module), and the gradients of the input and of every parameter by name.

    The gradient of the output runs from -`gradient` to `gradient`. Of a tuple the first member is the output.
    """
    x = x.clone().requires_grad_()
    module.zero_grad()
    y = (call or module)(x)
    y = y[0] if isinstance(y, tuple) else y
    y.backward(torch.linspace(-gradient, gradient, y.numel()).view_as(y).to(y.dtype))
    gradients = {name.replace("shared_experts", "shared_expert"): p.grad for name, p in module.named_parameters()}
    return {"output": y.detach(), "input": x.grad} | gradients


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """The same names, and values equal within `tolerance`, absolute and relative."""
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
