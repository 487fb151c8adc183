"""Positions: rotary, learned and sinusoidal, and the table that chooses by `position_embedding_type`.

The seam: a position module is called as `positions(embeddings, position_ids)` and returns the embeddings, with
positions added where it adds them, and the rotation for the mixers (None where nothing rotates).

Shapes: B batch, T time, N heads, H head dim, D hidden, R dimensions of a head that rotate.
"""

from __future__ import annotations

import torch
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig


class RotaryEmbedding(nn.Module):
    """Angles of rotary positions (Su et al., arXiv:2104.09864) in the half-split layout of Llama.

    The frequencies are computed in fp32 at each forward and are no buffer: a buffer would be rounded to bf16 by
    `model.bfloat16()`, which is what DeepSpeed calls, and long positions would turn by the wrong angle.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.theta = config.rope_theta

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings as they are, and the rotation of position_ids [B, T]."""
        return embeddings, self.rotation(position_ids)

    def rotation(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines, [B, T, 1, R] in fp32; the 1 broadcasts over heads.

        They come concatenated because the compiler keeps a concatenation in memory, while it would compute loose
        cosines anew for every head of every layer.
        """
        exponents = torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32) / self.head_dim
        frequencies = 1.0 / (self.theta**exponents)
        angles = position_ids[..., None, None].float() * frequencies  # [B, T, 1, H / 2]
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


def apply_rotary(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Turn x [B, T, N, H] by `rotation` [B, T, 1, H], dimension i paired with i + H / 2; fp32 inside, x's dtype out."""
    cos, sin = rotation.chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


POSITIONS: dict[str, type[nn.Module]] = {"rope": RotaryEmbedding}


def build_positions(config: MiniLLMConfig) -> nn.Module:
    """The positions of `config.position_embedding_type`; ValueError with the valid names otherwise."""
    try:
        return POSITIONS[config.position_embedding_type](config)
    except KeyError:
        raise ValueError(
            f"position_embedding_type is {config.position_embedding_type!r}: valid names are {', '.join(POSITIONS)}"
        ) from None
