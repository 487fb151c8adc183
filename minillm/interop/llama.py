"""Weights and configs to and from transformers' own LlamaForCausalLM, in memory and from a folder.

Contract: strict both ways. A Llama option this decoder does not have, a missing, extra or misshapen weight is a
UserError that names it; nothing is dropped, and nothing is left at its random initialisation. What comes back computes
the same logits in the same dtype.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.utils.errors import UserError

# (ours, Llama's) name of a layer's mixer; every other name is the same in both.
MIXER_NAMES = ("mixer", "self_attn")
SHARED_FIELDS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "max_position_embeddings rms_norm_eps initializer_range tie_word_embeddings bos_token_id eos_token_id pad_token_id"
).split()
# What a Llama config must say for this decoder to compute the same.
REQUIRED_OF_LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0}
# What our config must say for Llama to compute the same.
REQUIRED_OF_OURS = {
    "attention_type": "gqa",
    "mlp_type": "swiglu",
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
}


def config_from_llama(config: LlamaConfig) -> MiniLLMConfig:
    """The same architecture as a MiniLLMConfig; UserError where Llama has an option this decoder does not."""
    _require(config, REQUIRED_OF_LLAMA, "Llama config")
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"Llama config: rope_parameters is {rope}: only plain rotary positions can be converted")
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    return _keep_dtype(config, MiniLLMConfig(**fields, rope_theta=float(rope["rope_theta"])))


def config_to_llama(config: MiniLLMConfig) -> LlamaConfig:
    """The same architecture as a LlamaConfig; UserError where this config has a mechanism Llama does not."""
    _require(config, REQUIRED_OF_OURS, "minillm config")
    for name, only in (("layer_types", "full_attention"), ("mlp_layer_types", "dense")):
        if set(getattr(config, name)) != {only}:
            raise UserError(f"minillm config: {name} is {getattr(config, name)}: Llama has only {only}")
    fields = {name: getattr(config, name) for name in SHARED_FIELDS}
    rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    return _keep_dtype(config, LlamaConfig(**fields, rope_parameters=rope_parameters))


def from_transformers(source: LlamaForCausalLM | str | Path) -> MiniLLMForCausalLM:
    """Build our model from a LlamaForCausalLM or from a folder that `save_pretrained` of one wrote.

    Weights are copied, in their own dtype; the model is in eval mode as after `from_pretrained`.
    """
    if isinstance(source, (str, Path)):
        folder = Path(source)
        config = _read_llama_config(folder)
        weights, place = _read_weights(folder), str(folder)
    else:
        config, place = source.config, type(source).__name__
        if getattr(config, "model_type", None) != "llama":
            raise UserError(f"{place} is no Llama model: only LlamaForCausalLM can be converted")
        weights = source.state_dict()
    ours = _rename(weights, MIXER_NAMES[1], MIXER_NAMES[0])
    return _fill(MiniLLMForCausalLM, config_from_llama(config), ours, place)


def to_transformers(model: MiniLLMForCausalLM) -> LlamaForCausalLM:
    """Build transformers' LlamaForCausalLM with a copy of our model's weights, in eval mode."""
    theirs = _rename(model.state_dict(), *MIXER_NAMES)
    converted = _fill(LlamaForCausalLM, config_to_llama(model.config), theirs, type(model).__name__)
    converted.generation_config = model.generation_config
    return converted


def _require(config: object, required: dict[str, object], what: str) -> None:
    for name, value in required.items():
        if getattr(config, name) != value:
            raise UserError(f"{what}: {name} is {getattr(config, name)!r}: only {value!r} can be converted")


def _keep_dtype(source, target):
    target.dtype = source.dtype
    return target


def _rename(weights: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    pattern = re.compile(rf"^(model\.layers\.\d+\.){old}\.")
    return {pattern.sub(rf"\1{new}.", name): value for name, value in weights.items()}


def _fill(model_class: type, config, weights: dict[str, torch.Tensor], place: str):
    """A model of `config` that holds exactly `weights`; a tied output matrix may be absent, as in saved folders."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in model_class(config).state_dict().items()}
    if config.tie_word_embeddings:
        weights = {"lm_head.weight": weights.get("model.embed_tokens.weight"), **weights}
        if weights["lm_head.weight"] is None:
            del weights["lm_head.weight"]
    problems = [f"missing {name}" for name in sorted(expected.keys() - weights.keys())]
    problems += [f"extra {name}" for name in sorted(weights.keys() - expected.keys())]
    problems += [
        f"{name} has shape {list(weights[name].shape)}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if config.tie_word_embeddings and not problems:
        if not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"]):
            problems.append("lm_head.weight differs from model.embed_tokens.weight though tie_word_embeddings is true")
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(f"{place}: the weights do not fit the config: {shown}")
    model = model_class(config).to(weights["model.embed_tokens.weight"].dtype)
    model.load_state_dict(weights)
    return model.eval()


def _read_llama_config(folder: Path) -> LlamaConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: name a folder that save_pretrained of a Llama model wrote")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    if model_type != "llama":
        raise UserError(f"{path}: model_type is {model_type!r}: only 'llama' can be converted")
    return LlamaConfig.from_pretrained(folder)


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return load_file(single)
    if not index.is_file():
        raise UserError(f"{folder} holds neither {single.name} nor {index.name}: save the model as safetensors")
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder}: {index.name} names files that are missing: {', '.join(missing)}")
    return {name: value for file in names for name, value in load_file(folder / file).items()}
