"""Every preset spells out every architecture field and builds."""

from __future__ import annotations

import pytest

from minillm.models import MiniLLMConfig
from minillm.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_exactly_the_config_fields(name):
    fields = {f for f in MiniLLMConfig.__annotations__ if not f.startswith("_")}
    assert set(PRESETS[name]) == fields


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_keeps_every_value(name):
    config = MiniLLMConfig(**PRESETS[name])
    for field, value in PRESETS[name].items():
        if value is not None:
            assert getattr(config, field) == value
    assert config.layer_types == ["full_attention"] * config.num_hidden_layers
    assert config.mlp_layer_types == ["dense"] * config.num_hidden_layers


def test_dense_26m_is_the_published_shape():
    published = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    published |= {"head_dim": 64, "intermediate_size": 1408, "vocab_size": 6400, "rope_theta": 1e6}
    published |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    assert {k: PRESETS["dense-26m"][k] for k in published} == published
