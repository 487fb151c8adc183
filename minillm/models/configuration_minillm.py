"""The architecture as data: which mechanism each layer has, and its shapes.

Contract: fields bear transformers' names where transformers has one. `rope_theta` stands flat, as in the config files
of published models, and not inside transformers 5's `rope_parameters`, so that a run can set it as `model.rope_theta`;
interop converts. `layer_types` and `mlp_layer_types` are full lists once the config is built. A shape that cannot work
raises ValueError with the field, its value and the rule; all broken rules are named at once.
"""

from __future__ import annotations

from transformers import PretrainedConfig

LAYER_TYPES = ("full_attention",)
MLP_LAYER_TYPES = ("dense",)
_POSITIVE = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rope_theta rms_norm_eps initializer_range"
).split()


class MiniLLMConfig(PretrainedConfig):
    """Configuration of MiniLLMForCausalLM; the defaults are the preset dense-26m.

    Args:
        layer_types: the mixer of each layer, one name a layer; None means full_attention everywhere.
        mlp_layer_types: dense for each layer; None means dense everywhere.
        attention_type, mlp_type, norm_type, position_embedding_type: the class behind each part, see build_* in
            minillm.models.mixers, mlp, normalization and positions.
    """

    model_type = "minillm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 6400
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 32_768
    layer_types: list[str] | None = None
    mlp_layer_types: list[str] | None = None
    attention_type: str = "gqa"
    mlp_type: str = "swiglu"
    norm_type: str = "rmsnorm"
    position_embedding_type: str = "rope"
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = 0

    def __post_init__(self, **kwargs):
        problems = self._shape_problems()
        if not problems:
            self.layer_types = list(self.layer_types or ["full_attention"] * self.num_hidden_layers)
            self.mlp_layer_types = list(self.mlp_layer_types or ["dense"] * self.num_hidden_layers)
            problems = self._layer_problems()
        if problems:
            raise ValueError("; ".join(problems))
        super().__post_init__(**kwargs)

    def _shape_problems(self) -> list[str]:
        problems = []
        for name in _POSITIVE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                problems.append(f"{name} is {value!r}: it must be a number above 0")
        if problems:
            return problems
        if self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_key_value_heads is {self.num_key_value_heads}: it must divide num_attention_heads "
                f"({self.num_attention_heads}), because each key/value head serves an equal group of query heads"
            )
        if self.position_embedding_type == "rope" and self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}: rotary positions turn pairs, so it must be even")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            for token in value if isinstance(value, list) else [value]:
                if token is not None and not 0 <= token < self.vocab_size:
                    problems.append(f"{name} is {token}: it must lie in the vocabulary, 0 to {self.vocab_size - 1}")
        return problems

    def _layer_problems(self) -> list[str]:
        problems = []
        for name, valid in (("layer_types", LAYER_TYPES), ("mlp_layer_types", MLP_LAYER_TYPES)):
            values = getattr(self, name)
            if len(values) != self.num_hidden_layers:
                problems.append(
                    f"{name} names {len(values)} layers: it must name num_hidden_layers ({self.num_hidden_layers})"
                )
            for value in sorted(set(values) - set(valid)):
                problems.append(f"{name} holds {value!r}: valid names are {', '.join(valid)}")
        return problems
