"""Forward + backward of every mixer and norm against transformers' class of the same family with the same weights.

    python tests/benchmarks/bench_mixers.py [--threads 1] [--batch 4] [--seq-len 512] [--device cpu] [--clock cpu]

Shapes are the presets' own; transformers runs its default attention (sdpa). fp32 on the CPU, bf16 on CUDA. Prints one
row each: milliseconds of both (the median of several rounds, ours and theirs in turn), how many times as fast ours is,
and the largest difference of the outputs relative to the largest output.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from minillm.models import MiniLLMConfig
from minillm.models.attention import GroupedQueryAttention
from minillm.models.mixers import build_masks
from minillm.models.normalization import build_norm
from minillm.models.positions import build_positions
from minillm.settings.presets import PRESETS, preset

ROW = "{:<28} {:>10} {:>14} {:>8} {:>12}"
Run = Callable[[torch.Tensor], torch.Tensor]


class Pair(NamedTuple):
    """Two modules with the same weights, and how each is called on [B, T, D]."""

    ours: nn.Module
    theirs: nn.Module
    run_ours: Run
    run_theirs: Run


class Place(NamedTuple):
    """Where and on what shape a row runs."""

    batch: int
    length: int
    device: torch.device
    dtype: torch.dtype

    def put(self, module: nn.Module) -> nn.Module:
        return module.to(self.device, self.dtype)


SHARED = (
    "hidden_size num_attention_heads num_key_value_heads head_dim max_position_embeddings rms_norm_eps vocab_size "
    "attention_bias q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim linear_num_key_heads "
    "linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim sliding_window"
).split()


def theirs_config(ours: MiniLLMConfig, kind: type, **changes):
    """transformers' config of the same shape; the fields that ours leaves null keep their defaults."""
    fields = {name: getattr(ours, name) for name in SHARED if getattr(ours, name) is not None} | changes
    rope = {"rope_type": "default", "rope_theta": ours.rope_theta, "partial_rotary_factor": ours.partial_rotary_factor}
    config = kind(**fields, num_hidden_layers=ours.num_hidden_layers, rope_parameters=rope, pad_token_id=None)
    config._attn_implementation = "sdpa"
    return config


def rotary_pair(place: Place, preset: str, mixer: type, theirs: type, rotary: type, kind: type, **changes) -> Pair:
    """A rotary mixer of the preset's last layer, which is the one with attention where layers differ."""
    config = MiniLLMConfig(**PRESETS[preset])
    layer = config.num_hidden_layers - 1
    other = theirs_config(config, kind, **changes)
    a, b = place.put(mixer(config, layer)), place.put(theirs(other, layer))
    a.load_state_dict(b.state_dict())
    position_ids = torch.arange(place.length, device=place.device)[None].expand(place.batch, -1)
    x = torch.zeros(place.batch, place.length, config.hidden_size, device=place.device, dtype=place.dtype)
    _, rotation = build_positions(config)(x, position_ids)
    angles = rotary(other).to(place.device)(x, position_ids)
    mask = build_masks(config, place.length, place.device)[config.layer_types[layer]]
    window = None
    if config.layer_types[layer] == "sliding_attention":
        window = torch.ones(place.length, place.length, dtype=torch.bool, device=place.device).tril()
        window = window.triu(1 - config.sliding_window)[None, None]
    return Pair(a, b, lambda x: a(x, rotation, mask), lambda x: b(x, angles, window)[0])


def llama(place: Place) -> Pair:
    from transformers.models.llama import modeling_llama as m

    return rotary_pair(
        place, "llama3-mini", GroupedQueryAttention, m.LlamaAttention, m.LlamaRotaryEmbedding, m.LlamaConfig
    )


def qwen3(place: Place) -> Pair:
    from transformers.models.qwen3 import modeling_qwen3 as m

    return rotary_pair(
        place, "qwen3-mini", GroupedQueryAttention, m.Qwen3Attention, m.Qwen3RotaryEmbedding, m.Qwen3Config
    )


def mistral(place: Place) -> Pair:
    from transformers.models.mistral import modeling_mistral as m

    return rotary_pair(
        place, "mistral-mini", GroupedQueryAttention, m.MistralAttention, m.MistralRotaryEmbedding, m.MistralConfig
    )


def qwen3_next(place: Place) -> Pair:
    from transformers.models.qwen3_next import modeling_qwen3_next as m

    return rotary_pair(
        place, "qwen3-next-mini", GroupedQueryAttention, m.Qwen3NextAttention, m.Qwen3NextRotaryEmbedding,
        m.Qwen3NextConfig, layer_types=PRESETS["qwen3-next-mini"]["layer_types"],
    )  # fmt: skip


def deepseek(place: Place) -> Pair:
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as m

    from minillm.models.latent_attention import LatentAttention

    # Half-split rotary positions on both sides, so that the weights are the same as they are.
    return rotary_pair(
        place, "deepseek-v3-mini", LatentAttention, m.DeepseekV3Attention, m.DeepseekV3RotaryEmbedding,
        m.DeepseekV3Config, rope_interleave=False, head_dim=PRESETS["deepseek-v3-mini"]["qk_rope_head_dim"],
    )  # fmt: skip


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
    return Pair(a, b, a, b)


def gpt2(place: Place) -> Pair:
    from transformers.models.gpt2 import modeling_gpt2 as m

    config = MiniLLMConfig(**preset("gpt2-124m", attention_dropout=0.0))
    other = m.GPT2Config(attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="sdpa")
    a, b = place.put(GroupedQueryAttention(config, 0)), place.put(m.GPT2Attention(other, layer_idx=0))
    parts = zip(b.c_attn.weight.split(config.hidden_size, 1), b.c_attn.bias.split(config.hidden_size))
    for name, (weight, bias) in zip(("q_proj", "k_proj", "v_proj"), parts):
        getattr(a, name).load_state_dict({"weight": weight.T, "bias": bias})
    a.o_proj.load_state_dict({"weight": b.c_proj.weight.T, "bias": b.c_proj.bias})
    return Pair(a, b, a, lambda x: b(x)[0])


def norm(place: Place, preset: str, make_theirs: Callable[[int, float], nn.Module]) -> Pair:
    config = MiniLLMConfig(**PRESETS[preset])
    a, b = place.put(build_norm(config)), place.put(make_theirs(config.hidden_size, config.rms_norm_eps))
    a.load_state_dict(b.state_dict())
    return Pair(a, b, a, b)


def rms_norm(place: Place) -> Pair:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return norm(place, "llama3-mini", LlamaRMSNorm)


def zero_centred(place: Place) -> Pair:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

    return norm(place, "qwen3-next-mini", Qwen3NextRMSNorm)


def layer_norm(place: Place) -> Pair:
    return norm(place, "gpt2-124m", lambda size, eps: nn.LayerNorm(size, eps=eps))


ROWS: dict[str, Callable[[Place], Pair]] = {
    "Llama GQA": llama,
    "Qwen3, qk-norm": qwen3,
    "Mistral, window 256": mistral,
    "Qwen3-Next gated attention": qwen3_next,
    "GPT-2 attention": gpt2,
    "DeepSeek-V3 MLA": deepseek,
    "Qwen3-Next gated DeltaNet": deltanet,
    "RMSNorm": rms_norm,
    "zero-centred RMSNorm": zero_centred,
    "LayerNorm": layer_norm,
}


def measure(pair: Pair, place: Place, rounds: int, clock: Callable[[], float]) -> tuple[float, float, float]:
    """Median milliseconds of ours and theirs, and the largest relative difference of the outputs."""
    width = PRESETS["llama3-mini"]["hidden_size"]
    x = torch.randn(place.batch, place.length, width, device=place.device, dtype=place.dtype)
    weights = torch.randn_like(x)

    def step(module: nn.Module, run: Run) -> tuple[float, torch.Tensor]:
        given = x.clone().requires_grad_()
        synchronize(place.device)
        start = clock()
        output = run(given)
        output.backward(weights)
        synchronize(place.device)
        elapsed = clock() - start
        module.zero_grad(set_to_none=True)
        return elapsed * 1e3, output.detach()

    sides = ((pair.ours, pair.run_ours), (pair.theirs, pair.run_theirs))
    (_, a), (_, b) = (step(*side) for side in sides)  # a warm-up, and what they say
    times = [[step(*side)[0] for side in sides] for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*times))
    return ours, theirs, ((a - b).abs().max() / b.abs().max()).item()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="one core a rank, as in training")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds, for a busy machine")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    clock = time.perf_counter if args.clock == "wall" else lambda: time.process_time() / args.threads
    place = Place(args.batch, args.seq_len, device, dtype)
    where = device.type if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{args.batch} x {args.seq_len}, {dtype}, {args.threads} thread(s), torch {torch.__version__}, {where}")
    print(ROW.format("forward + backward", "ours ms", "transformers", "ratio", "difference"))
    for name in args.rows:
        ours, theirs, difference = measure(ROWS[name](place), place, args.rounds, clock)
        print(ROW.format(name, f"{ours:.1f}", f"{theirs:.1f}", f"{theirs / ours:.2f}", f"{difference:.1e}"), flush=True)


if __name__ == "__main__":
    main()
