"""The cache under both its names, whatever transformers is installed: what older and newer callers write."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from transformers import DynamicCache
from transformers.utils import logging as transformers_logging

from minillm.compat.transformers_api import CACHE_NAME, linear_attention_states
from tests.support.toy_presets import toy_model

IDS = torch.arange(1, 13)[None]


@pytest.mark.parametrize("preset", ["demo", "deepseek-v3-mini", "qwen3-next-mini"])
def test_a_cache_is_taken_and_returned_under_both_names(preset):
    model = toy_model(preset).eval()
    whole = model(IDS).logits
    for name in ("cache", "past_key_values"):
        cache = DynamicCache(config=model.config)
        first = model(IDS[:, :7], **{name: cache})
        assert first.cache is cache and first.past_key_values is cache
        assert cache.get_seq_length(model.config.layer_types.index("full_attention")) == 7
        rest = model.model(IDS[:, 7:], **{name: first.cache})
        assert rest.cache is cache and rest.past_key_values is cache
        torch.testing.assert_close(model.lm_head(rest.last_hidden_state), whole[:, 7:], rtol=1e-4, atol=1e-4)
    made = model(IDS, use_cache=True)
    assert made.cache is made.past_key_values is made[CACHE_NAME] is not None
    assert model(IDS).cache is None


def test_the_old_name_is_answered_with_transformers_deprecation(caplog):
    model = toy_model("demo").eval()
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    # Other tests of this process may have heard it already, or asked for errors alone.
    transformers_logging.warning_once.cache_clear()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        model(IDS, past_key_values=DynamicCache(config=model.config))
    finally:
        logger.removeHandler(caplog.handler)
        transformers_logging.set_verbosity(verbosity)
    deprecated = "`past_key_values` is deprecated" in caplog.text
    assert deprecated == (CACHE_NAME == "cache")


def test_both_names_at_once_and_unknown_ones_are_errors():
    model = toy_model("demo").eval()
    cache = DynamicCache(config=model.config)
    with pytest.raises(TypeError, match="either cache or past_key_values"):
        model(IDS, cache=cache, past_key_values=cache)
    with pytest.raises(TypeError, match="kv_cache"):  # a cache that is swallowed would give wrong text without an error
        model(IDS, kv_cache=cache)


@pytest.mark.parametrize("preset", ["demo", "qwen3-next-mini"])
def test_generate_uses_the_cache_that_it_makes_or_is_given(preset):
    model = toy_model(preset).eval()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, use_cache=False, **options)
    lengths = []
    model.model.register_forward_pre_hook(lambda _, arguments: lengths.append(arguments[0].shape[1]))
    assert torch.equal(model.generate(IDS, **options), expected)
    given = {CACHE_NAME: DynamicCache(config=model.config)}
    assert torch.equal(model.generate(IDS, **given, **options), expected)
    assert lengths == [12, *[1] * 7] * 2  # the prompt once, then a token at a time


def test_checkpointed_layers_leave_the_cache_alone():
    """A layer computed again in backward would extend it twice; transformers' own models drop the cache there."""
    model = toy_model("demo")
    plain = copy.deepcopy(model)
    plain(IDS, labels=IDS).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    cache = DynamicCache(config=model.config)
    output = model(IDS, labels=IDS, cache=cache)
    output.loss.backward()
    assert output.cache is None and cache.get_seq_length() == 0
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_states_of_a_linear_layer_are_none_before_its_first_tokens_and_after_a_reset():
    model = toy_model("qwen3-next-mini").eval()
    cache = DynamicCache(config=model.config)
    layer = model.config.layer_types.index("linear_attention")
    assert linear_attention_states(cache, layer) == (None, None)
    model(IDS, cache=cache)
    assert all(state is not None and state.any() for state in linear_attention_states(cache, layer))
    cache.reset()
    assert linear_attention_states(cache, layer) == (None, None)
