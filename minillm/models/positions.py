"""Positions: rotary, learned and sinusoidal, and the table that chooses by `position_embedding_type`.

The seam: a position module is called as `positions(embeddings, position_ids)` and returns the embeddings, with
positions added where it adds them, and the rotation for the mixers (None where nothing rotates).

Shapes: B batch, T time, N heads, H head dim, D hidden, R dimensions of a head that rotate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.settings.architecture import rotary_dim

Scaling = Mapping[str, object]  # config.rope_scaling


class RotaryEmbedding(nn.Module):
    """Angles of rotary positions (Su et al., arXiv:2104.09864) in the half-split layout of Llama.

    Of each head the first R = minillm.settings.architecture.rotary_dim dimensions rotate. `rope_scaling` stretches the
    context by one of ROPE_TYPES.

    The frequencies are computed in fp32 at each forward and not kept: a buffer would be rounded to bf16 by
    `model.bfloat16()`, which is what DeepSpeed calls, and long positions would turn by the wrong angle.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.rotary_dim = rotary_dim(config.architecture)
        self.theta = config.rope_theta
        self.scaling = dict(config.rope_scaling or {"rope_type": "default"})
        self.scaling.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        self.frequencies = ROPE_TYPES[self.scaling["rope_type"]]
        self.attention_factor = yarn_attention_factor(config.rope_scaling)

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings as they are, and the rotation of position_ids [B, T]."""
        return embeddings, self.rotation(position_ids)

    def rotation(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines, [B, T, 1, R] in fp32; the 1 broadcasts over heads.

        They come concatenated because the compiler keeps a concatenation in memory, while it would compute loose
        cosines anew for every head of every layer.
        """
        frequencies = self.frequencies(self.theta, self.rotary_dim, self.scaling, position_ids)
        angles = position_ids[..., None, None].float() * frequencies  # [B, T, 1, R / 2]
        rotation = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return rotation if self.attention_factor == 1.0 else rotation * self.attention_factor


def apply_rotary(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Turn the first R dimensions of x [B, T, N, H] by `rotation` [B, T, 1, R]; the others, or all at None, pass.

    Dimension i is paired with i + R / 2; fp32 inside, x's dtype out.
    """
    if rotation is None:
        return x
    cos, sin = rotation.chunk(2, dim=-1)
    turned = x if rotation.shape[-1] == x.shape[-1] else x[..., : rotation.shape[-1]]
    first, second = turned.float().chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    if turned is not x:
        parts.append(x[..., rotation.shape[-1] :])
    return torch.cat(parts, dim=-1).to(x.dtype)


def _plain(theta: float | torch.Tensor, dim: int, scaling: Scaling, position_ids: torch.Tensor) -> torch.Tensor:
    """theta^(-2i / R): radians a position for each of the R / 2 pairs, fp32."""
    exponents = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
    return 1.0 / (theta**exponents)


def _linear(theta: float, dim: int, scaling: Scaling, position_ids: torch.Tensor) -> torch.Tensor:
    """Position interpolation: every pair turns `factor` times slower (Chen et al., arXiv:2306.15595)."""
    return _plain(theta, dim, scaling, position_ids) / scaling["factor"]


def _dynamic(theta: float, dim: int, scaling: Scaling, position_ids: torch.Tensor) -> torch.Tensor:
    """NTK-aware: theta grows with a row's longest position beyond the original context (arXiv:2309.00071, section 3.3).

    By row, where transformers takes the longest of the batch: a row's angles must not depend on its neighbours. (They
    do on the row's other documents, where one of them passes the original context.)
    Within the original context nothing changes. Beyond it, keys that are already cached keep the angles of the length
    they were made at, as in transformers.
    """
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    length = (position_ids.amax(-1)[..., None, None, None] + 1).clamp(min=original)  # [B, 1, 1, 1]
    grown = theta * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
    return _plain(grown, dim, scaling, position_ids)


def _yarn(theta: float, dim: int, scaling: Scaling, position_ids: torch.Tensor) -> torch.Tensor:
    """NTK by parts: pairs that turn often stay, those that turn rarely interpolate (arXiv:2309.00071, section 3.2).

    The ramp between them runs over the pairs that turn beta_fast (32) to beta_slow (1) times in the original context.
    """

    def pair_turning(times: float) -> float:
        rotations = scaling["original_max_position_embeddings"] / (times * 2 * math.pi)
        return dim * math.log(rotations) / (2 * math.log(theta))

    low, high = pair_turning(scaling.get("beta_fast", 32)), pair_turning(scaling.get("beta_slow", 1))
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    pairs = torch.arange(dim // 2, device=position_ids.device, dtype=torch.float32)
    interpolated = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)
    plain = _plain(theta, dim, scaling, position_ids)
    return plain * (1 - interpolated) + plain / scaling["factor"] * interpolated


def _llama3(theta: float, dim: int, scaling: Scaling, position_ids: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: slow pairs interpolate, fast ones stay, a linear blend between (Llama 3.1's model code).

    Slow and fast are turns in the original context, below low_freq_factor and above high_freq_factor.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    plain = _plain(theta, dim, scaling, position_ids)
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / scaling["factor"] * (1 - kept)


ROPE_TYPES: dict[str, Callable[[float, int, Scaling, torch.Tensor], torch.Tensor]] = {
    "default": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}


def yarn_attention_factor(rope_scaling: Scaling | None) -> float:
    """What YaRN multiplies cosines and sines by (arXiv:2309.00071, section 3.4); 1.0 for other scalings.

    `attention_factor` where it is given; else mscale(factor, mscale) / mscale(factor, mscale_all_dim) where both are
    (DeepSeek-V2); else 0.1 ln(factor) + 1.
    """
    if rope_scaling is None or rope_scaling["rope_type"] != "yarn":
        return 1.0
    if "attention_factor" in rope_scaling:
        return rope_scaling["attention_factor"]
    factor, weights = rope_scaling["factor"], [rope_scaling.get(name) for name in ("mscale", "mscale_all_dim")]
    if all(weights):
        return _mscale(factor, weights[0]) / _mscale(factor, weights[1])
    return _mscale(factor)


def yarn_attention_scale(rope_scaling: Scaling | None) -> float:
    """What latent attention multiplies its softmax scale by: mscale(factor, mscale_all_dim)^2 as in DeepSeek's code.

    1.0 where the scaling is not yarn or names no mscale_all_dim.
    """
    if rope_scaling is None or rope_scaling["rope_type"] != "yarn" or not rope_scaling.get("mscale_all_dim"):
        return 1.0
    return _mscale(rope_scaling["factor"], rope_scaling["mscale_all_dim"]) ** 2


def _mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's logit temperature (arXiv:2309.00071, equation 22), its logarithm times `weight`."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


class LearnedPositions(nn.Module):
    """A trained vector for each of max_position_embeddings positions, added to the embeddings (GPT-2)."""

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        """[B, T, D] plus the vectors of position_ids [B, T]; nothing rotates.

        Raises:
            ValueError: a position past the table, on the CPU. Elsewhere asking would wait for the device, and the
                look-up itself fails.
        """
        size = self.embed_positions.num_embeddings
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and position_ids.max() >= size:
            raise ValueError(
                f"position {position_ids.max().item()} is past the {size} learned positions "
                f"(max_position_embeddings): shorten the input, or use position_embedding_type rope or sinusoidal"
            )
        return embeddings + self.embed_positions(position_ids), None


class SinusoidalPositions(nn.Module):
    """Fixed waves added to the embeddings times sqrt(D) (Vaswani et al., arXiv:1706.03762, sections 3.4 and 3.5).

    Dimension 2i gets sin(position / 10000^(2i / D)), dimension 2i + 1 the cosine of the same angle. Without the factor
    the waves would drown embeddings that start at 0.02: two layers of char-tiny learn to copy 16 characters in 200
    steps with it, and in 360 without it have not begun. Computed in fp32 at each forward: no position is too long, and
    no cast of the model rounds a table.
    """

    def __init__(self, config: MiniLLMConfig):
        super().__init__()
        self.hidden_size = config.hidden_size

    def forward(self, embeddings: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, None]:
        """sqrt(D) times [B, T, D], plus the waves of position_ids [B, T]; nothing rotates."""
        exponents = torch.arange(0, self.hidden_size, 2, device=position_ids.device, dtype=torch.float32)
        angles = position_ids[..., None].float() / 10_000.0 ** (exponents / self.hidden_size)  # [B, T, D / 2]
        waves = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.hidden_size]
        return (embeddings * math.sqrt(self.hidden_size) + waves).to(embeddings.dtype), None


POSITIONS: dict[str, type[nn.Module]] = {
    "rope": RotaryEmbedding,
    "learned": LearnedPositions,
    "sinusoidal": SinusoidalPositions,
}


def build_positions(config: MiniLLMConfig) -> nn.Module:
    """The positions of `config.position_embedding_type`; ValueError with the valid names otherwise."""
    try:
        return POSITIONS[config.position_embedding_type](config)
    except KeyError:
        raise ValueError(
            f"position_embedding_type is {config.position_embedding_type!r}: valid names are {', '.join(POSITIONS)}"
        ) from None
