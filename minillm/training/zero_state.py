"""fp32 weights, AdamW moments and gradients by parameter name, whatever ZeRO stage, ranks and expert parallelism.

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
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from minillm.training.expert_parallel import full_shape, whole_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")


def base_optimizer(engine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's ZeRO wrapper (or the optimizer itself at stage 0)."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def link_optimizer_states(engine) -> None:
    """Link the moments of every parameter group to its parameters.

    ZeRO-1/2 links after the first group's first step, when later groups have no state yet; so unlink and link again.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "_hp_optimizer_states_linked"):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def read_full_state(engine, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (parameter name, kind, fp32 tensor on the CPU) for every whole parameter, kind by kind.

    Args:
        kinds: of "weight", "exp_avg", "exp_avg_sq", "gradient" (the last between backward and step).
    """
    for kind in kinds:
        for whole in whole_parameters(engine.module):
            parts = [_read_part(engine, part, kind).detach().reshape(full_shape(part)) for part in whole.parts]
            yield whole.name, kind, whole.join(parts).float().cpu()


def _read_part(engine, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    if kind == "gradient":
        return safe_get_full_grad(parameter)
    if not is_sharded(parameter):  # a copy, as the others are
        return (parameter.data if kind == "weight" else base_optimizer(engine).state[parameter][kind]).clone()
    return safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)


def write_full_state(engine, kind: str, tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Set every parameter's master weight or moment from whole tensors.

    Args:
        kind: "weight", "exp_avg" or "exp_avg_sq".
        tensor_of: whole fp32 tensor by parameter name.
    """
    for whole in whole_parameters(engine.module):
        value = tensor_of(whole.name)
        if value.shape != whole.shape:
            raise ValueError(f"{whole.name}: {tuple(value.shape)} does not fit {tuple(whole.shape)}")
        for part, own in zip(whole.parts, whole.split(value), strict=True):
            _write_part(engine, part, kind, own)


def _write_part(engine, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    if not is_sharded(parameter):
        target = parameter.data if kind == "weight" else base_optimizer(engine).state[parameter][kind]
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
