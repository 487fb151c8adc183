"""What follows from a changed field: a preset of any size, and an error where only the user can decide."""

from __future__ import annotations

import pytest
import torch

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.accounting import num_parameters
from minillm.settings.architecture import problems_of
from minillm.settings.derived import coerce
from minillm.settings.presets import PRESETS, STATED, preset

FULL, LINEAR = "full_attention", "linear_attention"
SPARSE = [name for name, arch in PRESETS.items() if arch.num_experts]
CHANGES = [
    *({"num_hidden_layers": number} for number in (1, 2, 3, 4, 5, 24)),
    {"hidden_size": 64}, {"intermediate_size": 96}, {"vocab_size": 300},
    {"num_attention_heads": 4}, {"num_attention_heads": 6},
    {"layer_types": None}, {"mlp_layer_types": None}, {"attention_type": "gqa"}, {"mlp_type": "mlp"},
    {"mlp_type": "swiglu"}, {"norm_type": "layernorm"}, {"num_nextn_predict_layers": 0},
    {"num_nextn_predict_layers": 1}, {"shared_expert_intermediate_size": 0},
]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_one_field_alone_gives_a_model(name, changes):
    arch = preset(name, **changes)
    assert problems_of(arch) == []
    assert all(arch[field] == value for field, value in changes.items() if value is not None)


@pytest.mark.parametrize("experts", [1, 3, 4, 6, 64])
@pytest.mark.parametrize("name", SPARSE)
def test_the_number_of_experts_alone_gives_a_model(name, experts):
    arch = preset(name, num_experts=experts)
    assert problems_of(arch) == [] and arch.num_experts == experts


@pytest.mark.parametrize("router", ["softmax", "sigmoid", "noisy_topk"])
@pytest.mark.parametrize("name", SPARSE)
def test_the_router_alone_gives_a_model(name, router):
    assert problems_of(preset(name, router_type=router)) == []


@pytest.mark.parametrize("name", ["deepseek-v3-mini", "qwen3-next-mini", "residual-moe-mini", "mistral-mini"])
def test_the_smaller_model_is_the_one_that_was_predicted(name):
    arch = preset(name, num_hidden_layers=4)
    with torch.device("meta"):
        model = MiniLLMForCausalLM(MiniLLMConfig(**arch))
    assert sum(p.numel() for p in model.parameters()) == num_parameters(arch)["total"]
    assert num_parameters(arch)["total"] < num_parameters(PRESETS[name])["total"]


@pytest.mark.parametrize(
    "name, layers, field, expected",
    [
        ("deepseek-v3-mini", 4, "mlp_layer_types", ["dense", "dense", "dense", "sparse"]),
        ("deepseek-v3-mini", 2, "mlp_layer_types", ["dense", "sparse"]),  # the last layer keeps its experts
        ("qwen3-next-mini", 4, "layer_types", [LINEAR, LINEAR, LINEAR, FULL]),
        ("qwen3-next-mini", 2, "layer_types", [LINEAR, FULL]),
        ("qwen3-next-mini", 6, "layer_types", [LINEAR, LINEAR, LINEAR, FULL, LINEAR, LINEAR]),
        ("residual-moe-mini", 3, "mlp_layer_types", ["dense", "sparse", "dense"]),
        ("dense-26m", 2, "layer_types", [FULL, FULL]),
    ],
)
def test_layers_are_a_rule(name, layers, field, expected):
    assert preset(name, num_hidden_layers=layers)[field] == expected


def test_a_rule_can_be_given_by_the_user_too():
    arch = preset("demo", layer_types={"first": ["sliding_attention"], "repeat": [FULL]}, sliding_window=8)
    assert arch.layer_types == ["sliding_attention", FULL, FULL, FULL] and problems_of(arch) == []
    assert preset("demo", layer_types=[FULL] * 4) == PRESETS["demo"]


@pytest.mark.parametrize(
    "name, changes, problem",
    [
        ("demo", {"num_experts": 4}, "num_experts is 4: only sparse layers (mlp_layer_types) reads it"),
        ("deepseek-v3-mini", {"mlp_layer_types": None, "n_group": 2}, "n_group is 2: only sparse layers"),
        ("deepseek-v3-mini", {"attention_type": "gqa", "kv_lora_rank": 8}, "kv_lora_rank: only attention_type mla"),
        ("deepseek-v3-mini", {"head_dim": 32}, "head_dim is 32: with mla it is"),
        ("demo", {"num_key_value_heads": 3}, "num_key_value_heads is 3: it must divide"),
        ("demo", {"layer_types": {"repeat": []}}, "layer_types is {'repeat': []}: it must be a list"),
        ("demo", {"layer_types": {"repeats": [FULL]}}, "layer_types is {'repeats'"),
        ("demo", {"layer_types": [FULL] * 3}, "layer_types names 3 layers: it must name num_hidden_layers (4)"),
        ("demo", {"hidden_size": -4}, "hidden_size is -4: it must be a whole number above 0"),
        ("demo", {"num_nextn_predict_layers": 1.5}, "num_nextn_predict_layers is 1.5: it must be a whole number"),
    ],
)
def test_what_the_user_gave_is_never_changed(name, changes, problem):
    (found,) = problems_of(preset(name, **changes))
    assert found.startswith(problem)


def test_presets_share_no_list():
    one, other = preset("qwen3-next-mini"), preset("qwen3-next-mini")
    assert one == other and one.layer_types is not other.layer_types
    assert STATED["qwen3-next-mini"]["layer_types"] == {"repeat": [LINEAR, LINEAR, LINEAR, FULL]}


@pytest.mark.parametrize(
    "name, value, expected",
    [("hidden_size", 64.0, 64), ("hidden_size", "64", 64), ("hidden_size", 2.5, 2.5), ("rope_theta", 10000, 10000.0),
     ("rope_theta", "1e6", 1e6), ("hidden_size", True, True), ("q_lora_rank", None, None), ("norm_type", "x", "x"),
     ("hidden_size", "big", "big"), ("hidden_size", float("inf"), float("inf"))],
)  # fmt: skip
def test_a_value_takes_the_fields_type_where_nothing_is_lost(name, value, expected):
    found = coerce(name, value)
    assert found == expected and type(found) is type(expected)
