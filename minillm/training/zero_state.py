"""fp32 weights and AdamW moments by parameter name, whatever the ZeRO stage and the number of ranks.

Contract: `read_full_state` gathers one tensor at a time, in the same order on every rank (every call is a collective);
`write_full_state` takes whole tensors and keeps this rank's part. Nothing is probed: which tensors exist follows from
the optimizer, because a key that is missing on one rank only would leave the others waiting in an all-reduce.
Checked against DeepSpeed 0.19.8, ZeRO 0 (fp32), 1, 2, 3, with and without CPU offload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

MOMENTS = ("exp_avg", "exp_avg_sq")


def base_optimizer(engine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's ZeRO wrapper (or the optimizer itself at stage 0)."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def named_trainable(engine) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """The whole tensor's shape; at ZeRO-3 the parameter itself is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def link_optimizer_states(engine) -> None:
    """Link the moments of every parameter group to its parameters.

    ZeRO-1/2 links after the first group's first step, when later groups have no state yet; so unlink and link again.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "_hp_optimizer_states_linked"):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def read_full_state(engine, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (parameter name, kind, fp32 tensor on the CPU) for every parameter, kind by kind.

    Args:
        kinds: of "weight", "exp_avg", "exp_avg_sq".
    """
    base = base_optimizer(engine)
    for kind in kinds:
        for name, parameter in named_trainable(engine):
            if not is_sharded(parameter):
                tensor = parameter.data if kind == "weight" else base.state[parameter][kind]
            elif kind == "weight":
                tensor = safe_get_full_fp32_param(parameter)
            else:
                tensor = safe_get_full_optimizer_state(parameter, kind)
            yield name, kind, tensor.detach().reshape(full_shape(parameter)).float().cpu()


def write_full_state(engine, kind: str, tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Set every parameter's master weight or moment from whole tensors.

    Args:
        kind: "weight", "exp_avg" or "exp_avg_sq".
        tensor_of: whole fp32 tensor by parameter name.
    """
    base = base_optimizer(engine)
    for name, parameter in named_trainable(engine):
        value = tensor_of(name)
        if value.shape != full_shape(parameter):
            raise ValueError(f"{name}: {tuple(value.shape)} does not fit {tuple(full_shape(parameter))}")
        if not is_sharded(parameter):
            target = parameter.data if kind == "weight" else base.state[parameter][kind]
            target.copy_(value)
        elif hasattr(parameter, "ds_id"):
            _write_partition(parameter, kind, value)
        elif kind == "weight":
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, kind)


def is_sharded(parameter: torch.nn.Parameter) -> bool:
    """False at ZeRO-0, where parameters and states are ordinary tensors."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _write_partition(parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    """ZeRO-3: this rank's slice of the zero-padded flat tensor (safe_set_full_* fails where ranks do not divide it)."""
    size = parameter.ds_tensor.numel()
    optimizer = parameter._z3_optimizer
    ranks = optimizer._get_param_partition_world_size(parameter)
    flat = torch.zeros(size * ranks, dtype=torch.float32)
    flat[: value.numel()] = value.reshape(-1)
    part = flat.narrow(0, size * optimizer._get_param_partition_rank(parameter), size).to(parameter.ds_tensor.device)
    if kind == "weight":
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, kind)


def reset_optimizer_state(engine, optimizer_step: int) -> None:
    """Zero all moments and set AdamW's step counters (in the states and in the groups)."""
    base = base_optimizer(engine)
    for state in base.state.values():
        for key, value in state.items():
            if torch.is_tensor(value):
                value.fill_(optimizer_step) if key == "step" else value.zero_()
            elif key == "step":
                state[key] = optimizer_step
    for group in base.param_groups:
        if "step" in group:
            group["step"] = optimizer_step


_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def dynamic_loss_scaler(engine):
    """fp16's loss scaler, None in other precisions and with a fixed scale."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


def loss_scale_state(engine) -> dict[str, float] | None:
    """The counters of fp16's dynamic loss scale, None where there is none."""
    scaler = dynamic_loss_scaler(engine)
    return None if scaler is None else {name: getattr(scaler, name) for name in _SCALER_STATE}


def restore_loss_scale(engine, state: dict[str, float]) -> None:
    """Set those counters; nothing where a run goes on in another precision."""
    scaler = dynamic_loss_scaler(engine)
    for name in _SCALER_STATE if scaler is not None else ():
        setattr(scaler, name, state[name])
