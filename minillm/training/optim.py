"""The optimizers by name, their parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from minillm.compat.deepspeed_api import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from minillm.settings.run import OptimSection
from minillm.training.expert_parallel import whole_parameters
from minillm.training.muon import Muon, is_matrix, matrices_of

# What an optimizer keeps of a parameter, in fp32 and in the parameter's shape.
ADAMW_MOMENTS, MUON_MOMENTS = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
MOMENTS = (*ADAMW_MOMENTS, *MUON_MOMENTS)


def build_parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay on matrices and embeddings, none on vectors (norm weights and biases), as GPT-3 and Llama do.

    The biases of experts are stacked into matrices and are still biases. Experts that are shared out among ranks get
    groups of their own, as DeepSpeed asks, of the same weight decay.

    Returns:
        One group for each kind that has parameters, with a `name` (DeepSpeed asks for it).
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decays = [p.dim() >= 2 and not name.endswith("bias") for name, p in trainable]
    return _groups_of_experts([
        {"name": name, "params": [p for (_, p), d in zip(trainable, decays, strict=True) if d == decay],
         "weight_decay": weight_decay if decay else 0.0}
        for name, decay in (("decay", True), ("no_decay", False))
    ])  # fmt: skip


def _groups_of_experts(groups: list[dict]) -> list[dict]:
    """The groups without the empty ones, experts that are shared out in groups of their own."""
    if any(is_moe_param(p) for group in groups for p in group["params"]):
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """The optimizer of `optim.name` for a model, its experts shared out already."""
    return OPTIMIZERS[optim.name](model, optim)


def _build_adamw(model: nn.Module, optim: OptimSection) -> torch.optim.AdamW:
    """torch's fused AdamW: one kernel a group on CUDA, vectorised on the CPU (also for offloaded states)."""
    return torch.optim.AdamW(build_parameter_groups(model, optim.weight_decay), **_adamw_options(optim))


def _build_muon(model: nn.Module, optim: OptimSection) -> Muon:
    """Muon for the matrices of the decoder layers, the same AdamW for the rest."""
    shapes = {}
    for whole in whole_parameters(model):
        if is_matrix(whole.name, whole.shape):
            rows = _rows_of_parts(model, whole.name)
            for part in whole.parts:
                shapes[part] = matrices_of(whole.name, part.shape, rows, halves=len(whole.parts) == 1)
    groups = build_parameter_groups(model, optim.weight_decay)
    ratio = 1.0 if optim.muon_learning_rate is None else optim.muon_learning_rate / optim.learning_rate
    muon = {"muon": True, "momentum": optim.muon_momentum, "rate_ratio": ratio}
    split = []
    for group in groups:
        of_muon = [p for p in group["params"] if p in shapes]
        rest = [p for p in group["params"] if p not in shapes]
        name = group["name"] if group.get("moe") else "muon"  # of experts it is DeepSpeed's name of their ranks
        split += [{**group, **muon, "name": name, "params": of_muon}] if of_muon else []
        split += [{**group, "params": rest}] if rest else []
    return Muon(split, shapes, **_adamw_options(optim))


def _rows_of_parts(model: nn.Module, name: str) -> Sequence[int] | None:
    """Of a projection that makes q, k and v at once; None of any other."""
    layer, _, own = name.rpartition(".qkv_proj.weight")
    return None if own or not layer else model.get_submodule(layer).widths


def _adamw_options(optim: OptimSection) -> dict[str, object]:
    return {
        "lr": optim.learning_rate, "betas": (optim.adam_beta1, optim.adam_beta2), "eps": optim.adam_epsilon,
        "fused": True,
    }  # fmt: skip


OPTIMIZERS: dict[str, Callable[[nn.Module, OptimSection], torch.optim.AdamW]] = {
    "adamw": _build_adamw,
    "muon": _build_muon,
}


def moments_of(optimizer: str, name: str, shape: Sequence[int]) -> tuple[str, ...]:
    """The states that a parameter has after its first update; by its name and shape alone, the same on every rank.

    Args:
        optimizer: of OPTIMIZERS.
        name, shape: of the whole parameter, as a checkpoint has it.
    """
    return MUON_MOMENTS if optimizer == "muon" and is_matrix(name, shape) else ADAMW_MOMENTS


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """Its name in OPTIMIZERS."""
    return "muon" if isinstance(optimizer, Muon) else "adamw"


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
