"""Forward + backward of every mixer and norm against transformers' class of the same family with the same weights.

    python tests/benchmarks/bench_mixers.py [--threads 1] [--batch 4] [--seq-len 512] [--device cpu] [--clock cpu]

Shapes are the presets' own; transformers runs its default attention (sdpa). fp32 on the CPU, bf16 on CUDA. Prints one
row each: milliseconds of both (the median of several rounds, ours and theirs in turn), how many times as fast ours is,
and the largest difference of the outputs relative to the largest output.
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import Stopwatch, add_device, parser_of
from torch import nn

from minillm.models import MiniLLMConfig
from minillm.models.mixers import build_masks, build_mixer
from minillm.models.normalization import build_norm
from minillm.models.positions import build_positions
from minillm.settings.presets import PRESETS, preset

ROW = "{:<28} {:>10} {:>14} {:>8} {:>12}"
SHARED = (
    "hidden_size num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps vocab_size "
    "attention_bias q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim linear_num_key_heads "
    "linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim sliding_window"
).split()


class Place(NamedTuple):
    """Where and on what shape a row runs."""

    batch: int
    length: int
    device: torch.device
    dtype: torch.dtype

    def put(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype)


# Two modules with the same weights, and how each is called on [B, T, D].
Pair = tuple[nn.Module, nn.Module, Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]


def theirs_config(ours: MiniLLMConfig, kind: type, **changes):
    """transformers' config of the same shape; the fields that ours leaves null keep their defaults."""
    fields = {name: getattr(ours, name) for name in SHARED if getattr(ours, name) is not None} | changes
    rope = {"rope_type": "default", "rope_theta": ours.rope_theta, "partial_rotary_factor": ours.partial_rotary_factor}
    config = kind(**fields, num_hidden_layers=ours.num_hidden_layers, rope_parameters=rope, pad_token_id=None)
    config._attn_implementation = "sdpa"
    return config


def rotary(preset_name: str, module: str, family: str, **changes) -> Callable[[Place], Pair]:
    """A rotary mixer of the preset's last layer, which is the one with attention where layers differ."""

    def build(place: Place) -> Pair:
        m = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        config = MiniLLMConfig(**PRESETS[preset_name])
        layer = config.num_hidden_layers - 1
        other = theirs_config(config, getattr(m, f"{family}Config"), **changes)
        a, b = place.put(build_mixer(config, layer)), place.put(getattr(m, f"{family}Attention")(other, layer))
        a.load_state_dict(b.state_dict())
        positions = torch.arange(place.length, device=place.device)[None].expand(place.batch, -1)
        x = torch.zeros(place.batch, place.length, config.hidden_size, device=place.device, dtype=place.dtype)
        _, rotation = build_positions(config)(x, positions)
        angles = getattr(m, f"{family}RotaryEmbedding")(other).to(place.device)(x, positions)
        mask = build_masks(config, place.length, place.device)[config.layer_types[layer]]
        window = None
        if config.layer_types[layer] == "sliding_attention":
            window = torch.ones(place.length, place.length, dtype=torch.bool, device=place.device).tril()
            window = window.triu(1 - config.sliding_window)[None, None]
        return a, b, lambda x: a(x, rotation, mask), lambda x: b(x, angles, window)[0]

    return build


def deltanet(place: Place) -> Pair:
    from transformers.models.qwen3_next import modeling_qwen3_next as m

    from minillm.models.gated_deltanet import GatedDeltaNet

    config = MiniLLMConfig(**PRESETS["qwen3-next-mini"])
    other = theirs_config(config, m.Qwen3NextConfig, layer_types=config.layer_types)
    a, b = place.put(GatedDeltaNet(config, 0)), place.put(m.Qwen3NextGatedDeltaNet(other, 0))
    keys, group = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
    sizes = [config.linear_key_head_dim] * 2 + [group * config.linear_value_head_dim] * 2
    query, key, value, gate = (
        part.flatten(0, 1) for part in b.in_proj_qkvz.weight.unflatten(0, (keys, -1)).split(sizes, dim=1)
    )
    step, decay = (part.flatten(0, 1) for part in b.in_proj_ba.weight.unflatten(0, (keys, -1)).split(group, dim=1))
    a.load_state_dict(
        {
            "qkv_proj.weight": torch.cat((query, key, value)), "z_proj.weight": gate, "b_proj.weight": step,
            "a_proj.weight": decay, "conv.weight": b.conv1d.weight, "A_log": b.A_log, "dt_bias": b.dt_bias,
            "norm.weight": b.norm.weight, "o_proj.weight": b.out_proj.weight,
        }
    )  # fmt: skip
    return a, b, a, b


def gpt2(place: Place) -> Pair:
    from transformers.models.gpt2 import modeling_gpt2 as m

    config = MiniLLMConfig(**preset("gpt2-124m", attention_dropout=0.0))
    other = m.GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="sdpa")
    a, b = place.put(build_mixer(config, 0)), place.put(m.GPT2Attention(other, layer_idx=0))
    parts = zip(b.c_attn.weight.split(config.hidden_size, 1), b.c_attn.bias.split(config.hidden_size))
    for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), parts):
        getattr(a, name).load_state_dict({"weight": weight.T, "bias": bias})
    a.o_proj.load_state_dict({"weight": b.c_proj.weight.T, "bias": b.c_proj.bias})
    return a, b, a, lambda x: b(x)[0]


def norm(preset_name: str, module: str, name: str) -> Callable[[Place], Pair]:
    def build(place: Place) -> Pair:
        config = MiniLLMConfig(**PRESETS[preset_name])
        theirs = getattr(importlib.import_module(module), name)(config.hidden_size, eps=config.rms_norm_eps)
        a, b = place.put(build_norm(config)), place.put(theirs)
        a.load_state_dict(b.state_dict())
        return a, b, a, b

    return build


QWEN3_NEXT, DEEPSEEK = PRESETS["qwen3-next-mini"], PRESETS["deepseek-v3-mini"]
ROWS: dict[str, Callable[[Place], Pair]] = {
    "Llama GQA": rotary("llama3-mini", "llama", "Llama"),
    "Qwen3, qk-norm": rotary("qwen3-mini", "qwen3", "Qwen3"),
    "Mistral, window 256": rotary("mistral-mini", "mistral", "Mistral"),
    "Qwen3-Next gated attention": rotary(
        "qwen3-next-mini", "qwen3_next", "Qwen3Next", layer_types=list(QWEN3_NEXT["layer_types"])
    ),
    "GPT-2 attention": gpt2,
    # Half-split rotary positions on both sides, so that the weights are the same as they are.
    "DeepSeek-V3 MLA": rotary(
        "deepseek-v3-mini", "deepseek_v3", "DeepseekV3", rope_interleave=False, head_dim=DEEPSEEK["qk_rope_head_dim"]
    ),
    "Qwen3-Next gated DeltaNet": deltanet,
    "RMSNorm": norm("llama3-mini", "transformers.models.llama.modeling_llama", "LlamaRMSNorm"),
    "zero-centred RMSNorm": norm(
        "qwen3-next-mini", "transformers.models.qwen3_next.modeling_qwen3_next", "Qwen3NextRMSNorm"
    ),
    "LayerNorm": norm("gpt2-124m", "torch.nn", "LayerNorm"),
}


def measure(pair: Pair, place: Place, rounds: int, watch: Stopwatch) -> tuple[float, float, float]:
    """Median milliseconds of ours and theirs, and the largest relative difference of the outputs."""
    ours, theirs, run_ours, run_theirs = pair
    width = PRESETS["llama3-mini"]["hidden_size"]
    x = torch.randn(place.batch, place.length, width, device=place.device, dtype=place.dtype)
    weights = torch.randn_like(x)

    def step(module: nn.Module, run: Callable) -> Callable[[], None]:
        def call() -> None:
            run(x.clone().requires_grad_()).backward(weights)
            module.zero_grad(set_to_none=True)

        return call

    with torch.no_grad():
        a, b = run_ours(x), run_theirs(x)
    times = watch.in_turn([step(ours, run_ours), step(theirs, run_theirs)], rounds, keep=statistics.median)
    return times[0] * 1e3, times[1] * 1e3, ((a - b).abs().max() / b.abs().max()).item()


def main() -> None:
    parser = parser_of(__doc__, batch=4, seq_len=512, rounds=5)
    add_device(parser)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    args = parser.parse_args()
    watch = Stopwatch(args)
    dtype = torch.float32 if watch.device.type == "cpu" else torch.bfloat16
    place = Place(args.batch, args.seq_len, watch.device, dtype)
    print(f"{args.batch} x {args.seq_len}, {dtype}, {watch.where}")
    print(ROW.format("forward + backward", "ours ms", "transformers", "ratio", "difference"))
    for name in args.rows:
        ours, theirs, difference = measure(ROWS[name](place), place, args.rounds, watch)
        print(ROW.format(name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}", f"{difference:.1e}"), flush=True)


if __name__ == "__main__":
    main()
