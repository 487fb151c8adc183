"""Tiny models of every native family with options that presets do not use, and weights none of which is 0 or 1."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "bos_token_id": 3,
    "eos_token_id": [4, 5],
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 700.0},
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 700.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 8,
        "beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 0.9}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 700.0, "factor": 3.0}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# case -> (model_type, what differs from SHAPE)
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"attention_bias": True, "rope_parameters": LLAMA3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "llama-yarn": ("llama", {"rope_parameters": {**YARN, "mscale_all_dim": 0.4, "truncate": False}}),
    "mistral": ("mistral", {"sliding_window": 5, "attention_dropout": 0.1}),
    "mistral-full": ("mistral", {"sliding_window": None, "hidden_size": 50}),
    "qwen3": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3,
                        "attention_bias": True}),
    "mixtral": ("mixtral", {"sliding_window": 5, "head_dim": None, "num_local_experts": 5, "num_experts_per_tok": 3,
                            "router_aux_loss_coef": 0.03}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1], "decoder_sparse_step": 2, "norm_topk_prob": True,
                                "attention_bias": True, "use_sliding_window": True, "sliding_window": 5}),
    "deepseek": ("deepseek_v3", {"num_key_value_heads": 6, "q_lora_rank": 20, "kv_lora_rank": 12,
                                 "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
                                 "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3,
                                 "moe_intermediate_size": 24, "n_shared_experts": 2, "first_k_dense_replace": 1,
                                 "norm_topk_prob": False, "routed_scaling_factor": 1.7, "rope_parameters": YARN}),
    "deepseek-plain": ("deepseek_v3", {"num_key_value_heads": 6, "q_lora_rank": None, "kv_lora_rank": 12,
                                       "qk_nope_head_dim": 6, "qk_rope_head_dim": 8, "v_head_dim": 10,
                                       "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
                                       "moe_intermediate_size": 24, "first_k_dense_replace": 3,
                                       "tie_word_embeddings": True}),
    "qwen3-next": ("qwen3_next", {**EXPERTS, "num_hidden_layers": 6, "full_attention_interval": 3,
                                  "mlp_only_layers": [3], "decoder_sparse_step": 2, "attention_bias": True,
                                  "shared_expert_intermediate_size": 20, "linear_conv_kernel_dim": 3,
                                  "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 6,
                                  "linear_value_head_dim": 10,
                                  "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}),
    "gpt2": ("gpt2", {"n_inner": 72, "activation_function": "gelu", "attn_pdrop": 0.3, "resid_pdrop": 0.2,
                      "embd_pdrop": 0.4, "layer_norm_epsilon": 1e-3, "tie_word_embeddings": True}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
}  # fmt: skip
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3", "mixtral": "Mixtral", "qwen3_moe": "Qwen3Moe",
    "deepseek_v3": "DeepseekV3", "qwen3_next": "Qwen3Next", "gpt2": "GPT2",
}  # fmt: skip
NOT_OF_GPT2 = ("intermediate_size", "num_key_value_heads", "head_dim", "rope_parameters")


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 7, scale: float = 0.1) -> torch.nn.Module:
    """Add noise to every parameter and every saved buffer, so that no norm is 1, no bias 0, no two rows alike."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in dict.fromkeys(model.state_dict(keep_vars=True).values()):
        tensor += torch.randn(tensor.shape, generator=generator) * scale
    return model


def make_native(case: str, **changes: object) -> PreTrainedModel:
    """The native model of a case, in eval mode, the same weights at every call."""
    model_type, fields = CASES[case]
    fields = {**SHAPE, **fields, **changes}
    if model_type == "gpt2":
        fields = {name: value for name, value in fields.items() if name not in NOT_OF_GPT2}
    if model_type == "deepseek_v3":
        del fields["head_dim"]
    config = getattr(transformers, f"{CLASSES[model_type]}Config")(**fields)
    head = "LMHeadModel" if model_type == "gpt2" else "ForCausalLM"
    torch.manual_seed(0)
    return randomise(getattr(transformers, f"{CLASSES[model_type]}{head}")(config)).eval()
