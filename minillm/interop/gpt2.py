"""GPT-2: its linear layers are Conv1D, [in, out] where nn.Linear has [out, in], and q, k and v are one of them."""

from __future__ import annotations

import torch

from minillm.interop.family import SAME_NAMES, Family
from minillm.interop.weights import Rule
from minillm.models.mlp import ACTIVATIONS
from minillm.settings.architecture import Architecture
from minillm.utils.errors import UserError

NAMES = {
    **{ours: theirs for ours, theirs in SAME_NAMES.items() if ours not in ("num_key_value_heads", "head_dim")},
    "intermediate_size": "n_inner",
    "rms_norm_eps": "layer_norm_epsilon",
    "attention_dropout": "attn_pdrop",
    "hidden_dropout": "resid_pdrop",
    "embedding_dropout": "embd_pdrop",
    "hidden_act": "activation_function",
}
FIXED = {
    "attention_type": "gqa",
    "mlp_type": "mlp",
    "norm_type": "layernorm",
    "position_embedding_type": "learned",
    "attention_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
    "attention_output_gate": False,
}
REQUIRED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def _read(config) -> dict[str, object]:
    activation = "gelu_new" if config.activation_function == "gelu_pytorch_tanh" else config.activation_function
    if activation not in ACTIVATIONS:
        raise UserError(
            f"GPT2Config: activation_function is {config.activation_function!r}: only {', '.join(ACTIVATIONS)} can be "
            "converted"
        )
    return {
        "hidden_act": activation,
        "intermediate_size": config.n_inner or 4 * config.hidden_size,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "scale_residual_init": True,
    }


def _problems(arch: Architecture) -> list[str]:
    found = []
    if arch.num_key_value_heads != arch.num_attention_heads:
        found.append(f"num_key_value_heads is {arch.num_key_value_heads}, not {arch.num_attention_heads}")
    if arch.num_attention_heads * arch.head_dim != arch.hidden_size:
        found.append(f"head_dim is {arch.head_dim}, not hidden_size / num_attention_heads")
    return found


def _transpose(config, *weights: torch.Tensor) -> list[torch.Tensor]:
    return [weight.t() for weight in weights]


def _fuse(config, *parts: torch.Tensor) -> list[torch.Tensor]:
    return [torch.cat(parts).t()]  # of a bias, [D], the transpose is itself


def _split(config, fused: torch.Tensor) -> list[torch.Tensor]:
    return list(fused.t().chunk(3))


def _layer(ours: str, theirs: str) -> list[Rule]:
    ours, theirs = f"model.layers.*.{ours}", f"transformer.h.*.{theirs}"
    return [
        Rule.rename(f"{ours}.weight", f"{theirs}.weight", _transpose, _transpose),
        Rule.rename(f"{ours}.bias", f"{theirs}.bias"),
    ]


RULES = (
    Rule.rename("model.embed_tokens.**", "transformer.wte.**"),
    Rule.rename("model.positions.embed_positions.**", "transformer.wpe.**"),
    Rule.rename("model.norm.**", "transformer.ln_f.**"),
    Rule.rename("model.layers.*.input_layernorm.**", "transformer.h.*.ln_1.**"),
    Rule.rename("model.layers.*.post_attention_layernorm.**", "transformer.h.*.ln_2.**"),
    *(
        Rule(
            tuple(f"model.layers.*.mixer.{part}_proj.{kind}" for part in "qkv"),
            (f"transformer.h.*.attn.c_attn.{kind}",),
            _fuse,
            _split,
        )
        for kind in ("weight", "bias")
    ),
    *_layer("mixer.o_proj", "attn.c_proj"),
    *_layer("mlp.up_proj", "mlp.c_fc"),
    *_layer("mlp.down_proj", "mlp.c_proj"),
)
GPT2 = Family(
    "gpt2", "GPT2Config", "GPT2LMHeadModel",
    names=NAMES,
    fixed=FIXED,
    required=REQUIRED,
    read=_read,
    carried=("num_key_value_heads", "head_dim"),
    problems=_problems,
    rules=lambda config: RULES,
)  # fmt: skip
