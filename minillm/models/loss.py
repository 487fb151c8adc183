"""The training loss: cross-entropy of the next token, summed over targets and divided by a given count, and its
auxiliary terms.

Contract: every term is a sum over rows and targets divided by the same count, so that the terms of micro-batches add
up to that of the global batch however it is split. -100 is not a target. A batch without targets gives exactly 0 with
zero gradients, never NaN, so that a rank whose micro-batch holds only padding takes part like any other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from minillm.models.balancing import Routing, coefficients
from minillm.models.configuration_minillm import MiniLLMConfig

IGNORE = -100


def next_token_targets(labels: torch.Tensor) -> torch.Tensor:
    """Shift labels [B, T] so that position t holds the label of t + 1; the last position has no target."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def token_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Sum of cross-entropies / num_items, or the mean over targets; logits [B, T, V], targets [B, T]; fp32 scalar."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (count_targets(targets) if num_items is None else num_items)


def count_targets(targets: torch.Tensor) -> torch.Tensor:
    """How many targets there are, at least 1 so that it can divide: what all terms share where no count is given."""
    return (targets != IGNORE).sum().clamp(min=1)


def targets_ahead(targets: torch.Tensor, document_ids: torch.Tensor | None, depth: int) -> torch.Tensor:
    """Targets [B, T] of the token `depth` after the next, for multi-token prediction.

    Position t holds targets[t + depth], and none where that lies past the row or in another document. Positions on the
    way may lack a target, as in a prompt whose answer alone is learned: their tokens are input of the module, which
    predicts a token from all those before it, exactly as the decoder does `depth` positions later.
    """
    ahead = targets
    for _ in range(depth):
        ahead = F.pad(ahead[:, 1:], (0, 1), value=IGNORE)
        if document_ids is not None:
            same = document_ids[:, 1:] == document_ids[:, :-1]
            ahead = ahead.masked_fill(~F.pad(same, (0, 1), value=False), IGNORE)
    return ahead


def counted_tokens(targets: torch.Tensor) -> torch.Tensor:
    """Bool [B, T], the tokens that balance the experts: those up to each row's last target, so that padding and empty
    rows do not count."""
    return (targets != IGNORE).int().flip(-1).cummax(-1).values.flip(-1).bool()


def auxiliary_losses(
    config: MiniLLMConfig,
    routings: Sequence[Routing] | None,
    targets: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The balancing terms by name and sparse layer (before their coefficients), [L] each, and their weighted sum.

    Each term is computed for each row and summed over layers (Switch, arXiv:2101.03961, section 2.2); a row counts by
    its share of the targets. Over whole batches instead of rows a term would depend on the split into micro-batches,
    and so on the number of ranks.
    """
    if not routings:
        return {}, targets.new_zeros((), dtype=torch.float32)
    share = (targets != IGNORE).sum(-1) / (count_targets(targets) if num_items is None else num_items)  # [B]
    terms, total = {}, 0.0
    for name, coefficient in coefficients(config).items():
        terms[name] = torch.stack([(routing.terms[name] * share).sum() for routing in routings])
        total = total + coefficient * terms[name].sum()
    return terms, total
