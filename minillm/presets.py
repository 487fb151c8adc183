"""Named architectures: a preset is data, one dictionary of MiniLLMConfig's own fields, every one spelled out.

Contract: stdlib only (a dry run reads this without importing torch); the keys of every preset are exactly the fields
MiniLLMConfig declares, which a test asserts. `layer_types` and `mlp_layer_types` are None where all layers are of the
default type; the config expands them to full lists. Token ids follow minillm.data.tokenizer: 0 is <|endoftext|>.
"""

from __future__ import annotations

PRESETS: dict[str, dict[str, object]] = {
    # What two CPU cores train in a few minutes: 3.8M parameters, 1.0M of them the tied embedding. The wide
    # initialisation (about 1 / sqrt(hidden_size)) leaves the first plateau sooner than 0.02 at this width.
    "demo": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "layer_types": None,
        "mlp_layer_types": None,
        "attention_type": "gqa",
        "mlp_type": "swiglu",
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "rope_theta": 10_000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.06,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
    # 26M Llama-style: 25,829,888 parameters; trained at 512 tokens, rotary base large enough for 32k.
    "dense-26m": {
        "vocab_size": 6400,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 32_768,
        "layer_types": None,
        "mlp_layer_types": None,
        "attention_type": "gqa",
        "mlp_type": "swiglu",
        "norm_type": "rmsnorm",
        "position_embedding_type": "rope",
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    },
}
