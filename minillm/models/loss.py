"""The training loss: cross-entropy of the next token, summed over targets and divided by a given count.

Contract: -100 is no target. A batch without targets gives exactly 0 with zero gradients, never NaN, so that a rank
whose micro-batch holds only padding takes part like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORE = -100


def next_token_targets(labels: torch.Tensor) -> torch.Tensor:
    """Shift labels [B, T] so that position t holds the label of t + 1; the last position has no target."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def token_loss(
    logits: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Sum of cross-entropies / num_items, or the mean over targets; logits [B, T, V], targets [B, T]; fp32 scalar."""
    total = F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    if num_items is None:
        num_items = (targets != IGNORE).sum().clamp(min=1)
    return total / num_items
