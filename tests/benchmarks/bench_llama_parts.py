"""Do grouped queries, RMSNorm and SwiGLU save 40 % memory and speed inference 1.3 to 1.6 times, as is claimed?

    python tests/benchmarks/bench_llama_parts.py [--preset dense-26m] [--threads 1] [--device cpu] [--dtype fp32]

Two decoders with the same number of parameters (to 1 %) and the same width and depth: the preset, and one with as many
key/value heads as query heads, LayerNorm and a two-layer GELU MLP whose width makes up the difference. Prints for each,
the rounds taking turns: prefill and greedy decoding tokens/s after a prompt, cache bytes, and what weights and cache
take together.
"""

from __future__ import annotations

import argparse
import time

import torch

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.accounting import cache_bytes, num_parameters
from minillm.settings.presets import PRESETS

ROW = "{:<28} {:>12} {:>14} {:>13} {:>12} {:>13}"


def older_parts(fields: dict) -> dict:
    """Multi-head attention, LayerNorm, GELU MLP; as many parameters as `fields`."""
    older = {
        **fields, "num_key_value_heads": fields["num_attention_heads"], "norm_type": "layernorm", "mlp_type": "mlp",
        "hidden_act": "gelu",
    }  # fmt: skip
    wanted = num_parameters(fields)["total"]
    older["intermediate_size"] = 8
    while num_parameters(older)["total"] < wanted:
        older["intermediate_size"] += 8
    return older


@torch.no_grad()
def measure(model, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prefill, seconds a decoded step."""
    synchronize = torch.cuda.synchronize if prompt.is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    output = model(prompt, use_cache=True, logits_to_keep=1)
    synchronize()
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, cache=output.cache, use_cache=True)
    synchronize()
    return prefilled - start, (time.perf_counter() - prefilled) / new_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="dense-26m")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--prompt", type=int, default=448)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    dtype, size = {"fp32": (torch.float32, 4), "bf16": (torch.bfloat16, 2)}[args.dtype]
    shapes = {"grouped, RMSNorm, SwiGLU": PRESETS[args.preset], "multi-head, LayerNorm, GELU": None}
    shapes["multi-head, LayerNorm, GELU"] = older_parts(PRESETS[args.preset])
    models = {
        name: MiniLLMForCausalLM(MiniLLMConfig(**fields)).to(args.device, dtype).eval()
        for name, fields in shapes.items()
    }
    where = f"{args.dtype}, {args.device}, {args.threads} thread(s)"
    print(f"{args.preset}, prompt {args.prompt}, {args.new_tokens} new, {where}")
    for batch in args.batches:
        print(ROW.format(f"batch {batch}", "parameters", "prefill tok/s", "decode tok/s", "cache MB", "with weights"))
        prompt = torch.randint(1, 1000, (batch, args.prompt), device=args.device)
        best = {name: (float("inf"), float("inf")) for name in models}
        for _ in range(args.rounds):
            for name, model in models.items():
                best[name] = tuple(map(min, best[name], measure(model, prompt, args.new_tokens)))
        for name, fields in shapes.items():
            total = num_parameters(fields)["total"]
            cache = batch * cache_bytes(fields, args.prompt + args.new_tokens, size)
            prefill, decode = batch * args.prompt / best[name][0], batch / best[name][1]
            cells = f"{total:,}", f"{prefill:,.0f}", f"{decode:,.1f}", f"{cache / 1e6:,.1f}"
            print(ROW.format(name, *cells, f"{(cache + total * size) / 1e6:,.1f} MB"), flush=True)


if __name__ == "__main__":
    main()
