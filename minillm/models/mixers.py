"""Which sequence mixer a layer has, and the masks the mixers of one forward share.

The seam: a mixer is built as Mixer(config, layer_idx) and called as
`mixer(hidden_states, positions, mask, cache)`, [B, T, D] in and out, where `positions` is the rotation that
the model's position module returned (None where positions are added to the embeddings) and `mask` is what the builder
in MASKS made for this layer's type. Attention layers get None (plain causal) or bool [B, 1, T, S], True where a query
may look, or on CUDA its short form attention.PackedDocuments (`attend` takes all three); linear_attention layers get
None (one document a row) or gated_deltanet.Segments.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import Cache

from minillm.models.attention import (
    GroupedQueryAttention,
    PackedDocuments,
    build_attention_mask,
    document_borders_of,
    packs,
)
from minillm.models.configuration_minillm import MiniLLMConfig
from minillm.models.gated_deltanet import GatedDeltaNet, Segments
from minillm.models.latent_attention import LatentAttention

ATTENTION: dict[str, type[nn.Module]] = {"gqa": GroupedQueryAttention, "mla": LatentAttention}
MIXERS: dict[str, dict[str, type[nn.Module]]] = {  # layer type -> attention_type -> class
    "full_attention": ATTENTION,
    "sliding_attention": {"gqa": GroupedQueryAttention},
    "linear_attention": dict.fromkeys(ATTENTION, GatedDeltaNet),
}


def build_mixer(config: MiniLLMConfig, layer_idx: int) -> nn.Module:
    """The mixer of layer `layer_idx`; ValueError with the valid names for a combination that does not exist."""
    layer_type = config.layer_type_of(layer_idx)
    table = MIXERS.get(layer_type, {})
    try:
        return table[config.attention_type](config, layer_idx)
    except KeyError:
        raise ValueError(
            f"attention_type is {config.attention_type!r}, and layer {layer_idx} is {layer_type}: valid are "
            f"{', '.join(table)}"
        ) from None


def build_masks(
    config: MiniLLMConfig,
    length: int,
    device: torch.device,
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
    document_ids: torch.Tensor | None = None,
    cache: Cache | None = None,
    document_borders: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | PackedDocuments | Segments | None]:
    """One mask for each type of layer the model has.

    Args:
        length: T, the number of new tokens.
        attention_mask: 0/1 [B, cached + T], 0 at padding; or a finished mask [B, 1, T, S]; or finished masks by layer
            type, as `generate` makes them for a cache of fixed size.
        document_ids: [B, T], equal within a document; only without cached tokens.
        cache: the cache, before this forward's tokens are added.
        document_borders: int32, where documents begin in the flattened batch, and its length at the end, once or
            several times; the same as document_ids, which it spares to look through on a GPU.

    Raises:
        ValueError: documents with cached tokens, or a finished mask for a layer that takes none.
    """
    if document_ids is not None and cache is not None and cache.get_seq_length():
        raise ValueError("document_ids cannot be used with cached tokens: pack documents only without a cache")
    if document_ids is not None and document_borders is None and packs(device):
        document_borders = document_borders_of(document_ids)  # once for all types of layers: it waits for the device
    documents = document_ids, cache, document_borders
    masks = {}
    for layer_type in dict.fromkeys(config.layer_types):
        given = attention_mask.get(layer_type) if isinstance(attention_mask, dict) else attention_mask
        first = config.layer_types.index(layer_type)
        masks[layer_type] = MASKS[layer_type](config, first, length, device, given, *documents)
    return masks


def _full(config, layer_idx, *arguments):
    return build_attention_mask(*arguments, layer_idx=layer_idx)


def _sliding(config, layer_idx, *arguments):
    return build_attention_mask(*arguments, layer_idx=layer_idx, sliding_window=config.sliding_window)


def _linear(config, layer_idx, length, device, attention_mask, document_ids, cache, document_borders):
    """Segments; None where each row is one unpadded document."""
    if attention_mask is not None and attention_mask.dim() == 4:
        raise ValueError("linear_attention layers take no finished mask [B, 1, T, S]: pass a 0/1 mask [B, T]")
    if attention_mask is not None and not torch.compiler.is_compiling() and attention_mask.all():
        attention_mask = None
    if attention_mask is None:
        return None if document_ids is None else Segments.of(document_ids, borders=document_borders)
    real = attention_mask[:, -length:].bool()
    documents = torch.zeros_like(real, dtype=torch.long) if document_ids is None else document_ids
    return Segments.of(documents, real=real)


MASKS = {"full_attention": _full, "sliding_attention": _sliding, "linear_attention": _linear}
