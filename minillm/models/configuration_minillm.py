"""The architecture as data: which mechanism each layer has, and its shapes.

Contract: the fields, their meaning and the rules between them are minillm.settings.architecture's. `rope_theta` and
`rope_scaling` stand flat, as in the config files of published models, and not inside transformers 5's
`rope_parameters`, so that a run can set them as `model.rope_theta`; interop converts. `layer_types` and
`mlp_layer_types` are full lists once the config is built. A shape that cannot work raises ValueError with the field,
its value and the rule.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from minillm.settings.architecture import DEFAULTS, layer_types, mlp_layer_types, problems_of


class MiniLLMConfig(PretrainedConfig):
    """Configuration of MiniLLMForCausalLM; every field of minillm.settings.architecture.DEFAULTS, in that order."""

    model_type = "minillm"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # by the older and the newer transformers

    vocab_size: int = DEFAULTS["vocab_size"]
    hidden_size: int = DEFAULTS["hidden_size"]
    intermediate_size: int = DEFAULTS["intermediate_size"]
    num_hidden_layers: int = DEFAULTS["num_hidden_layers"]
    max_position_embeddings: int = DEFAULTS["max_position_embeddings"]
    layer_types: list[str] | None = DEFAULTS["layer_types"]
    mlp_layer_types: list[str] | None = DEFAULTS["mlp_layer_types"]
    tie_word_embeddings: bool = DEFAULTS["tie_word_embeddings"]
    attention_type: str = DEFAULTS["attention_type"]
    mlp_type: str = DEFAULTS["mlp_type"]
    norm_type: str = DEFAULTS["norm_type"]
    position_embedding_type: str = DEFAULTS["position_embedding_type"]
    hidden_act: str = DEFAULTS["hidden_act"]
    num_attention_heads: int = DEFAULTS["num_attention_heads"]
    num_key_value_heads: int = DEFAULTS["num_key_value_heads"]
    head_dim: int = DEFAULTS["head_dim"]
    attention_bias: bool = DEFAULTS["attention_bias"]
    qk_norm: bool = DEFAULTS["qk_norm"]
    attention_output_gate: bool = DEFAULTS["attention_output_gate"]
    sliding_window: int | None = DEFAULTS["sliding_window"]
    q_lora_rank: int | None = DEFAULTS["q_lora_rank"]
    kv_lora_rank: int | None = DEFAULTS["kv_lora_rank"]
    qk_nope_head_dim: int | None = DEFAULTS["qk_nope_head_dim"]
    qk_rope_head_dim: int | None = DEFAULTS["qk_rope_head_dim"]
    v_head_dim: int | None = DEFAULTS["v_head_dim"]
    linear_num_key_heads: int | None = DEFAULTS["linear_num_key_heads"]
    linear_num_value_heads: int | None = DEFAULTS["linear_num_value_heads"]
    linear_key_head_dim: int | None = DEFAULTS["linear_key_head_dim"]
    linear_value_head_dim: int | None = DEFAULTS["linear_value_head_dim"]
    linear_conv_kernel_dim: int | None = DEFAULTS["linear_conv_kernel_dim"]
    rope_theta: float = DEFAULTS["rope_theta"]
    rope_scaling: dict | None = DEFAULTS["rope_scaling"]
    partial_rotary_factor: float = DEFAULTS["partial_rotary_factor"]
    num_experts: int | None = DEFAULTS["num_experts"]
    num_experts_per_tok: int | None = DEFAULTS["num_experts_per_tok"]
    moe_intermediate_size: int | None = DEFAULTS["moe_intermediate_size"]
    shared_expert_intermediate_size: int = DEFAULTS["shared_expert_intermediate_size"]
    shared_expert_gate: bool = DEFAULTS["shared_expert_gate"]
    residual_moe: bool = DEFAULTS["residual_moe"]
    router_type: str = DEFAULTS["router_type"]
    router_noise: str = DEFAULTS["router_noise"]
    norm_topk_prob: bool = DEFAULTS["norm_topk_prob"]
    routed_scaling_factor: float = DEFAULTS["routed_scaling_factor"]
    n_group: int = DEFAULTS["n_group"]
    topk_group: int = DEFAULTS["topk_group"]
    router_aux_loss_coef: float = DEFAULTS["router_aux_loss_coef"]
    router_importance_loss_coef: float = DEFAULTS["router_importance_loss_coef"]
    router_z_loss_coef: float = DEFAULTS["router_z_loss_coef"]
    router_sequence_loss_coef: float = DEFAULTS["router_sequence_loss_coef"]
    router_bias_update_speed: float = DEFAULTS["router_bias_update_speed"]
    num_nextn_predict_layers: int = DEFAULTS["num_nextn_predict_layers"]
    mtp_loss_coef: float = DEFAULTS["mtp_loss_coef"]
    mlp_bias: bool = DEFAULTS["mlp_bias"]
    rms_norm_eps: float = DEFAULTS["rms_norm_eps"]
    attention_dropout: float = DEFAULTS["attention_dropout"]
    hidden_dropout: float = DEFAULTS["hidden_dropout"]
    embedding_dropout: float = DEFAULTS["embedding_dropout"]
    initializer_range: float = DEFAULTS["initializer_range"]
    scale_residual_init: bool = DEFAULTS["scale_residual_init"]
    bos_token_id: int | None = DEFAULTS["bos_token_id"]
    eos_token_id: int | list[int] | None = DEFAULTS["eos_token_id"]
    pad_token_id: int | None = DEFAULTS["pad_token_id"]

    def __post_init__(self, **kwargs):
        fields = self.fields()
        if problems := problems_of(fields):
            raise ValueError("; ".join(problems))
        self.layer_types, self.mlp_layer_types = layer_types(fields), mlp_layer_types(fields)
        super().__post_init__(**kwargs)

    def layer_type_of(self, layer_idx: int) -> str:
        """The mixer of a layer. A layer past the last (a multi-token module's) is like the last."""
        return self.layer_types[min(layer_idx, self.num_hidden_layers - 1)]

    def is_sparse(self, layer_idx: int) -> bool:
        """Whether a layer has experts; past the last as above."""
        return self.mlp_layer_types[min(layer_idx, self.num_hidden_layers - 1)] == "sparse"

    def fields(self) -> dict[str, object]:
        """The architecture fields alone: what presets hold, and what minillm.settings.accounting reads."""
        return {name: getattr(self, name) for name in DEFAULTS}
