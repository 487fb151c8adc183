"""What of transformers is not public, documented API, or changed between 5.17 and 5.24; see the package's contract.

Torch and transformers only: an exported folder with its own modeling code carries this file along.

Each was seen in 5.17 to 5.24:

- init: `transformers.initialization`, which fills a parameter unless it was loaded.
- GradientCheckpointingLayer: from `transformers.modeling_layers`.
- CACHE_NAME, BothCacheNames, takes_both_cache_names: what a forward and its output call the cache. It is
  `past_key_values` up to 5.23 and `cache` from 5.24 on, where forwards accept the old name until 5.40.
- linear_attention_states: `Cache.get_conv_state` and `get_recurrent_state`, which 5.21 added; before, the cache's
  layers alone have them.
- source_folder, set_source_folder: `config._name_or_path`.
- bpe_of_tiktoken_ranks: `TikTokenConverter` of `transformers.convert_slow_tokenizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields

import torch
from transformers import Cache, PretrainedConfig
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import logging

__all__ = [
    "CACHE_NAME",
    "CACHE_NAMES",
    "BaseModelOutputWithPast",
    "BothCacheNames",
    "CausalLMOutputWithPast",
    "GradientCheckpointingLayer",
    "bpe_of_tiktoken_ranks",
    "init",
    "linear_attention_states",
    "set_source_folder",
    "source_folder",
    "takes_both_cache_names",
    "warn_once",
]

CACHE_NAMES = ("cache", "past_key_values")
# The one that this transformers passes to a forward and reads from an output.
CACHE_NAME = next(name for name in CACHE_NAMES if name in {field.name for field in fields(BaseModelOutputWithPast)})


def warn_once(message: str) -> None:
    """A warning in transformers' log, once a process; nothing inside a graph that is being compiled."""
    if not torch.compiler.is_compiling():
        logging.get_logger("transformers.minillm").warning_once(message)


def takes_both_cache_names(forward: Callable) -> Callable:
    """Let a method with the keyword argument `cache` take it as `past_key_values` too, as transformers' models do.

    From 5.24 on the old name is answered with transformers' deprecation; before, it was the name.

    Raises:
        TypeError: both are given.
    """

    @functools.wraps(forward)
    def forward_with_both(*arguments, **options):
        if "past_key_values" in options:
            if options.get("cache") is not None:
                raise TypeError(f"{forward.__qualname__}() takes either cache or past_key_values, not both")
            options["cache"] = options.pop("past_key_values")
            if CACHE_NAME == "cache":
                warn_once("`past_key_values` is deprecated. Use `cache` instead.")
        return forward(*arguments, **options)

    return forward_with_both


class BothCacheNames:
    """For an output class: its cache can be read as `cache` and as `past_key_values`; it is made with CACHE_NAME."""

    if CACHE_NAME == "past_key_values":  # from 5.24 on, transformers' outputs answer the old name themselves

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values


def linear_attention_states(cache: Cache, layer_idx: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A linear-attention layer's last inputs of the convolution [B, F, kernel or more] and its recurrent state.

    Both are None before the layer's first tokens, and after `reset`.
    """
    if hasattr(cache, "get_conv_state"):
        return cache.get_conv_state(layer_idx), cache.get_recurrent_state(layer_idx)
    layer = cache.layers[layer_idx]
    if not layer.has_previous_state[0]:
        return None, None
    return layer.conv_states[0], layer.recurrent_states[0]


def source_folder(config: PretrainedConfig) -> str:
    """The folder or name that a model was loaded from; empty for one that was built."""
    return config._name_or_path


def set_source_folder(config: PretrainedConfig, folder: str) -> None:
    config._name_or_path = folder


def bpe_of_tiktoken_ranks(ranks: Mapping[bytes, int]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, as `tokenizers.models.BPE` takes them, of tiktoken's mergeable ranks."""
    from transformers.convert_slow_tokenizer import TikTokenConverter  # heavy, and nothing else needs it

    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda ranks: ranks  # it would read them from a file
    return converter.extract_vocab_merges_from_model(ranks)
