"""Sparse feed-forward: a router, experts in plain torch that drop no token, a shared expert, balancing terms.

Shapes: B batch, T time, D hidden, E experts, K experts a token, H intermediate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig


class Routing(NamedTuple):
    """What a router did with one forward's counted tokens.

    Attributes:
        counts: [E] fp32, counted tokens sent to each expert.
        terms: by name, [B] fp32: each balancing term of each row.
    """

    counts: torch.Tensor
    terms: dict[str, torch.Tensor]


class SparseMoE(nn.Module):
    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        raise NotImplementedError("experts are being built")
