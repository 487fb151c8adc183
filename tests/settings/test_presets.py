"""Every preset has exactly the architecture's fields, obeys the rules, and holds the published values."""

from __future__ import annotations

import pytest

from minillm.models import MiniLLMConfig
from minillm.settings.architecture import DEFAULTS, Architecture, problems_of
from minillm.settings.presets import PRESETS, preset


def test_the_config_declares_the_architectures_fields():
    declared = {name for name in MiniLLMConfig.__annotations__ if name in MiniLLMConfig.__dict__}
    assert declared - {"model_type", "keys_to_ignore_at_inference"} == set(DEFAULTS)
    assert {name: getattr(MiniLLMConfig, name) for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_exactly_the_fields_and_breaks_no_rule(name):
    assert list(PRESETS[name]) == list(DEFAULTS)
    assert problems_of(PRESETS[name]) == []


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_keeps_every_value(name):
    config = MiniLLMConfig(**PRESETS[name])
    for field, value in dict(PRESETS[name]).items():
        if value is not None:
            assert getattr(config, field) == value
    assert len(config.layer_types) == len(config.mlp_layer_types) == config.num_hidden_layers


@pytest.mark.parametrize(
    "name, changes, broken",
    [
        ("moe-demo", {"residual_moe": True}, "residual_moe is true: there is no shared expert"),
        ("residual-moe-mini", {"shared_expert_gate": True}, "shared_expert_gate is true: residual_moe weights"),
        ("demo", {"residual_moe": True}, "residual_moe is True: only sparse layers"),
        ("demo", {"router_noise": "jitter"}, "router_noise is 'jitter': only sparse layers"),
        ("moe-demo", {"router_noise": "gumbel"}, "router_noise is 'gumbel': valid names are none, jitter, rsample"),
        ("moe-876m", {"router_noise": "jitter"}, "router_noise is 'jitter': only router_type softmax has it"),
        ("deepseek-v3-mini", {"router_noise": "rsample"}, "router_noise is 'rsample': only router_type softmax"),
    ],
)
def test_expert_mechanisms_that_do_not_go_together_are_refused(name, changes, broken):
    (problem,) = problems_of(preset(name, **changes))
    assert problem.startswith(broken)


def test_every_field_differs_from_its_default_in_some_preset_or_is_an_option():
    """A field no preset uses is a mechanism nobody asked for."""
    options = {"rope_scaling", "mtp_loss_coef", "position_embedding_type"}
    usual = Architecture()
    used = {name for arch in PRESETS.values() for name in DEFAULTS if arch[name] != usual[name]}
    assert set(DEFAULTS) - used <= options


def test_dense_26m_is_the_published_shape():
    published = {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    published |= {"head_dim": 64, "intermediate_size": 1408, "vocab_size": 6400, "rope_theta": 1e6}
    published |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    assert {k: PRESETS["dense-26m"][k] for k in published} == published
