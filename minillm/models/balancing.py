"""Balancing terms, each one number a row of what a router said of it, and statistics of what the router did.

Contract: fp32; a row without counted tokens gives 0 and no gradient. Terms are of rows, not of batches, so that they
add up however a batch is split (minillm.models.loss.auxiliary_losses); so do the statistics, which have no gradient.

Shapes: B batch, T time, S tokens (B * T), D hidden, E experts, K experts a token, L sparse layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.routers import Choice


class Routing(NamedTuple):
    """What a router did with one forward's counted tokens.

    Attributes:
        counts: [E] fp32, counted tokens that chose each expert, before any are dropped.
        dropped: fp32 scalar, those routes of counted tokens that the capacity dropped.
        entropy: fp32 scalar, sum over counted tokens of the entropy of their routing probabilities, in nats.
        tokens: fp32 scalar, counted tokens.
        terms: by name, [B] fp32: each balancing term of each row, of those whose coefficient is not 0.
    """

    counts: torch.Tensor
    dropped: torch.Tensor
    entropy: torch.Tensor
    tokens: torch.Tensor
    terms: dict[str, torch.Tensor]


class Tally(NamedTuple):
    """Routing of B rows, reduced over their counted tokens; all fp32, 0 for a row without counted tokens.

    Attributes:
        load: [B, E], share of the row's tokens whose K experts include this one; adds up to K.
        probability: [B, E], mean routing probability; adds up to 1.
        squared_normaliser: [B], mean of logsumexp(logits)^2.
        top_k: K.
    """

    load: torch.Tensor
    probability: torch.Tensor
    squared_normaliser: torch.Tensor
    top_k: int


def load_balancing(tally: Tally) -> torch.Tensor:
    """[B]: E * sum_i load_i * probability_i; K where all is even.

    Switch (arXiv:2101.03961), equations 4-6, with K experts a token as in transformers' load_balancing_loss_func.
    """
    return tally.load.shape[-1] * (tally.load * tally.probability).sum(-1)


def importance(tally: Tally) -> torch.Tensor:
    """[B]: KL(mean probabilities || uniform) = log E - entropy of the mean probabilities; 0 where all is even.

    After the importance loss of Shazeer et al. (arXiv:1701.06538), section 4, which takes the squared coefficient of
    variation in place of the divergence.
    """
    # The clamp: a row without counted tokens has probabilities 0, and log 0 a gradient that 0 does not undo.
    even = tally.probability * tally.probability.shape[-1]
    return (tally.probability * even.clamp(min=torch.finfo(even.dtype).tiny).log()).sum(-1)


def router_z(tally: Tally) -> torch.Tensor:
    """[B]: mean of logsumexp(logits)^2. ST-MoE (arXiv:2202.08906), equation 5."""
    return tally.squared_normaliser


def sequence_balancing(tally: Tally) -> torch.Tensor:
    """[B]: sum_i E / K * load_i * probability_i; 1 where all is even. DeepSeek-V3 (arXiv:2412.19437), equations 17-20.

    load_i counts what was used, the choice with biases.
    """
    return load_balancing(tally) / tally.top_k


class Term(NamedTuple):
    """A balancing term: the config field with its coefficient, and what gives [B] from a Tally."""

    field: str
    of: Callable[[Tally], torch.Tensor]


TERMS = {  # by name in `losses` and in Routing.terms
    "load_balancing": Term("router_aux_loss_coef", load_balancing),
    "importance": Term("router_importance_loss_coef", importance),
    "router_z": Term("router_z_loss_coef", router_z),
    "sequence_balancing": Term("router_sequence_loss_coef", sequence_balancing),
}


def coefficients(config: MiniLLMConfig) -> dict[str, float]:
    """By name, the coefficients of the terms that a model has: those that are not 0."""
    return {name: value for name, term in TERMS.items() if (value := getattr(config, term.field))}


def summarise(choice: Choice, counted: torch.Tensor, terms: Iterable[str]) -> Routing:
    """What a router did with the tokens where `counted` [B, T] is true."""
    chosen = torch.zeros_like(choice.logits, requires_grad=False).scatter(1, choice.indices, 1.0)  # [S, E]
    tokens = counted.float()[..., None]  # [B, T, 1]
    per_row = tokens.sum(1)  # [B, 1]
    divisor = per_row.clamp(min=1)

    def total(values: torch.Tensor) -> torch.Tensor:  # [S, N] -> [B, N]
        return (tokens * values.view(*counted.shape, -1)).sum(1)

    counts = total(chosen)
    tally = Tally(
        load=counts / divisor,
        probability=total(choice.probabilities) / divisor,
        squared_normaliser=(total(choice.logits.logsumexp(-1, keepdim=True).square()) / divisor)[:, 0],
        top_k=choice.indices.shape[-1],
    )
    entropies = torch.special.entr(choice.probabilities.detach()).sum(-1, keepdim=True)  # 0 for a probability of 0
    return Routing(
        counts=counts.sum(0),
        dropped=counts.new_zeros(()) if choice.kept is None else total((~choice.kept).float()).sum(),
        entropy=total(entropies).sum(),
        tokens=per_row.sum(),
        terms={name: TERMS[name].of(tally) for name in terms},
    )


def routing_by_layer(routings: Sequence[Routing], terms: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One forward's Routings as a table that adds up over micro-batches and ranks.

    Args:
        routings: one a sparse layer.
        terms: by name, [L] (minillm.models.loss.auxiliary_losses).

    Returns:
        `counts` [L, E], `dropped`, `entropy` and `tokens` [L], and every term under its name [L]; no gradients.
    """
    statistics = ("counts", "dropped", "entropy", "tokens")
    table = {name: torch.stack([getattr(routing, name) for routing in routings]) for name in statistics}
    return table | {name: rows.detach() for name, rows in terms.items()}
