"""Multi-token prediction: a module that predicts one token further ahead (DeepSeek-V3, arXiv:2412.19437, section 2.2).

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

import torch
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import Linear
from minillm.models.moe import Routing
from minillm.models.normalization import build_norm


class MultiTokenModule(nn.Module):
    """norm(layer(eh_proj([enorm(embedding of the next token); hnorm(state)]))); names as in DeepSeek-V3's weights.

    Embedding and output product are the decoder's own. `layer` is a decoder layer, passed in because this module
    cannot import the class that holds it.
    """

    def __init__(self, config: MiniLLMConfig, layer: nn.Module):
        super().__init__()
        self.enorm = build_norm(config)
        self.hnorm = build_norm(config)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = layer
        self.norm = build_norm(config)

    def forward(
        self,
        states: torch.Tensor,
        next_embeddings: torch.Tensor,
        positions: torch.Tensor | None,
        masks: dict[str, torch.Tensor | None],
        counted: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Routing | None]:
        """States [B, T, D] of the depth before, and of the next tokens the embeddings -> states of this depth."""
        joined = torch.cat((self.enorm(next_embeddings), self.hnorm(states)), dim=-1)
        hidden_states, routing = self.layer(self.eh_proj(joined), positions=positions, masks=masks, counted=counted)
        return self.norm(hidden_states), routing
