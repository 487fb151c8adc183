"""Which sequence mixer a layer has.

The seam: a mixer is built as Mixer(config, layer_idx) and called as
`mixer(hidden_states, positions, attention_mask, past_key_values)`, [B, T, D] in and out, where `positions` is what the
model's position module returned and `attention_mask` is None (plain causal) or bool [B, 1, T, S], True where a query
may look.
"""

from __future__ import annotations

from torch import nn

from minillm.models.attention import GroupedQueryAttention
from minillm.models.configuration_minillm import MiniLLMConfig

FULL_ATTENTION: dict[str, type[nn.Module]] = {"gqa": GroupedQueryAttention}


def build_mixer(config: MiniLLMConfig, layer_idx: int) -> nn.Module:
    """The mixer of layer `layer_idx`: for a full_attention layer the class of `config.attention_type`."""
    try:
        return FULL_ATTENTION[config.attention_type](config, layer_idx)
    except KeyError:
        valid = ", ".join(FULL_ATTENTION)
        raise ValueError(
            f"attention_type is {config.attention_type!r} (layer {layer_idx}): valid names are {valid}"
        ) from None
