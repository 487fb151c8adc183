"""Named architectures: a preset is data.

Contract: stdlib only (a dry run reads this without importing torch). A preset says what differs from the defaults of
minillm.settings.architecture.Architecture, so that its entry reads like a model card; layers are stated as a rule, so
that any number of them can be asked for. PRESETS holds the complete ones, `preset` one with changes. Token ids follow
minillm.data.tokenizer: 0 is <|endoftext|>.
"""

from __future__ import annotations

from typing import Any

from minillm.settings.architecture import DEFAULTS, Architecture
from minillm.settings.derived import derive

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
EVERY_LAYER_SPARSE = {"repeat": ["sparse"]}
FIRST_THREE_DENSE = {"first": ["dense"] * 3, "repeat": ["sparse"]}


def _preset(**fields: Any) -> dict[str, Any]:
    if unknown := sorted(set(fields) - set(DEFAULTS)):
        raise KeyError(f"a preset names fields that are not in minillm.settings.architecture.Architecture: {unknown}")
    return fields


STATED: dict[str, dict[str, Any]] = {
    # What two CPU cores train in a few minutes: 3.8M parameters, 1.0M of them the tied embedding. The wide
    # initialisation (about 1 / sqrt(hidden_size)) leaves the first plateau sooner than 0.02 at this width.
    "demo": _preset(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, rope_theta=10_000.0, initializer_range=0.06,
    ),
    # The demo with experts: 8 in each layer, of which a token takes two that are together as wide as the demo's MLP.
    "moe-demo": _preset(
        vocab_size=4096, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=512, rope_theta=10_000.0, initializer_range=0.06,
        mlp_layer_types=EVERY_LAYER_SPARSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=344,
        router_noise="jitter", router_aux_loss_coef=0.01, router_z_loss_coef=0.001,
    ),
    # Characters, GPT-2's parts at their smallest. position_embedding_type=sinusoidal works as well.
    # 261 special and byte tokens and up to 123 characters; give more for other scripts.
    "char-tiny": _preset(
        vocab_size=384, hidden_size=128, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=128, position_embedding_type="learned",
        norm_type="layernorm", mlp_type="mlp", hidden_act="gelu", attention_bias=True, mlp_bias=True,
        attention_dropout=0.1, hidden_dropout=0.1, embedding_dropout=0.1, initializer_range=0.08,
    ),
    # GPT-2 small (Radford et al. 2019; openai/gpt-2).
    "gpt2-124m": _preset(
        vocab_size=50_257, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12, head_dim=64,
        max_position_embeddings=1024, position_embedding_type="learned",
        norm_type="layernorm", mlp_type="mlp", hidden_act="gelu_new", attention_bias=True, mlp_bias=True,
        attention_dropout=0.1, hidden_dropout=0.1, embedding_dropout=0.1, scale_residual_init=True,
        bos_token_id=50_256, eos_token_id=50_256, pad_token_id=50_256,
    ),
    # 26M Llama-style: 25,829,888 parameters; trained at 512 tokens, rotary base large enough for 32k.
    "dense-26m": _preset(),
    # 171M with a plain two-layer SiLU MLP, many narrow heads, and biases.
    "dense-171m": _preset(
        vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=64, num_key_value_heads=32, head_dim=16, attention_bias=True,
        max_position_embeddings=512, rope_theta=10_000.0, rms_norm_eps=1e-8,
        mlp_type="mlp", mlp_bias=True, hidden_dropout=0.1,
    ),
    # 876M: 8 plain SiLU experts a layer, 4 a token, chosen by a router with learned noise.
    "moe-876m": _preset(
        vocab_size=32_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=12,
        num_attention_heads=16, num_key_value_heads=8, head_dim=64,
        max_position_embeddings=512, rope_theta=10_000.0, rms_norm_eps=1e-8,
        mlp_type="mlp", mlp_bias=True, mlp_layer_types=EVERY_LAYER_SPARSE,
        num_experts=8, num_experts_per_tok=4, moe_intermediate_size=4096, router_type="noisy_topk",
        router_importance_loss_coef=0.05,
    ),
    # Llama 3 at 124M. For longer contexts: max_position_embeddings, and rope_scaling with rope_type llama3.
    "llama3-mini": _preset(
        vocab_size=32_004, hidden_size=768, intermediate_size=2064, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=512, rope_theta=500_000.0, rms_norm_eps=1e-6,
    ),
    # Qwen3: norms on queries and keys, and heads whose width does not follow from the hidden size.
    "qwen3-mini": _preset(
        vocab_size=6400, hidden_size=768, intermediate_size=2432, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=96, qk_norm=True, rms_norm_eps=1e-6,
    ),
    "qwen3-moe-mini": _preset(
        vocab_size=6400, hidden_size=768, intermediate_size=2432, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=96, qk_norm=True, rms_norm_eps=1e-6,
        mlp_layer_types=EVERY_LAYER_SPARSE,
        # One expert a token: renormalised, its weight would be 1 whatever the router says, and teach it nothing.
        num_experts=4, num_experts_per_tok=1, moe_intermediate_size=2432, norm_topk_prob=False,
        router_aux_loss_coef=5e-4,
    ),
    # Mistral 7B's sliding window (arXiv:2310.06825) at 124M.
    "mistral-mini": _preset(
        vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64,
        layer_types={"repeat": [SLIDING]}, sliding_window=256,
        max_position_embeddings=1024, rope_theta=10_000.0, tie_word_embeddings=False,
    ),
    # Mixtral (arXiv:2401.04088): 8 experts, the best two renormalised.
    "mixtral-mini": _preset(
        vocab_size=32_000, hidden_size=768, intermediate_size=1024, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=1024, rope_theta=1_000_000.0, tie_word_embeddings=False,
        mlp_layer_types=EVERY_LAYER_SPARSE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=1024,
        router_aux_loss_coef=0.02,
    ),
    # Residual-MoE of DeepSpeed-MoE (arXiv:2201.05596, section 4.1) at GPT-2's size: in every other layer each token
    # takes a fixed MLP and one of 8 experts. The weight of one expert is not renormalised (see qwen3-moe-mini).
    "residual-moe-mini": _preset(
        vocab_size=32_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, num_key_value_heads=12, head_dim=64,
        max_position_embeddings=1024, position_embedding_type="learned",
        norm_type="layernorm", mlp_type="mlp", hidden_act="gelu", attention_bias=True, mlp_bias=True,
        scale_residual_init=True,
        mlp_layer_types={"repeat": ["dense", "sparse"]},
        num_experts=8, num_experts_per_tok=1, moe_intermediate_size=3072,
        shared_expert_intermediate_size=3072, residual_moe=True,
        router_noise="rsample", norm_topk_prob=False, router_aux_loss_coef=0.01,
    ),
    # DeepSeek-V3 (arXiv:2412.19437): latent attention, 8 experts in 4 groups and a shared one, balanced by biases,
    # and one module that predicts the token after the next.
    "deepseek-v3-mini": _preset(
        vocab_size=32_004, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        attention_type="mla", num_attention_heads=12, num_key_value_heads=12, head_dim=96,
        q_lora_rank=384, kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
        max_position_embeddings=2048, rope_theta=10_000.0, rms_norm_eps=1e-6, tie_word_embeddings=False,
        mlp_layer_types=FIRST_THREE_DENSE,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        router_type="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.5,
        router_bias_update_speed=0.001, router_sequence_loss_coef=1e-4,
        num_nextn_predict_layers=1, initializer_range=0.006,
    ),
    # Qwen3-Next: three gated DeltaNet layers to one of gated attention.
    "qwen3-next-mini": _preset(
        vocab_size=32_004, hidden_size=768, intermediate_size=2112, num_hidden_layers=12,
        layer_types={"repeat": [LINEAR, LINEAR, LINEAR, FULL]},
        num_attention_heads=12, num_key_value_heads=2, head_dim=64, qk_norm=True, attention_output_gate=True,
        linear_num_key_heads=6, linear_num_value_heads=12, linear_key_head_dim=64, linear_value_head_dim=64,
        linear_conv_kernel_dim=4,
        max_position_embeddings=2048, rope_theta=10_000_000.0, partial_rotary_factor=0.25,
        norm_type="zero_centered_rmsnorm", rms_norm_eps=1e-6,
        mlp_layer_types=FIRST_THREE_DENSE,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512,
        shared_expert_intermediate_size=512, shared_expert_gate=True, router_aux_loss_coef=0.01,
    ),
}  # fmt: skip


def preset(name: str, **changes: Any) -> Architecture:
    """A preset with some fields changed, and with what follows from them (minillm.settings.derived)."""
    return derive(STATED[name], changes)


PRESETS: dict[str, Architecture] = {name: preset(name) for name in STATED}
