"""fp32 weights, moments and gradients by parameter name, whatever the ZeRO stage, ranks and expert parallelism.

Contract: `read_full_state` gathers one tensor at a time, in the same order on every rank (every call is a collective);
`write_full_state` takes whole tensors and keeps this rank's part. Nothing is probed: which tensors exist follows from
the optimizer, because a key that is missing on one rank only would leave the others waiting in an all-reduce.
Checked against DeepSpeed 0.19.8, ZeRO 0 (fp32), 1, 2, 3, with and without CPU offload.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from minillm.compat.deepspeed_api import (
    base_optimizer,
    dynamic_loss_scaler,
    full_shape,
    is_partitioned,
    is_sharded,
    own_partition,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from minillm.training.expert_parallel import WholeParameter, whole_parameters
from minillm.training.optim import MOMENTS, moments_of, optimizer_name


def has_state(engine, whole: WholeParameter, kind: str) -> bool:
    """Whether a parameter has this kind of tensor: every one "weight" and "gradient", moments by its optimizer."""
    return kind not in MOMENTS or kind in moments_of(optimizer_name(base_optimizer(engine)), whole.name, whole.shape)


def read_full_state(engine, kinds: tuple[str, ...]) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (parameter name, kind, fp32 tensor on the CPU) for every whole parameter that has the kind, kind by kind.

    Args:
        kinds: of "weight", MOMENTS, "gradient" (the last between backward and step).
    """
    for kind in kinds:
        for whole in whole_parameters(engine.module):
            if not has_state(engine, whole, kind):
                continue
            parts = [_read_part(engine, part, kind).detach().reshape(full_shape(part)) for part in whole.parts]
            yield whole.name, kind, whole.join(parts).float().cpu()


def _read_part(engine, parameter: torch.nn.Parameter, kind: str) -> torch.Tensor:
    if kind == "gradient":
        return safe_get_full_grad(parameter)
    if not is_sharded(parameter):  # a copy, as the others are
        return (parameter.data if kind == "weight" else base_optimizer(engine).state[parameter][kind]).clone()
    return safe_get_full_fp32_param(parameter) if kind == "weight" else safe_get_full_optimizer_state(parameter, kind)


def write_full_state(engine, kind: str, tensor_of: Callable[[str], torch.Tensor]) -> None:
    """Set the master weight or moment of every parameter that has the kind from whole tensors.

    Args:
        kind: "weight" or one of MOMENTS.
        tensor_of: whole fp32 tensor by parameter name.
    """
    for whole in whole_parameters(engine.module):
        if not has_state(engine, whole, kind):
            continue
        value = tensor_of(whole.name)
        if value.shape != whole.shape:
            raise ValueError(f"{whole.name}: {tuple(value.shape)} does not fit {tuple(whole.shape)}")
        for part, own in zip(whole.parts, whole.split(value), strict=True):
            _write_part(engine, part, kind, own)


def _write_part(engine, parameter: torch.nn.Parameter, kind: str, value: torch.Tensor) -> None:
    if not is_sharded(parameter):
        target = parameter.data if kind == "weight" else base_optimizer(engine).state[parameter][kind]
        target.copy_(value)
    elif is_partitioned(parameter):  # safe_set_full_* fails where ranks do not divide a parameter
        part = own_partition(parameter, value)
        if kind == "weight":
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, kind)
    elif kind == "weight":
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, kind)


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


def loss_scale_state(engine) -> dict[str, float] | None:
    """The counters of fp16's dynamic loss scale, None where there is none."""
    scaler = dynamic_loss_scaler(engine)
    return None if scaler is None else {name: getattr(scaler, name) for name in _SCALER_STATE}


def restore_loss_scale(engine, state: dict[str, float]) -> None:
    """Set those counters; nothing where a run goes on in another precision."""
    scaler = dynamic_loss_scaler(engine)
    for name in _SCALER_STATE if scaler is not None else ():
        setattr(scaler, name, state[name])
