"""What training does for experts beyond the gradient: the biases that balance them.

Contract: called once an optimizer step with the counts of the global batch, so that any split into ranks and
micro-batches moves the biases alike.
"""

from __future__ import annotations

import torch
from torch import nn


def update_router_biases(model: nn.Module, expert_counts: torch.Tensor | None) -> None:
    """Balancing without a loss (DeepSeek-V3, arXiv:2412.19437, section 2.1.2), for every router that has biases.

    Args:
        expert_counts: [sparse layers, E], tokens of the global batch that each expert got; None without experts.
    """
    if expert_counts is None:
        return
    routers = [module.gate for module in model.modules() if hasattr(module, "gate") and hasattr(module, "experts")]
    for router, counts in zip(routers, expert_counts, strict=True):
        if hasattr(router, "update_bias"):
            router.update_bias(counts)
