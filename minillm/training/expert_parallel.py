"""Experts shared out among ranks: put into a model before DeepSpeed sees it, and seen whole again by name.

Contract: which backends are legal is training.moe_backends' to say; here it is done. A checkpoint, a gradient
comparison and an export know tensors with all E experts (`...mlp.experts.gate_up_proj` [E, 2H, D]); an engine holds the
shares of its ranks, under names of DeepSpeed's. `whole_parameters` maps one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from minillm.compat.deepspeed_api import expert_parallel_group, full_shape, make_expert_parallel_groups
from minillm.models.capacity import Capacity
from minillm.models.moe import SparseMoE
from minillm.models.moe_deepspeed import AutoEPExperts, DeepSpeedExperts
from minillm.utils import distributed


def parallelise_experts(
    model: nn.Module,
    backend: str,
    size: int,
    *,
    capacity: Capacity | None = None,
    options: dict[str, object] | None = None,
) -> None:
    """Replace the experts of every sparse layer, in place, by this rank's share of them under a backend's dispatch.

    Args:
        model: with its weights in it, the same on every rank.
        backend: torch (nothing to do), deepspeed or autoep.
        size: ranks of an expert-parallel group: neighbours, rank r has share r % size.
        capacity: deepspeed: the limit on each expert's tokens in training; None drops nothing.
        options: autoep: the `expert_parallel` object of DeepSpeed's JSON.
    """
    if backend == "torch":
        return
    make_expert_parallel_groups(size)
    rank = distributed.rank() % size
    for module in [module for module in model.modules() if isinstance(module, SparseMoE)]:
        if backend == "deepspeed":
            module.experts = DeepSpeedExperts(module.experts, module.gate.top_k, rank, size, capacity)
            module.capacity = capacity
        else:
            module.experts = AutoEPExperts(module.experts, module.gate.top_k, rank, size, options or {})


@dataclass(frozen=True)
class WholeParameter:
    """One parameter as a checkpoint knows it.

    Attributes:
        name: in the model without expert parallelism.
        shape: with all experts.
        parts: the engine's parameters; joined along dimension 1 they are this rank's share.
        group: the ranks whose shares, joined along dimension 0, are the whole; None where every rank has it whole.
    """

    name: str
    shape: torch.Size
    parts: tuple[nn.Parameter, ...]
    group: dist.ProcessGroup | None = None

    def join(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Tensors of the shapes of `parts` -> the whole; a collective over the group."""
        share = tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=1)
        if self.group is None or dist.get_world_size(self.group) == 1:
            return share
        shares = [torch.empty_like(share) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(shares, share.contiguous(), group=self.group)
        return torch.cat(shares)

    def split(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The whole -> tensors of the shapes of `parts`."""
        if self.group is not None:
            whole = whole.chunk(dist.get_world_size(self.group))[dist.get_rank(self.group)]
        sizes = [full_shape(part)[1] for part in self.parts] if len(self.parts) > 1 else None
        return list(whole.split(sizes, dim=1)) if sizes else [whole]


def whole_parameters(model: nn.Module) -> Iterator[WholeParameter]:
    """Every trainable parameter of an engine's module, in an order that is the same on every rank."""
    shards: dict[int, WholeParameter] = {}
    for name, module in model.named_modules():
        if hasattr(module, "shards"):
            group = expert_parallel_group(module.group_name)
            for inner, parts in module.shards():
                shape = _joined_shape([full_shape(p) for p in parts], dist.get_world_size(group))
                whole = WholeParameter(f"{name}.{inner}", shape, parts, group)
                shards |= {id(part): whole for part in parts}
    seen: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        whole = shards.get(id(parameter)) or WholeParameter(name, full_shape(parameter), (parameter,))
        if whole.name not in seen:
            seen.add(whole.name)
            yield whole


def _joined_shape(shapes: list[torch.Size], ranks: int) -> torch.Size:
    first, second, *rest = shapes[0]
    return torch.Size([first * ranks, sum(shape[1] for shape in shapes), *rest])
