"""Multi-token prediction: a module that predicts one token further ahead (DeepSeek-V3, arXiv:2412.19437, section 2.2).

The k-th module turns what the depth before knows at position t, and the embedding of token t + k, into a state that
predicts token t + k + 1 through the model's own output product (equations 21 to 23). It exists for its loss: only
training with targets runs it, and it keeps nothing in a cache.

Contract: a state whose next token lies past the row or in another document is made like any other and means nothing.
Nothing real depends on it: it has no target (minillm.models.loss.targets_ahead), and attention looks back only, so that
what sees it lies past the row's end or in another document too.

Shapes: B batch, T time, D hidden.
"""

from __future__ import annotations

import torch
from torch import nn

from minillm.models.balancing import Routing
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.linear import Linear
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
        """One depth further.

        Args:
            states: [B, T, D] of the depth before: at depth 1 the decoder's, after its last norm.
            next_embeddings: [B, T, D], at position t the embedding of token t + k at depth k, without positions.
            positions: the decoder's own rotation. Position t keeps its angle at every depth: rotation is relative, so
                turning all by the k tokens that have moved in would change nothing.
            masks: the decoder's own, by layer type.
            counted: bool [B, T], positions that balance the experts.

        Returns:
            The states of this depth [B, T, D], and what the layer's router did.
        """
        joined = torch.cat((self.enorm(next_embeddings), self.hnorm(states)), dim=-1)
        hidden_states = self.eh_proj(joined)
        # Called as the decoder calls its own, so that compiled layers share a graph.
        hidden_states, routing = self.layer(
            hidden_states, positions=positions, masks=masks, cache=None, counted=counted
        )
        return self.norm(hidden_states), routing
