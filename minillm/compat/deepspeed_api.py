"""What of DeepSpeed is not public, documented API; see the package's contract. All of it was seen in 0.19.8.

- AutoEPLayer, AutoEPSpec, parse_autoep_options, count_tokens_per_expert: from `deepspeed.module_inject.auto_ep_*` and
  `deepspeed.moe.ep_count`, what `"expert_parallel"` of the JSON is made of.
- make_expert_parallel_groups, expert_parallel_group, forget_expert_parallel_groups: tables of `deepspeed.utils.groups`.
- base_optimizer, link_optimizer_states, set_counters, count_micro_step, gradient_overflowed,
  find_overflow_by_the_norm, dynamic_loss_scaler: attributes of the engine and of ZeRO's optimizers.
- is_partitioned, is_sharded, full_shape, own_partition: what ZeRO writes on a parameter.
- flat_partitions: what ZeRO's optimizers keep of their flat fp32 tensors (stage_1_and_2.py, stage3.py).
- leave_out_inference_ops: `deepspeed.ops.__compatible_ops__`.

The other names are documented and stand here so that one file shows all that is used: `MoE`, the parameter groups of
experts, `safe_get_*` and `safe_set_*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.module_inject.auto_ep_config import MoELayerSpec as AutoEPSpec
from deepspeed.module_inject.auto_ep_config import parse_autoep_config as parse_autoep_options
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer as AutoEPLayer
from deepspeed.moe.ep_count import count_tokens_per_expert
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer
from deepspeed.ops.op_builder.cpu.comm import ShareMemCommBuilder
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

__all__ = [
    "AutoEPLayer",
    "AutoEPSpec",
    "FlatPartition",
    "MoE",
    "Slice",
    "base_optimizer",
    "count_micro_step",
    "count_tokens_per_expert",
    "dynamic_loss_scaler",
    "expert_parallel_group",
    "find_overflow_by_the_norm",
    "flat_partitions",
    "forget_expert_parallel_groups",
    "full_shape",
    "gradient_overflowed",
    "is_moe_param",
    "is_partitioned",
    "is_sharded",
    "leave_out_inference_ops",
    "link_optimizer_states",
    "make_expert_parallel_groups",
    "own_partition",
    "parse_autoep_options",
    "safe_get_full_fp32_param",
    "safe_get_full_grad",
    "safe_get_full_optimizer_state",
    "safe_set_full_fp32_param",
    "safe_set_full_optimizer_state",
    "safe_set_local_fp32_param",
    "safe_set_local_optimizer_state",
    "set_counters",
    "split_params_into_different_moe_groups_for_optimizer",
]


def leave_out_inference_ops() -> None:
    """On CPUs DeepSpeed compiles a shared-memory all-reduce for inference at the first start; training does not use it.

    Asking for the table probes every operation, with a compiler and nvcc beside GPUs, where nobody should ask.
    """
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


# Expert-parallel groups: ranks that hold different experts of one layer


def make_expert_parallel_groups(size: int) -> None:
    """Groups of `size` neighbouring ranks, once."""
    if f"ep_size_{size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(size)


def expert_parallel_group(name: str) -> dist.ProcessGroup:
    return groups._get_expert_parallel_group(name)


def forget_expert_parallel_groups() -> None:
    """DeepSpeed keeps expert-parallel groups by name when the process group they belong to is gone."""
    for table in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP"):
        for name in (table, f"{table}_RANKS"):
            getattr(groups, name).clear()


# The engine and its optimizer


def base_optimizer(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The torch optimizer inside DeepSpeed's ZeRO wrapper (or the optimizer itself at stage 0)."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def link_optimizer_states(engine: deepspeed.DeepSpeedEngine) -> None:
    """Link the moments of every parameter group to its parameters.

    ZeRO-1/2 links after the first group's first step, when later groups have no state yet; so unlink and link again.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "_hp_optimizer_states_linked"):
        wrapper._hp_optimizer_states_linked = False
        wrapper._lazy_init_hp_params_optimizer_state()


def set_counters(engine: deepspeed.DeepSpeedEngine, step: int) -> None:
    """DeepSpeed's own counters: micro_steps decides where an accumulation ends."""
    engine.global_steps, engine.micro_steps = step, step * engine.gradient_accumulation_steps()
    engine.global_samples = step * engine.train_batch_size()
    engine.skipped_steps = 0


def count_micro_step(engine: deepspeed.DeepSpeedEngine) -> None:
    """What `engine.step()` counts, where it is not called."""
    engine.micro_steps += 1


def gradient_overflowed(engine: deepspeed.DeepSpeedEngine) -> bool:
    """Whether the last step was left out because a gradient was not finite; ZeRO-0 applies any gradient."""
    return getattr(engine.optimizer, "overflow", False)


def find_overflow_by_the_norm(engine: deepspeed.DeepSpeedEngine) -> None:
    """Leave out ZeRO-1's and ZeRO-2's look through every gradient for values that are not finite.

    It takes ten kernels a parameter (a quarter of what launches in a small model's step), and finds nothing that the
    norm does not: that is taken next, of the same gradients over all ranks, is not finite if one of them is not, and
    leaves the update out then.
    """
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() in (1, 2) and not wrapper.cpu_offload:
        wrapper.check_overflow = lambda partition_gradients=True: None


def dynamic_loss_scaler(engine: deepspeed.DeepSpeedEngine):
    """fp16's loss scaler, None in other precisions and with a fixed scale."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None


# Parameters under ZeRO


def is_partitioned(parameter: nn.Parameter) -> bool:
    """True at ZeRO-3, where a parameter is empty and each rank keeps a piece of it."""
    return hasattr(parameter, "ds_id")


def is_sharded(parameter: nn.Parameter) -> bool:
    """False at ZeRO-0, where parameters and states are ordinary tensors."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """An engine's parameter without ZeRO's partitioning; at ZeRO-3 the parameter itself is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def own_partition(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """ZeRO-3: this rank's slice of a whole fp32 tensor, flat and padded with zeros where ranks do not divide it."""
    size = parameter.ds_tensor.numel()
    optimizer = parameter._z3_optimizer
    flat = torch.zeros(size * optimizer._get_param_partition_world_size(parameter), dtype=torch.float32)
    flat[: value.numel()] = value.reshape(-1)
    own = flat.narrow(0, size * optimizer._get_param_partition_rank(parameter), size)
    return own.to(parameter.ds_tensor.device)


@dataclass(frozen=True)
class Slice:
    """Elements start..stop of a flattened parameter, which begin at `position` of a rank's flat tensor."""

    start: int
    stop: int
    position: int


@dataclass(frozen=True)
class FlatPartition:
    """A tensor that an engine's torch optimizer updates.

    Attributes:
        tensor: under ZeRO this rank's flat fp32 part of many parameters, else a parameter.
        group: the ranks that share the parameters out; None for one process.
        pieces: (parameter, its slice on each rank of the group), in the order of the flat tensor.
    """

    tensor: torch.Tensor
    group: dist.ProcessGroup | None
    pieces: tuple[tuple[nn.Parameter, tuple[Slice, ...]], ...]


def flat_partitions(engine: deepspeed.DeepSpeedEngine) -> Iterator[FlatPartition]:
    """Where each parameter's elements lie on each rank, for every tensor of the base optimizer."""
    wrapper = engine.optimizer
    if engine.zero_optimization_stage() == 0:
        for group in base_optimizer(engine).param_groups:
            for p in group["params"]:
                everywhere = (Slice(0, p.numel(), 0),) * dist.get_world_size()
                yield FlatPartition(p, dist.group.WORLD, ((p, everywhere),))
    elif engine.zero_optimization_stage() == 3:
        groups = wrapper.sub_group_process_groups
        for tensor, parameters, group in zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, groups):
            pieces, position = [], 0
            for p in parameters:
                size = p.partition_numel()
                starts = [min(rank * size, p.ds_numel) for rank in range(dist.get_world_size(group) + 1)]
                slices = [Slice(start, stop, position) for start, stop in zip(starts, starts[1:])]
                pieces.append((p, tuple(slices)))
                position += size
            yield FlatPartition(tensor, group, tuple(pieces))
    else:
        for number, tensor in enumerate(wrapper.single_partition_of_fp32_groups):
            group, size = wrapper.real_dp_process_group[number], wrapper.partition_size[number]
            pieces = []
            for p, offset in zip(wrapper.round_robin_bit16_groups[number], wrapper.round_robin_bit16_offsets[number]):
                slices = []
                for rank in range(dist.get_world_size(group)):
                    start, stop = max(offset, rank * size), min(offset + p.numel(), (rank + 1) * size)
                    stop = max(start, stop)
                    slices.append(Slice(start - offset, stop - offset, start - rank * size))
                pieces.append((p, tuple(slices)))
            yield FlatPartition(tensor, group, tuple(pieces))
