"""Expert capacity: how many routes an expert takes of one batch, and which are dropped where more want it.

Contract: as DeepSpeed's topkgating with drop_policy "probs"; of equal probabilities the earlier token's goes first, so
that a run repeats to the bit. What a token loses here, it passes by on the residual stream.

Shapes: S tokens, E experts, K experts a token, R routes (S * K).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from minillm.models.routers import Choice


class Capacity(NamedTuple):
    """GShard (arXiv:2006.16668, section 2.2), Switch (arXiv:2101.03961, equation 3).

    Attributes:
        factor: routes an expert takes, over its even share of them.
        minimum: routes it takes however few the tokens are.
    """

    factor: float
    minimum: int

    def of(self, tokens: int, experts: int, top_k: int) -> int:
        """Routes one expert takes of those of `tokens` tokens."""
        return max(math.ceil(tokens / experts * self.factor * top_k), self.minimum)


def limit_capacity(choice: Choice, capacity: Capacity, counted: torch.Tensor | None = None) -> Choice:
    """The choice with `kept` false and weight 0 for the routes beyond each expert's capacity.

    An expert keeps the routes of largest probability. Where the router makes a token's weights add up to a total, those
    of its kept routes do so again; a token that keeps none gets nothing. Logits, probabilities and indices stay.

    Args:
        counted: bool, S in all: the tokens that are not padding, whose routes go first; None: all are alike.
    """
    tokens, top_k = choice.indices.shape
    experts = choice.logits.shape[-1]
    chosen = choice.indices.flatten()
    probabilities = choice.probabilities.gather(-1, choice.indices)
    if counted is not None:
        probabilities = probabilities - 1.0 * ~counted.reshape(-1, 1)  # behind every real one
    likely = probabilities.flatten().argsort(descending=True, stable=True)
    expert, by_expert = chosen[likely].sort(stable=True)
    first = torch.searchsorted(expert, torch.arange(experts, device=expert.device))
    place = torch.arange(chosen.shape[0], device=expert.device) - first[expert]  # among its expert's routes
    kept = torch.empty_like(place, dtype=torch.bool)
    kept[likely[by_expert]] = place < capacity.of(tokens, experts, top_k)
    kept = kept.view_as(choice.indices)
    weights = choice.weights * kept
    if choice.total is not None:
        least = torch.finfo(weights.dtype).eps  # for tokens without a route
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=least) * choice.total
    return choice._replace(weights=weights, kept=kept)
