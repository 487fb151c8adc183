"""Rotary angles of every scaling against transformers', learned and sinusoidal positions against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from minillm.models import MiniLLMConfig
from minillm.models.positions import (
    POSITIONS,
    ROPE_TYPES,
    LearnedPositions,
    RotaryEmbedding,
    SinusoidalPositions,
    apply_rotary,
    build_positions,
    yarn_attention_scale,
)
from tests.support.toy_presets import toy_model

CONTEXT = 64
SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn, own ramp": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32,
        "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False,
    },
    "yarn, attention factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.7,
    },
    "yarn, DeepSeek": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64,
        "mscale": 1.0, "mscale_all_dim": 0.7,
    },
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip


def ours_and_theirs(scaling: dict | None, **changes) -> tuple[RotaryEmbedding, LlamaRotaryEmbedding]:
    fields = {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16}
    fields |= {"max_position_embeddings": CONTEXT, "vocab_size": 97}
    parameters = {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}
    part = changes.pop("partial_rotary_factor", 1.0)
    config = MiniLLMConfig(**fields, rope_theta=500.0, rope_scaling=scaling, partial_rotary_factor=part)
    llama = LlamaConfig(**fields, rope_parameters={**parameters, "partial_rotary_factor": part}, pad_token_id=0)
    return RotaryEmbedding(config), LlamaRotaryEmbedding(llama)


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("length", [1, 40, CONTEXT, 65, 300])
def test_angles_equal_transformers(name, length):
    ours, theirs = ours_and_theirs(SCALINGS[name])
    position_ids = torch.arange(length)[None]
    cos, sin = theirs(torch.zeros(1, length, 1), position_ids)
    expected = torch.cat((cos[..., :8], sin[..., :8]), dim=-1)[:, :, None]
    torch.testing.assert_close(ours.rotation(position_ids), expected, rtol=1e-5, atol=1e-5)
    x, rotation = torch.randn(1, length, 3, 16), ours.rotation(position_ids)
    turned, _ = apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(apply_rotary(x, rotation), turned, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SCALINGS if name != "default"])
def test_a_part_of_a_head_scales_like_transformers(name):
    scaling = SCALINGS[name]
    ours, theirs = ours_and_theirs(scaling, partial_rotary_factor=0.5)
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs.config, seq_len=200)
    actual = ours.frequencies(ours.theta, ours.rotary_dim, ours.scaling, torch.tensor([[199]]))
    actual = actual.flatten()  # dynamic: of each row
    assert actual.shape == (4,) and ours.attention_factor == pytest.approx(factor)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_every_scaling_is_compared():
    assert {(scaling or {"rope_type": "default"})["rope_type"] for scaling in SCALINGS.values()} == set(ROPE_TYPES)


def test_scalings_change_something():
    """Beyond the original context each kind turns by other angles than plain rotary positions do."""
    position_ids = torch.arange(200)[None]
    rotations = [ours_and_theirs(scaling)[0].rotation(position_ids) for scaling in SCALINGS.values()]
    for i, a in enumerate(rotations):
        assert all((a - b).abs().max() > 1e-2 for b in rotations[:i])


def test_dynamic_starts_from_the_original_context():
    scaling = {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    plain, dynamic = ours_and_theirs(None)[0], ours_and_theirs(scaling)[0]
    within, beyond = torch.arange(16)[None], torch.arange(17)[None]
    torch.testing.assert_close(dynamic.rotation(within), plain.rotation(within), rtol=0, atol=1e-6)
    assert (dynamic.rotation(beyond) - plain.rotation(beyond)).abs().max() > 1e-2


def test_only_the_first_dimensions_of_a_head_turn():
    ours, _ = ours_and_theirs(None, partial_rotary_factor=0.25)
    x, rotation = torch.randn(2, 5, 3, 16), ours.rotation(torch.arange(5)[None])
    assert rotation.shape == (1, 5, 1, 4)
    turned = apply_rotary(x, rotation)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    torch.testing.assert_close(turned[..., :4], apply_rotary(x[..., :4], rotation))
    assert apply_rotary(x, None) is x
    assert apply_rotary(x.bfloat16(), rotation).dtype == torch.bfloat16


@pytest.mark.parametrize("name", SCALINGS)
def test_softmax_scale_of_latent_attention_equals_deepseek(name):
    scaling = SCALINGS[name]
    expected = yarn_apply_mscale(scaling or {"rope_type": "default"}, 1.0)
    assert yarn_attention_scale(scaling) == pytest.approx(expected)
    assert (yarn_attention_scale(scaling) != 1.0) == (name == "yarn, DeepSeek")


def test_learned_positions_are_rows_of_a_table():
    config = MiniLLMConfig(max_position_embeddings=8, hidden_size=6, position_embedding_type="learned")
    positions = LearnedPositions(config)
    x, position_ids = torch.randn(2, 3, 6), torch.tensor([[0, 7, 2], [4, 4, 0]])
    moved, rotation = positions(x, position_ids)
    assert rotation is None
    assert torch.equal(moved, x + positions.embed_positions.weight[position_ids])


def test_a_position_past_the_table_is_named():
    model = toy_model("gpt2-124m").eval()
    model(torch.ones(1, 64, dtype=torch.long))
    with pytest.raises(ValueError, match=r"position 64 is past the 64 learned positions.*max_position_embeddings"):
        model(torch.ones(1, 65, dtype=torch.long))


def test_sinusoids_are_the_formula():
    positions = SinusoidalPositions(MiniLLMConfig(hidden_size=6, position_embedding_type="sinusoidal"))
    x, position_ids = torch.randn(2, 2, 6), torch.tensor([[0, 3], [1000, 7]])
    moved, rotation = positions(x, position_ids)
    assert rotation is None
    for b in range(2):
        for t in range(2):
            p = position_ids[b, t].item()
            wave = [f(p / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
            torch.testing.assert_close(moved[b, t], 6**0.5 * x[b, t] + torch.tensor(wave), rtol=1e-5, atol=1e-4)
    assert not list(positions.parameters()) and not list(positions.buffers())


@pytest.mark.parametrize("kind", sorted(POSITIONS))
def test_positions_keep_the_dtype_and_compile(kind):
    config = MiniLLMConfig(hidden_size=64, position_embedding_type=kind, max_position_embeddings=32)
    positions = build_positions(config).to(torch.bfloat16)
    x, position_ids = torch.randn(2, 5, 64, dtype=torch.bfloat16), torch.arange(5)[None]
    moved, rotation = positions(x, position_ids)
    assert moved.dtype == torch.bfloat16
    assert rotation is None or rotation.dtype == torch.float32
    compiled = torch.compile(positions, fullgraph=True, backend="aot_eager")(x, position_ids)
    torch.testing.assert_close(compiled, (moved, rotation))


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_scaled_rotary_compiles(kind):
    ours, _ = ours_and_theirs(SCALINGS[kind])
    position_ids = torch.arange(100)[None]
    compiled = torch.compile(ours.rotation, fullgraph=True, backend="aot_eager")(position_ids)
    torch.testing.assert_close(compiled, ours.rotation(position_ids))
