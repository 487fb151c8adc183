"""AdamW with decay groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from minillm.compat.deepspeed_api import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from minillm.config import OptimSection


def build_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay on matrices and embeddings, none on vectors (norm weights and biases), as GPT-3 and Llama do.

    The biases of experts are stacked into matrices and are still biases. Experts that are shared out among ranks get
    groups of their own, as DeepSpeed asks, of the same weight decay.

    Returns:
        One group for each kind that has parameters, with a `name` (DeepSpeed asks for it).
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p.dim() >= 2 and not name.endswith("bias") for name, p in trainable]
    groups = [
        {"name": name, "params": [p for (_, p), d in zip(trainable, decays, strict=True) if d == decay],
         "weight_decay": weight_decay if decay else 0.0}
        for name, decay in (("decay", True), ("no_decay", False))
    ]  # fmt: skip
    if any(is_moe_param(p) for _, p in trainable):
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """torch's fused AdamW: one kernel a group on CUDA, vectorised on the CPU (also for offloaded states)."""
    return torch.optim.AdamW(
        build_parameter_groups(model, optim.weight_decay),
        lr=optim.learning_rate,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_epsilon,
        fused=True,
    )


def learning_rate_at(step: int, max_steps: int, optim: OptimSection) -> float:
    """Learning rate of optimizer step `step` (0-based): linear warm-up, then cosine, warmup-stable-decay or constant.

    Cosine as in SGDR (arXiv:1608.03983, without restarts); WSD as in MiniCPM (arXiv:2404.06395) with a linear decay to
    min_learning_rate_ratio x learning_rate over the last decay_ratio of the run.
    """
    warmup = round(optim.warmup_ratio * max_steps)
    if step < warmup:
        return optim.learning_rate * (step + 1) / warmup
    return optim.learning_rate * SCHEDULES[optim.lr_schedule](step, warmup, max_steps, optim)


def _cosine(step: int, warmup: int, max_steps: int, optim: OptimSection) -> float:
    progress = (step - warmup) / max(1, max_steps - warmup)
    low = optim.min_learning_rate_ratio
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _wsd(step: int, warmup: int, max_steps: int, optim: OptimSection) -> float:
    decay = max(1, round(optim.decay_ratio * max_steps))
    left = min(1.0, (max_steps - step) / decay)
    return optim.min_learning_rate_ratio + (1 - optim.min_learning_rate_ratio) * left


def _constant(step: int, warmup: int, max_steps: int, optim: OptimSection) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[int, int, int, OptimSection], float]] = {
    "cosine": _cosine,
    "wsd": _wsd,
    "constant": _constant,
}
