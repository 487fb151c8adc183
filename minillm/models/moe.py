"""Sparse feed-forward: a router, experts in plain torch that drop no token, a shared expert, balancing terms.

Contract: SparseMoE is a feed_forward block; ROUTERS chooses by `router_type`, EXPERTS by `mlp_type`, TERMS by the
coefficients that are not 0. Module and parameter names are those that transformers' Mixtral, Qwen3-MoE, Qwen3-Next and
DeepSeek-V3 have in memory: `gate.weight`, `experts.gate_up_proj`, `experts.down_proj`.

Shapes: B batch, T time, D hidden, K experts a token.
"""

from __future__ import annotations

import torch
from torch import nn

from minillm.models.balancing import TERMS, Routing, summarise
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.experts import EXPERTS
from minillm.models.linear import Linear
from minillm.models.mlp import build_dense_mlp
from minillm.models.routers import ROUTERS


class SparseMoE(nn.Module):
    """The sum of each token's K experts, weighted by the router, and of a shared expert where there is one.

    Dropless: an expert takes as many tokens as choose it. The shared expert (DeepSeekMoE, arXiv:2401.06066, section
    3.2) sees every token; with `shared_expert_gate` it is scaled by sigmoid(x @ gate) (Qwen3-Next).
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
        self.terms = [name for name, field in TERMS.items() if getattr(config, field)]

    def forward(self, x: torch.Tensor, counted: torch.Tensor | None = None) -> tuple[torch.Tensor, Routing | None]:
        """[B, T, D] -> [B, T, D], and the Routing over the tokens where `counted` [B, T] is true, if it is given."""
        tokens = x.flatten(0, 1)
        choice = self.gate(tokens)
        y = self.experts(tokens, choice.weights, choice.indices).view_as(x)
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            y = y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
        return y, None if counted is None else summarise(choice, counted, self.terms)
