"""Do grouped queries, RMSNorm and SwiGLU save 40 % memory and speed inference 1.3 to 1.6 times, as is claimed?

    python tests/benchmarks/bench_llama_parts.py [--preset dense-26m] [--threads 1] [--device cpu] [--dtype fp32]

Two decoders with the same number of parameters (to 1 %) and the same width and depth: the preset, and one with as many
key/value heads as query heads, LayerNorm and a two-layer GELU MLP whose width makes up the difference. Prints for each,
the rounds taking turns: prefill and greedy decoding tokens/s after a prompt, cache bytes, and what weights and cache
take together.
"""

from __future__ import annotations

import torch
from measure import Stopwatch, add_device, parser_of

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.settings.accounting import cache_bytes, num_parameters
from minillm.settings.architecture import Architecture
from minillm.settings.presets import PRESETS, preset

ROW = "{:<28} {:>12} {:>14} {:>13} {:>12} {:>13}"


def older_parts(name: str) -> Architecture:
    """The preset with multi-head attention, LayerNorm and a GELU MLP that makes the parameters as many."""
    changes = {"num_key_value_heads": PRESETS[name].num_attention_heads, "norm_type": "layernorm", "mlp_type": "mlp",
               "hidden_act": "gelu", "intermediate_size": 8}  # fmt: skip
    wanted = num_parameters(PRESETS[name])["total"]
    while num_parameters(older := preset(name, **changes))["total"] < wanted:
        changes["intermediate_size"] += 8
    return older


@torch.no_grad()
def measure(models: dict, prompt: torch.Tensor, new_tokens: int, rounds: int, watch: Stopwatch) -> dict:
    """Name -> the best seconds of a prefill and of a decoded step; the models take turns."""
    best = {name: (float("inf"), float("inf")) for name in models}
    for _ in range(rounds):
        for name, model in models.items():
            outputs = []

            def prefill(model=model, outputs=outputs) -> None:
                outputs.append(model(prompt, use_cache=True, logits_to_keep=1))

            def decode(model=model, outputs=outputs) -> None:
                for _ in range(new_tokens):
                    last = outputs[-1]
                    outputs[-1] = model(last.logits[:, -1:].argmax(-1), cache=last.cache, use_cache=True)

            times = watch.seconds(prefill), watch.seconds(decode) / new_tokens
            best[name] = tuple(map(min, best[name], times))
    return best


def main() -> None:
    parser = parser_of(__doc__, prompt=448, new_tokens=48, rounds=3)
    add_device(parser)
    parser.add_argument("--preset", default="dense-26m")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    args = parser.parse_args()
    watch = Stopwatch(args)
    dtype, size = {"fp32": (torch.float32, 4), "bf16": (torch.bfloat16, 2)}[args.dtype]
    shapes = {"grouped, RMSNorm, SwiGLU": PRESETS[args.preset],
              "multi-head, LayerNorm, GELU": older_parts(args.preset)}  # fmt: skip
    models = {
        name: MiniLLMForCausalLM(MiniLLMConfig(**shape)).to(watch.device, dtype).eval()
        for name, shape in shapes.items()
    }
    print(f"{args.preset}, prompt {args.prompt}, {args.new_tokens} new, {args.dtype}, {watch.where}")
    for batch in args.batches:
        print(ROW.format(f"batch {batch}", "parameters", "prefill tok/s", "decode tok/s", "cache MB", "with weights"))
        prompt = torch.randint(1, 1000, (batch, args.prompt), device=watch.device)
        for name, (prefill, step) in measure(models, prompt, args.new_tokens, args.rounds, watch).items():
            total = num_parameters(shapes[name])["total"]
            cache = batch * cache_bytes(shapes[name], args.prompt + args.new_tokens, size)
            cells = f"{total:,}", f"{batch * args.prompt / prefill:,.0f}", f"{batch / step:,.1f}", f"{cache / 1e6:,.1f}"
            print(ROW.format(name, *cells, f"{(cache + total * size) / 1e6:,.1f} MB"), flush=True)


if __name__ == "__main__":
    main()
