"""Which family a config is, asked of its fields; and every option that one side lacks, refused by name."""

from __future__ import annotations

import subprocess
import sys

import pytest

from minillm.interop import from_transformers, native_family, to_transformers
from minillm.interop.families import FAMILIES
from minillm.interop.family import TRAINING_ONLY
from minillm.models import MiniLLMConfig
from minillm.settings.presets import PRESETS
from minillm.utils.errors import UserError
from tests.support.native_models import YARN, make_native
from tests.support.toy_presets import toy_fields, toy_model

NATIVE = {
    "demo": "llama",
    "dense-26m": "llama",
    "llama3-mini": "llama",
    "mistral-mini": "mistral",
    "qwen3-mini": "qwen3",
    "mixtral-mini": "mixtral",
    "qwen3-moe-mini": "qwen3_moe",
    "deepseek-v3-mini": "deepseek_v3",
    "qwen3-next-mini": "qwen3_next",
    "gpt2-124m": "gpt2",
    "char-tiny": "gpt2",
    "dense-171m": None,
    "moe-876m": None,
    "moe-demo": "mixtral",
    "residual-moe-mini": None,
}


def family_of(preset: str, **changes: object) -> str | None:
    return native_family(MiniLLMConfig(**toy_fields(preset, **changes)))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset):
    assert native_family(MiniLLMConfig(**PRESETS[preset])) == family_of(preset) == NATIVE[preset]


@pytest.mark.parametrize(
    "preset, changes, family",
    [
        ("llama3-mini", {"attention_bias": True}, "llama"),
        ("llama3-mini", {"qk_norm": True}, "qwen3"),
        ("llama3-mini", {"hidden_size": 50}, "mistral"),  # LlamaConfig wants a multiple of the heads
        ("llama3-mini", {"hidden_size": 50, "attention_bias": True}, None),
        ("llama3-mini", {"hidden_dropout": 0.1}, "llama"),
        ("llama3-mini", {"partial_rotary_factor": 0.5}, None),
        ("llama3-mini", {"position_embedding_type": "learned"}, None),
        ("llama3-mini", {"norm_type": "layernorm"}, None),
        ("llama3-mini", {"attention_output_gate": True}, None),
        ("llama3-mini", {"num_nextn_predict_layers": 1}, "llama"),
        ("mistral-mini", {"layer_types": ["sliding_attention", "full_attention"] * 2}, None),
        ("mistral-mini", {"layer_types": ["sliding_attention", "full_attention"] * 2, "qk_norm": True}, "qwen3"),
        ("mixtral-mini", {"norm_topk_prob": False}, None),
        ("mixtral-mini", {"mlp_layer_types": ["dense"] + ["sparse"] * 3}, None),
        ("mixtral-mini", {"shared_expert_intermediate_size": 8}, None),
        ("mixtral-mini", {"router_type": "sigmoid"}, None),
        ("mixtral-mini", {"router_noise": "rsample"}, "mixtral"),  # in training alone
        ("deepseek-v3-mini", {"residual_moe": True}, None),
        ("qwen3-moe-mini", {"mlp_layer_types": ["sparse", "dense"] * 2}, "qwen3_moe"),
        ("deepseek-v3-mini", {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, None),
        ("deepseek-v3-mini", {"shared_expert_intermediate_size": 40}, None),
        ("deepseek-v3-mini", {"shared_expert_intermediate_size": 0}, None),
        ("deepseek-v3-mini", {"router_type": "softmax", "n_group": 1, "topk_group": 1, "router_bias_update_speed": 0.0,
                              "router_sequence_loss_coef": 0.0}, None),
        ("qwen3-next-mini", {"shared_expert_gate": False}, None),
        ("qwen3-next-mini", {"attention_output_gate": False}, None),
        ("char-tiny", {"position_embedding_type": "sinusoidal"}, None),
        ("char-tiny", {"hidden_act": "silu"}, "gpt2"),
        ("gpt2-124m", {"num_key_value_heads": 3}, None),
        ("gpt2-124m", {"head_dim": 16}, None),
        ("gpt2-124m", {"tie_word_embeddings": False}, "gpt2"),
        ("gpt2-124m", {"mlp_bias": False}, None),
    ],
)  # fmt: skip
def test_the_fields_decide(preset, changes, family):
    assert family_of(preset, **changes) == family


def test_no_field_is_forgotten():
    """Every field of ours is converted, fixed, read by training alone, or belongs to a mechanism the family lacks."""
    latent = {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
    experts = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "routed_scaling_factor",
               "router_type", "shared_expert_gate", "shared_expert_intermediate_size", "residual_moe"}  # fmt: skip
    for name, family in FAMILIES.items():
        known = {*family.names, *family.fixed, *family.fixed_if_sparse, *family.carried, *TRAINING_ONLY}
        known |= {"layer_types", "mlp_layer_types"}  # `mixers` and `mlps` hold what is allowed
        known |= {"num_nextn_predict_layers", "mtp_loss_coef", "scale_residual_init"}
        known |= {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # converted, or read by no other positions
        known |= {"n_group", "topk_group"}  # of sigmoid routers, whose family converts them
        known |= latent if family.fixed["attention_type"] != "mla" else set()
        known |= experts if family.mlps == {"dense"} else set()
        known |= {"sliding_window"} if "sliding_attention" not in family.mixers else set()
        known |= {field for field in PRESETS["demo"] if field.startswith("linear_")} - (
            set(family.carried) if "linear_attention" in family.mixers else set()
        )
        assert set(PRESETS["demo"]) <= known, (name, set(PRESETS["demo"]) - known)


def test_no_native_class_names_the_nearest_and_what_it_lacks():
    with pytest.raises(UserError) as raised:
        to_transformers(toy_model("mistral-mini", layer_types=["sliding_attention", "full_attention"] * 2))
    assert "ForCausalLM, but layer_types holds sliding_attention" in str(raised.value)
    with pytest.raises(UserError, match="position_embedding_type is 'sinusoidal', not 'learned'"):
        to_transformers(toy_model("char-tiny", position_embedding_type="sinusoidal"))
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    with pytest.raises(UserError, match="dynamic stretches from original_max_position_embeddings 32"):
        FAMILIES["llama"].config_to_theirs(MiniLLMConfig(**toy_fields("llama3-mini", rope_scaling=scaling)))


@pytest.mark.parametrize(
    "case, changes, named",
    [
        ("llama", {"mlp_bias": True}, "LlamaConfig: mlp_bias is True: only False can be converted"),
        ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("mistral", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0,
                                       "short_factor": [1.0] * 8, "long_factor": [1.0] * 8,
                                       "original_max_position_embeddings": 8}}, "rope_type is 'longrope'"),
        ("llama-yarn", {"rope_parameters": {**YARN, "surprise": 1.0}}, "yarn does not know surprise"),
        ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor is 0.5"),
        ("llama", {"eos_token_id": 900}, "LlamaConfig: eos_token_id is 900"),
        ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("deepseek", {"attention_bias": True}, "attention_bias is True"),
        ("deepseek", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("qwen3-next", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ("gpt2", {"activation_function": "relu"}, "activation_function is 'relu': only silu, gelu, gelu_new"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("gpt2", {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn is True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights is False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
    ],
)  # fmt: skip
def test_options_we_lack_are_refused(case, changes, named):
    with pytest.raises(UserError, match=named):
        from_transformers(make_native(case, **changes))


def test_other_spellings_of_rope_scaling():
    config = make_native("llama-yarn").config
    config.rope_parameters = {"type": "yarn", **YARN, "mscale_all_dim": 0, "factor": None, "attention_factor": None}
    scaling = FAMILIES[config.model_type].config_to_ours(config).rope_scaling
    assert scaling == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0,
                       "mscale": 0.7}  # fmt: skip


def test_other_objects_are_refused():
    for thing in (make_native("llama").model, toy_model("demo"), object()):
        with pytest.raises(UserError, match="LlamaModel|MiniLLMForCausalLM|object"):
            from_transformers(thing)


def test_importing_interop_imports_nothing_heavy():
    code = "import sys, minillm.interop; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    with pytest.raises(ImportError):
        from minillm.interop import no_such_name  # noqa: F401
