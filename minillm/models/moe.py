"""Sparse feed-forward: a router, experts, a shared expert, balancing terms.

Contract: SparseMoE is a feed_forward block; ROUTERS chooses by `router_type`, EXPERTS by `mlp_type`, and coefficients
that are not 0 choose the balancing terms. The experts built here are those of plain torch, which drop no token. A
backend that runs them in another way replaces `experts` by a module with the same call, and sets `capacity` if tokens
may be dropped; a dropped route has index -1 and weight 0. Module and parameter names are those that transformers'
Mixtral, Qwen3-MoE, Qwen3-Next and DeepSeek-V3 have in memory: `gate.weight`, `experts.gate_up_proj`,
`experts.down_proj`; `coefficient` is DeepSpeed's.

Shapes: B batch, T time, D hidden, K experts a token.
"""

from __future__ import annotations

import torch
from torch import nn

from minillm.models.balancing import Routing, coefficients, summarise
from minillm.models.capacity import Capacity, limit_capacity
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.experts import EXPERTS
from minillm.models.linear import Linear
from minillm.models.mlp import build_dense_mlp
from minillm.models.routers import ROUTERS


class SparseMoE(nn.Module):
    """The sum of each token's K experts, weighted by the router, and of a shared expert where there is one.

    The shared expert (DeepSeekMoE, arXiv:2401.06066, section 3.2) sees every token; with `shared_expert_gate` it is
    scaled by sigmoid(x @ gate) (Qwen3-Next), and with `residual_moe` experts and shared expert are scaled by the two
    shares softmax(coefficient(x)) (Residual-MoE, arXiv:2201.05596, section 4.1, with DeepSpeed's coefficient).

    Attributes:
        capacity: None: an expert takes as many tokens as choose it. Else what it takes at most in training.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.gate = ROUTERS[config.router_type](config)
        self.experts = EXPERTS[config.mlp_type](config)
        self.shared_expert = self.shared_expert_gate = None
        if config.shared_expert_intermediate_size:
            self.shared_expert = build_dense_mlp(config, config.shared_expert_intermediate_size)
            if config.shared_expert_gate:
                self.shared_expert_gate = Linear(config.hidden_size, 1, bias=False)
        # With a bias and a name as in deepspeed.moe.layer.MoE.
        self.coefficient = Linear(config.hidden_size, 2, bias=True) if config.residual_moe else None
        self.terms = list(coefficients(config))
        self.capacity: Capacity | None = None

    def forward(self, x: torch.Tensor, counted: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing | None]:
        """[B, T, D] -> [B, T, D], and the Routing over the tokens where `counted` [B, T] is true, if it is given."""
        tokens = x.flatten(0, 1)
        choice = self.gate(tokens)
        if self.capacity is not None and self.training:
            choice = limit_capacity(choice, self.capacity, counted)
        indices = choice.indices if choice.kept is None else choice.indices.masked_fill(~choice.kept, -1)
        y = self.experts(tokens, choice.weights, indices).view_as(x)
        if self.shared_expert is not None:
            y = self._add_shared(y, x)
        return y, None if counted is None else summarise(choice, counted, self.terms)

    def _add_shared(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        shared = self.shared_expert(x)
        if self.coefficient is not None:
            of_experts, of_shared = self.coefficient(x).softmax(-1).split(1, dim=-1)
            return of_experts * y + of_shared * shared
        if self.shared_expert_gate is not None:
            shared = self.shared_expert_gate(x).sigmoid() * shared
        return y + shared
