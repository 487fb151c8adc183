"""Forward + backward of a block of experts against a dense block of the same active parameters, in one run.

    python tests/benchmarks/bench_moe.py [--presets mixtral-mini qwen3-moe-mini] [--batch 4] [--seq-len 512]

Prints one row a (preset, precision): milliseconds of our block, router and balancing terms included, of a dense block
as wide as the experts a token uses, and of transformers' block with the same weights in its default implementation,
without balancing; and the quotients: above 1 ours is faster. The best of several rounds is kept, all in turn.
"""

from __future__ import annotations

import argparse
import time

ROW = "{:<16} {:<6} {:>9} {:>9} {:>13} {:>9} {:>16}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=["mixtral-mini", "qwen3-moe-mini"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="one core a rank, as in training")
    parser.add_argument("--device", default=None, help="default: cuda where there is one")
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: fp32, with bf16 on CUDA")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds, for a busy machine")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    import torch

    from minillm.models import MiniLLMConfig
    from minillm.models.mlp import build_dense_mlp
    from minillm.models.moe import SparseMoE
    from minillm.settings.presets import PRESETS

    torch.set_num_threads(args.threads)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = args.dtypes or (["fp32"] if device.type == "cpu" else ["fp32", "bf16"])

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(call) -> float:
        synchronize()
        clock = time.perf_counter if args.clock == "wall" else time.process_time
        start = clock()
        call()
        synchronize()
        return clock() - start

    def step(block, x, gradient):
        counted = torch.ones(x.shape[:2], dtype=torch.bool, device=device)

        def call():
            if isinstance(block, SparseMoE):
                y, routing = block(x, counted)
                terms = [term.sum() for term in routing.terms.values()]
                torch.autograd.backward([y, *terms], [gradient, *map(torch.ones_like, terms)])
            else:
                block(x).backward(gradient)
            block.zero_grad(set_to_none=True)
            x.grad = None

        return call

    def theirs_of(config, ours):
        """transformers' block with our weights, or None where it has no such block."""
        if config.mlp_type != "swiglu" or config.router_type != "softmax":
            return None
        from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

        shape = {
            "hidden_size": config.hidden_size, "moe_intermediate_size": config.moe_intermediate_size,
            "num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.norm_topk_prob, "num_hidden_layers": 1, "vocab_size": 8,
        }  # fmt: skip
        block = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).model.layers[0].mlp
        block.load_state_dict(ours.state_dict())
        return block.to(device, dtype)

    where = f"{args.threads} thread(s), torch {torch.__version__}, {device}"
    print(f"{args.batch} x {args.seq_len} tokens, {where}; milliseconds, forward + backward")
    print(ROW.format("preset", "dtype", "ours", "dense", "dense / ours", "theirs", "theirs / ours"))
    for preset in args.presets:
        config = MiniLLMConfig(**PRESETS[preset])
        for name in dtypes:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
            torch.manual_seed(0)
            ours = SparseMoE(config)
            for parameter in ours.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            dense = build_dense_mlp(config, config.num_experts_per_tok * config.moe_intermediate_size)
            blocks = [ours.to(device, dtype), dense.to(device, dtype), theirs_of(config, ours)]
            x = torch.randn(args.batch, args.seq_len, config.hidden_size, device=device, dtype=dtype)
            gradient = torch.randn_like(x)
            x.requires_grad_()
            steps = [step(block, x, gradient) for block in blocks if block is not None]
            best = [float("inf")] * len(steps)
            for round_ in range(args.rounds + 1):
                for i, call in enumerate(steps):
                    took = seconds(call)
                    if round_:
                        best[i] = min(best[i], took)
            cells = [f"{best[0] * 1e3:.1f}", f"{best[1] * 1e3:.1f}", f"{best[1] / best[0]:.2f}"]
            cells += [f"{best[2] * 1e3:.1f}", f"{best[2] / best[0]:.2f}"] if len(best) > 2 else ["-", "-"]
            print(ROW.format(preset, name, *cells), flush=True)


if __name__ == "__main__":
    main()
