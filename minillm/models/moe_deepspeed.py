"""Experts shared out among ranks by DeepSpeed: two ways to send each token to the rank that holds its expert.

Contract: the call of minillm.models.experts, `experts(tokens, weights, indices)`, with this rank's share of the experts
inside. The router stays ours and outside, so that every router, balancing term and shared expert works with both. Not
imported by the decoder: training.expert_parallel puts these modules into it, and an exported model never holds them.
Checked against DeepSpeed 0.19.8.

Shapes: S tokens, D hidden, E experts, L experts of this rank, K experts a token, C slots an expert has in the buffer of
one rank, P ranks of the expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn

try:
    from minillm.compat.deepspeed_api import (
        AutoEPLayer,
        AutoEPSpec,
        MoE,
        count_tokens_per_expert,
        parse_autoep_options,
    )
except ImportError as error:  # chat, export and evaluation go without
    raise ImportError("experts on several ranks need DeepSpeed 0.19.8: pip install 'deepspeed>=0.19.8'") from error

from minillm.models.capacity import Capacity
from minillm.models.experts import SwiGLUExperts

Shard = tuple[nn.Parameter, ...]


def _keep_own_share(experts: nn.Module, rank: int, size: int) -> None:
    """Cut every parameter [E, ...] of a stacked experts module down to this rank's [L, ...]."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        local = parameter.shape[0] // size
        own = parameter.detach()[rank * local : (rank + 1) * local].clone()
        setattr(experts, name, nn.Parameter(own, requires_grad=parameter.requires_grad))


class _GivenRoutes(nn.Module):
    """DeepSpeed's gate with the decision already made: it gives every route its slot in the buffers.

    Called by deepspeed.moe.sharded_moe.MOELayer as gate(tokens, used_token, sparse, tutel); what DeepSpeed calls
    used_token, and hands on as it is, are here the routes.
    """

    def __init__(self, num_experts: int, capacity: Capacity | None):
        super().__init__()
        self.num_experts, self.capacity = num_experts, capacity
        self.group: dist.ProcessGroup | None = None

    def _set_ep_group(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def forward(self, tokens: torch.Tensor, routes: tuple[torch.Tensor, torch.Tensor], sparse: bool, tutel: bool):
        """Tokens [S, D], (weights, indices) [S, K], -1 for a dropped route -> what TopKGate returns with sparse routes.

        All ranks of a group send buffers of one size: the limit where there is one, else what the fullest expert of the
        group needs.
        """
        weights, indices = routes
        chosen = indices.flatten()
        # Dropped routes sort before expert 0 and take no slot.
        ordered, order = chosen.sort(stable=True)
        experts = torch.arange(self.num_experts, device=chosen.device)
        starts = torch.searchsorted(ordered, experts)
        counts = torch.searchsorted(ordered, experts, right=True) - starts
        place = torch.arange(chosen.numel(), device=chosen.device) - starts[ordered.clamp(min=0)]
        slots = torch.zeros_like(chosen).index_copy_(0, order, place).masked_fill_(chosen < 0, 0).view_as(indices)
        if self.capacity is not None and self.training:
            limit = self.capacity.of(indices.shape[0], self.num_experts, indices.shape[1])
            size = torch.tensor(min(limit, indices.shape[0]))  # no expert is chosen twice by a token
        else:
            size = counts.max()
            if self.group is not None and dist.get_world_size(self.group) > 1:
                dist.all_reduce(size, op=dist.ReduceOp.MAX, group=self.group)
        by_route = (t.t().contiguous() for t in (indices.int(), slots.int(), weights.float()))
        return weights.new_zeros(()), size, self.num_experts, *by_route, counts


class _LocalExperts(nn.Module):
    """This rank's experts over the buffers of all ranks: [P, L, C, D] -> [P, L, C, D]."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.stacked = experts

    def forward(self, buffers: torch.Tensor) -> torch.Tensor:
        ranks, local, slots, _ = buffers.shape
        rows = buffers.transpose(0, 1).flatten(0, 2)  # [L * P * C, D], by expert
        of_row = torch.arange(local, device=rows.device).repeat_interleave(ranks * slots)[:, None]
        ones = rows.new_ones(rows.shape[0], 1, dtype=torch.float32)
        return self.stacked(rows, ones, of_row).view(local, ranks, slots, -1).transpose(0, 1)


class DeepSpeedExperts(nn.Module):
    """deepspeed.moe.layer.MoE: every expert has as many slots as the fullest (or the capacity), empty ones too.

    Takes experts of any kind, biases too. ZeRO-1 and 2 (DeepSpeed refuses ZeRO-3).

    Args:
        experts: all E experts, on every rank the same; cut down in place.
        top_k: K.
        rank, size: of the expert-parallel group; expert e lives on rank e // L.
        capacity: the limit the caller keeps in training (minillm.models.capacity), None where nothing is dropped.
    """

    def __init__(self, experts: nn.Module, top_k: int, rank: int, size: int, capacity: Capacity | None = None):
        super().__init__()
        total, _, hidden = next(iter(experts.parameters())).shape
        self.moe = MoE(hidden, expert=nn.Identity(), num_experts=total, ep_size=size, k=top_k, drop_tokens=False)
        _keep_own_share(experts, rank, size)
        self.moe.deepspeed_moe.gate = _GivenRoutes(total, capacity)
        self.moe.deepspeed_moe.experts = _LocalExperts(experts)
        self.group_name = self.moe.expert_group_name
        for parameter in experts.parameters():  # not reduced over all ranks, but over those with the same experts
            parameter.allreduce, parameter.group_name = False, self.group_name

    @torch.compiler.disable  # sizes follow the tokens, and ranks talk inside
    def forward(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Tokens [S, D], the weights and indices [S, K] of their experts -> [S, D]."""
        return self.moe(x, (weights, indices))[0]

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """By the name all E experts have it under: the parameters that, joined along dimension 1, are this rank's L."""
        for name, parameter in self.moe.deepspeed_moe.experts.stacked.named_parameters():
            yield name, (parameter,)


class _GivenChoice(nn.Module):
    """AutoEP's router with the decision already made; told before each forward, as AutoEP passes it tokens alone."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts
        self.routes: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, tokens: torch.Tensor, bias: torch.Tensor | None = None):
        weights, indices = self.routes
        self.routes = None  # nothing of one step outlives it
        return weights, indices, count_tokens_per_expert(indices, self.num_experts)


class AutoEPExperts(nn.Module):
    """DeepSpeed's AutoEPMoELayer: exactly the routes travel, and grouped products compute them (dropless).

    Takes SwiGLU experts without biases. ZeRO-1, 2 and 3.

    Args:
        experts: all E experts, on every rank the same; they are not kept.
        top_k: K.
        rank, size: of the expert-parallel group.
        options: the `expert_parallel` object of DeepSpeed's JSON (kernels, communication).
    """

    def __init__(self, experts: SwiGLUExperts, top_k: int, rank: int, size: int, options: dict[str, object]):
        super().__init__()
        total, hidden, width = experts.down_proj.shape
        source = nn.Module()
        source.gate = nn.Linear(hidden, total, bias=False)  # AutoEP wants one to copy; the copy is thrown away
        source.experts = experts
        spec = AutoEPSpec(
            moe_module_name="experts", model_family="deepseek_v3", router_name="gate", experts_name="experts",
            expert_storage="fused_3d", expert_w1_name="gate_up_proj", expert_w2_name="down_proj", expert_w3_name=None,
            num_experts=total, top_k=top_k, hidden_size=hidden, ffn_hidden_size=width, score_func="softmax",
            score_apply="post", route_norm=False, gate_bias=False, return_router_logits=False,
            router_logits_capture_target="none", router_logits_capture_index=None,
            router_logits_capture_layer_name=None, has_shared_experts=False, shared_experts_name="",
        )  # fmt: skip
        config = parse_autoep_options({**options, "enabled": True, "autoep_size": size})
        self.moe = AutoEPLayer(spec, source, size, rank, config)
        self.moe.router = _GivenChoice(total)
        self.group_name = self.moe.ep_group_name

    @torch.compiler.disable  # as above
    def forward(self, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Tokens [S, D], the weights and indices [S, K] of their experts -> [S, D]."""
        self.moe.router.routes = (weights, indices)
        return self.moe(x[None])[0]

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """As DeepSpeedExperts.shards; AutoEP keeps gate and up apart."""
        grouped = self.moe.experts
        yield "gate_up_proj", (grouped.w1, grouped.w3)
        yield "down_proj", (grouped.w2,)
