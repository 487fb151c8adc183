"""Routers: which K experts each token goes to, and with what weights; the table that chooses one by `router_type`.

Contract: logits and everything after them in fp32. Names are those of transformers: `weight` [E, D]. Every router is
called as `router(x, indices=None)`; with `indices` [S, K] the experts are those, in place of its own choice, and the
weights follow from them: routing replay, with which two engines are compared that round differently.

Shapes: B batch, T time, S tokens (B * T), D hidden, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minillm.compat.transformers_api import init
from minillm.models.configuration_minillm import MiniLLMConfig


class Choice(NamedTuple):
    """What a router says of each token, all fp32 but the indices.

    Attributes:
        logits: [S, E], with the noise that the weights are made with.
        probabilities: [S, E], non-negative, adding up to 1: what the balancing terms are about.
        weights: [S, K], what each chosen expert's output is multiplied by.
        indices: [S, K], the chosen experts, no two of a token alike.
        kept: [S, K] bool, false for routes that a capacity drops, whose weight is then 0; None: all are kept.
        total: what a token's weights add up to, where the router sees to it; None where it does not.
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor
    kept: torch.Tensor | None = None
    total: float | None = None


# The distance from 1 of the factors of router_noise jitter (Switch, arXiv:2101.03961, appendix C; DeepSpeed's value).
JITTER = 1e-2


def jitter(x: torch.Tensor) -> torch.Tensor:
    """x with each element multiplied by a number drawn evenly from 1 - JITTER to 1 + JITTER."""
    return x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)


def gumbel_like(x: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of the shape of `x`: -log(-log(u)) with u even in (0, 1)."""
    limits = torch.finfo(x.dtype)
    return -(-torch.empty_like(x).uniform_(limits.tiny, 1 - limits.eps).log()).log()


class _Router(nn.Module):
    """Scores of tokens against one learned vector an expert; `weight` [E, D]."""

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.normalised = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        self.total = self.scale if self.normalised else None
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def init_weights(self, config: MiniLLMConfig) -> None:
        init.normal_(self.weight, mean=0.0, std=config.initializer_range)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float())


class SoftmaxRouter(_Router):
    """The K largest of softmax(logits), as weights, renormalised where `norm_topk_prob` says so.

    Mixtral (arXiv:2401.04088, section 2.1; there as softmax over the K largest logits, which is the same), Qwen3-MoE,
    Qwen3-Next. Probabilities: the softmax.

    `router_noise` acts in training only. jitter: x is multiplied by factors near 1 (Switch, arXiv:2101.03961, appendix
    C; DeepSpeed's Jitter). rsample: Gumbel noise on the logits decides the choice, and neither weights nor
    probabilities, so that K experts are drawn without replacement from the softmax (Gumbel top-k, Kool et al.,
    arXiv:1903.06059); with K = 1 DeepSpeed's RSample.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__(config)
        self.noise = config.router_noise

    def forward(self, x: torch.Tensor, indices: torch.Tensor | None = None) -> Choice:
        """[S, D] -> Choice, of the experts `indices` [S, K] where given."""
        noise = self.noise if self.training else "none"
        logits = self.logits(jitter(x.float()) if noise == "jitter" else x)
        probabilities = logits.softmax(-1)
        if indices is None:
            scores = logits + gumbel_like(logits) if noise == "rsample" else probabilities
            indices = scores.topk(self.top_k, dim=-1).indices
        weights = probabilities.gather(-1, indices)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return Choice(logits, probabilities, weights * self.scale, indices, total=self.total)


class SigmoidRouter(_Router):
    """Each expert scored for itself, balanced by a bias that acts on the choice and never on the weights.

    DeepSeek-V3 (arXiv:2412.19437), section 2.1.2, equations 12-16: the K largest sigmoid(logit) + bias among the
    `topk_group` of `n_group` groups whose best two such scores are largest; weights are the scores without the bias.
    Probabilities: the scores normalised over all experts (equation 19).

    `e_score_correction_bias` [E] is part of the state dict and stays fp32 in a bf16 model, since one step of
    `update_bias` is smaller than what bf16 resolves.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__(config)
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.bias_speed = config.router_bias_update_speed
        self.register_buffer("e_score_correction_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def init_weights(self, config: MiniLLMConfig) -> None:
        super().init_weights(config)
        init.zeros_(self.e_score_correction_bias)

    def _apply(self, fn: Callable, recurse: bool = True) -> nn.Module:
        before = self.e_score_correction_bias
        super()._apply(fn, recurse)
        after = self.e_score_correction_bias
        if after.dtype != torch.float32:  # cast: take the values from before, on the device of after
            self.e_score_correction_bias = after.float() if before.is_meta else before.to(after.device)
        return self

    def forward(self, x: torch.Tensor, indices: torch.Tensor | None = None) -> Choice:
        """[S, D] -> Choice, of the experts `indices` [S, K] where given."""
        logits = self.logits(x)
        scores = logits.sigmoid()
        if indices is None:
            indices = self._allowed(scores + self.e_score_correction_bias.float()).topk(self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        if self.normalised:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        return Choice(logits, probabilities, weights * self.scale, indices, total=self.total)

    def _allowed(self, biased: torch.Tensor) -> torch.Tensor:
        """Scores [S, E] with -inf outside the best groups."""
        if self.groups == 1:
            return biased
        grouped = biased.unflatten(-1, (self.groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.top_groups, dim=-1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=biased.device).scatter(1, best, True)
        return grouped.masked_fill(~allowed[..., None], float("-inf")).flatten(1)

    @torch.no_grad()
    def update_bias(self, counts: torch.Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of those above it, by the update speed.

        Balancing without a loss (arXiv:2412.19437, section 2.1.2; arXiv:2408.15664, algorithm 1).

        Args:
            counts: [E], the tokens each expert got in one optimizer step, over all ranks and micro-batches.
        """
        counts = counts.to(self.e_score_correction_bias)
        self.e_score_correction_bias += self.bias_speed * (counts.mean() - counts).sign()


class _Float32Linear(nn.Linear):
    """A linear layer that computes and answers in fp32, whatever it is stored in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class NoisyTopKRouter(nn.Module):
    """Softmax over the K largest logits, to which training adds normal noise of a learned width for each token.

    Shazeer et al. (arXiv:1701.06538), section 2.1, equations 3-5, with biases in both projections: logits =
    router(x) + normal() * softplus(noise(x)); without the noise in evaluation. The weights add up to 1 by
    construction. Probabilities: softmax over all logits, noise included.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.router = _Float32Linear(config.hidden_size, config.num_experts)
        self.noise = _Float32Linear(config.hidden_size, config.num_experts)

    def forward(self, x: torch.Tensor, indices: torch.Tensor | None = None) -> Choice:
        """[S, D] -> Choice, of the experts `indices` [S, K] where given."""
        logits = self.router(x)
        if self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise(x))
        if indices is None:
            indices = logits.topk(self.top_k, dim=-1).indices
        weights = logits.gather(-1, indices).softmax(-1) * self.scale
        return Choice(logits, logits.softmax(-1), weights, indices, total=self.scale)


ROUTERS: dict[str, type[nn.Module]] = {
    "softmax": SoftmaxRouter,
    "sigmoid": SigmoidRouter,
    "noisy_topk": NoisyTopKRouter,
}
