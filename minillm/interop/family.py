"""What a native family is: the class it belongs to, and how its config and weights are ours under other names.

Contract: a config is converted only where both sides compute the same. What one side has and the other has not is a
UserError with the field and its value. Fields that only training reads (dropout, balancing, multi-token prediction)
may be left out on the way to a native class; `left_out` names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from minillm.interop.weights import Rule
from minillm.models import MiniLLMConfig
from minillm.settings.architecture import DEFAULTS, EXPERT_FIELDS, EXPERT_OPTIONS, Architecture
from minillm.utils.errors import UserError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
DENSE, SPARSE = "dense", "sparse"

SAME_NAMES = {
    name: name
    for name in (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings rms_norm_eps attention_dropout initializer_range tie_word_embeddings bos_token_id "
        "eos_token_id pad_token_id"
    ).split()
}
EXPERT_NAMES = {name: name for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}
# Mechanisms that most families do not have.
PLAIN = {
    "attention_type": "gqa",
    "mlp_type": "swiglu",
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
    "hidden_act": "silu",
    "attention_bias": False,
    "qk_norm": False,
    "attention_output_gate": False,
    "mlp_bias": False,
    "residual_moe": False,
    "partial_rotary_factor": 1.0,
}
SOFTMAX_EXPERTS = {
    "router_type": "softmax",
    "routed_scaling_factor": 1.0,
    "shared_expert_intermediate_size": 0,
    "shared_expert_gate": False,
}
# A trained model does not read these: a native class without a place for them is still the same model.
TRAINING_ONLY = (
    "hidden_dropout embedding_dropout router_noise router_aux_loss_coef router_importance_loss_coef router_z_loss_coef "
    "router_sequence_loss_coef router_bias_update_speed"
).split()
# Nor the weights of multi-token prediction, which no native class has.
MULTI_TOKEN = "model.multi_token_modules."
ATTENTION_RULE = Rule.rename("model.layers.*.mixer.**", "model.layers.*.self_attn.**")


def nothing(values: object) -> dict[str, object]:
    return {}


@dataclass(frozen=True)
class Family:
    """One of transformers' classes and its equal here.

    Attributes:
        model_type: transformers' name, and the key in FAMILIES.
        config_name, model_name: transformers' classes.
        names: our field -> theirs, values as they are.
        fixed: our fields that always have this value in the family.
        fixed_if_sparse: the same, where a layer has experts.
        required: their options that must have this value.
        mixers, mlps: the layer_types and mlp_layer_types it can have.
        read: their config -> the rest of our fields.
        write: our fields -> the rest of theirs.
        problems: further reasons why a config of ours is not of this family.
        carried: our fields that `read` and `write` convert.
        rules: the weights, given the native config.
        multi_token: how the names of weights of multi-token prediction begin in published folders.
    """

    model_type: str
    config_name: str
    model_name: str
    names: Mapping[str, str]
    fixed: Mapping[str, object]
    rules: Callable[[PretrainedConfig], Sequence[Rule]] = lambda config: (ATTENTION_RULE,)
    fixed_if_sparse: Mapping[str, object] = field(default_factory=dict)
    required: Mapping[str, object] = field(default_factory=lambda: {"hidden_act": "silu"})
    mixers: frozenset[str] = frozenset({FULL})
    mlps: frozenset[str] = frozenset({DENSE})
    read: Callable[[PretrainedConfig], dict[str, object]] = nothing
    write: Callable[[Architecture], dict[str, object]] = nothing
    problems: Callable[[Architecture], list[str]] = lambda arch: []
    carried: tuple[str, ...] = ()
    multi_token: Callable[[PretrainedConfig], tuple[str, ...]] = lambda config: ()

    @property
    def config_class(self) -> type[PretrainedConfig]:
        return getattr(transformers, self.config_name)

    @property
    def model_class(self) -> type[PreTrainedModel]:
        return getattr(transformers, self.model_name)

    @property
    def rotates(self) -> bool:
        return self.fixed["position_embedding_type"] == "rope"

    def differences(self, arch: Architecture) -> list[str]:
        """Why the native class does not compute what `arch` say, one clause a reason; empty where it does."""
        sparse = SPARSE in arch.mlp_layer_types
        fixed = {**self.fixed, **(self.fixed_if_sparse if sparse else {})}
        found = [f"{name} is {arch[name]!r}, not {value!r}" for name, value in fixed.items() if arch[name] != value]
        for name, allowed in (("layer_types", self.mixers), ("mlp_layer_types", self.mlps)):
            found += [f"{name} holds {kind}" for kind in dict.fromkeys(arch[name]) if kind not in allowed]
        if not found and self.rotates:
            found += _dynamic_problems(arch)
        return found or self.problems(arch)

    def left_out(self, arch: Architecture) -> list[str]:
        """The fields set in `arch` that only training reads and the native class has no place for."""
        return [name for name in TRAINING_ONLY if name not in self.names and arch[name] != DEFAULTS[name]]

    def config_to_ours(self, config: PretrainedConfig) -> MiniLLMConfig:
        """The same architecture as a MiniLLMConfig; UserError where theirs has an option this decoder has not."""
        what = f"{type(config).__name__}"
        for name, value in {**self.required, "quantization_config": None}.items():
            if getattr(config, name, value) != value:
                raise UserError(f"{what}: {name} is {getattr(config, name)!r}: only {value!r} can be converted")
        fields = {ours: getattr(config, theirs, None) for ours, theirs in self.names.items()}
        fields |= self.fixed
        if self.rotates:
            fields |= _read_rope(config, what)
            partial = fields["partial_rotary_factor"]
            if self.fixed.get("partial_rotary_factor", partial) != partial:
                raise UserError(f"{what}: partial_rotary_factor is {partial}: {self.model_name} rotates whole heads")
        fields |= self.read(config)
        if fields.get("head_dim", 0) is None:
            fields["head_dim"] = config.hidden_size // config.num_attention_heads
        if SPARSE in fields.get("mlp_layer_types", ()):
            fields = {**fields, **self.fixed_if_sparse}
        else:
            fields |= {name: DEFAULTS[name] for name in (*EXPERT_FIELDS, *EXPERT_OPTIONS)}
        if fields["pad_token_id"] == -1:  # how old conversions write that there is none
            fields["pad_token_id"] = None
        try:
            ours = MiniLLMConfig(**fields)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise UserError(f"{what}: {error}") from error
        ours.dtype = config.dtype
        return ours

    def config_to_theirs(self, config: MiniLLMConfig) -> PretrainedConfig:
        """The same architecture as the native config; UserError where ours has a mechanism it has not."""
        arch = config.architecture
        if found := self.differences(arch):
            raise UserError(f"minillm config: {self.model_name} cannot compute it: {'; '.join(found)}")
        values = {
            theirs: arch[ours]
            for ours, theirs in self.names.items()
            if arch[ours] is not None or ours.endswith("token_id")  # of what is not used their default may stay
        }
        if self.rotates:
            values["rope_parameters"] = _write_rope(arch, "partial_rotary_factor" not in self.fixed)
        values |= self.write(arch)
        theirs = self.config_class(**values)
        theirs.dtype = config.dtype
        return theirs


def _read_rope(config: PretrainedConfig, what: str) -> dict[str, object]:
    """Their rope_parameters as our rope_theta, rope_scaling and partial_rotary_factor."""
    rope = {name: value for name, value in config.rope_parameters.items() if value is not None and name != "type"}
    if "rope_theta" not in rope:
        raise UserError(f"{what}: rope_parameters is {rope}: only one set for all layers can be converted")
    theta, partial = float(rope.pop("rope_theta")), float(rope.pop("partial_rotary_factor", 1.0))
    if rope.get("rope_type", "default") == "default":
        return {"rope_theta": theta, "rope_scaling": None, "partial_rotary_factor": partial}
    for name in ("mscale", "mscale_all_dim"):
        if rope.get(name) == 0:  # as good as absent in transformers, too
            del rope[name]
    if rope["rope_type"] == "yarn" and "factor" not in rope:
        rope["factor"] = config.max_position_embeddings / rope["original_max_position_embeddings"]
    if rope["rope_type"] == "dynamic":
        # transformers stretches from max_position_embeddings, whatever stands here.
        rope.pop("original_max_position_embeddings", None)
    return {"rope_theta": theta, "rope_scaling": rope, "partial_rotary_factor": partial}


def _write_rope(arch: Architecture, partial: bool) -> dict[str, object]:
    rope = {"rope_type": "default", "rope_theta": arch.rope_theta, **(arch.rope_scaling or {})}
    if rope["rope_type"] == "dynamic":
        rope.pop("original_max_position_embeddings", None)
    if partial:
        rope["partial_rotary_factor"] = arch.partial_rotary_factor
    return rope


def _dynamic_problems(arch: Architecture) -> list[str]:
    scaling = arch.rope_scaling or {}
    original = scaling.get("original_max_position_embeddings")
    if scaling.get("rope_type") == "dynamic" and original not in (None, arch.max_position_embeddings):
        return [
            f"rope_scaling: dynamic stretches from original_max_position_embeddings {original}, and in transformers "
            f"from max_position_embeddings ({arch.max_position_embeddings})"
        ]
    return []


def read_window(config: PretrainedConfig) -> dict[str, object]:
    """A window that all layers share, or none (Mistral, Mixtral, Qwen3-MoE)."""
    kind = FULL if config.sliding_window is None else SLIDING
    stated = getattr(config, "layer_types", None)
    if stated is not None and set(stated) != {kind}:
        raise UserError(
            f"{type(config).__name__}: layer_types is {stated}: this class gives all layers the same window "
            f"(sliding_window {config.sliding_window})"
        )
    return {"sliding_window": config.sliding_window, "layer_types": [kind] * config.num_hidden_layers}


def same_mixer_everywhere(arch: Architecture) -> list[str]:
    if len(set(arch.layer_types)) > 1:
        return ["layer_types has layers with and without a window; it must have one kind"]
    return []


def read_sparse_layers(config: PretrainedConfig) -> dict[str, object]:
    """mlp_only_layers and decoder_sparse_step (Qwen's) as a list of layers."""
    if not config.num_experts:
        return {"mlp_layer_types": [DENSE] * config.num_hidden_layers}
    return {
        "mlp_layer_types": [
            SPARSE if i not in config.mlp_only_layers and (i + 1) % config.decoder_sparse_step == 0 else DENSE
            for i in range(config.num_hidden_layers)
        ]
    }


def write_sparse_layers(arch: Architecture) -> dict[str, object]:
    dense = [i for i, kind in enumerate(arch.mlp_layer_types) if kind == DENSE]
    return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
