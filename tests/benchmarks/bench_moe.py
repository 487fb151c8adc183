"""Forward + backward of a block of experts against a dense block of the same active parameters, in one run.

    python tests/benchmarks/bench_moe.py [--presets mixtral-mini qwen3-moe-mini] [--batch 4] [--seq-len 512]

Prints one row a (preset, precision): milliseconds of our block, router and balancing terms included, of a dense block
as wide as the experts a token uses, and of transformers' block with the same weights in its default implementation,
without balancing; and the quotients: above 1 ours is faster. The best of several rounds is kept, all in turn.
"""

from __future__ import annotations

from measure import Stopwatch, add_device, parser_of

ROW = "{:<16} {:<6} {:>9} {:>9} {:>13} {:>9} {:>16}"


def main() -> None:
    parser = parser_of(__doc__, batch=4, seq_len=512, rounds=3)
    add_device(parser)
    parser.add_argument("--presets", nargs="+", default=["mixtral-mini", "qwen3-moe-mini"])
    parser.add_argument("--dtypes", nargs="+", choices=["fp32", "bf16"], help="default: fp32, with bf16 on CUDA")
    args = parser.parse_args()
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from minillm.models import MiniLLMConfig
    from minillm.models.mlp import build_dense_mlp
    from minillm.models.moe import SparseMoE
    from minillm.settings.presets import PRESETS

    watch = Stopwatch(args)

    def step(block, x, gradient):
        counted = torch.ones(x.shape[:2], dtype=torch.bool, device=watch.device)

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
        names = "hidden_size moe_intermediate_size num_experts num_experts_per_tok norm_topk_prob".split()
        shape = {name: getattr(config, name) for name in names} | {"num_hidden_layers": 1, "vocab_size": 8}
        block = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape)).model.layers[0].mlp
        block.load_state_dict(ours.state_dict())
        return block

    print(f"{args.batch} x {args.seq_len} tokens, {watch.where}; milliseconds, forward + backward")
    print(ROW.format("preset", "dtype", "ours", "dense", "dense / ours", "theirs", "theirs / ours"))
    for preset in args.presets:
        config = MiniLLMConfig(**PRESETS[preset])
        for name in args.dtypes or (["fp32"] if watch.device.type == "cpu" else ["fp32", "bf16"]):
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
            ours = SparseMoE(config)
            for parameter in ours.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            dense = build_dense_mlp(config, config.num_experts_per_tok * config.moe_intermediate_size)
            x = torch.randn(args.batch, args.seq_len, config.hidden_size, device=watch.device, dtype=dtype)
            gradient = torch.randn_like(x)
            x.requires_grad_()
            blocks = [block for block in (ours, dense, theirs_of(config, ours)) if block is not None]
            found = watch.in_turn([step(b.to(watch.device, dtype), x, gradient) for b in blocks], args.rounds)
            cells = [f"{found[0] * 1e3:.1f}"]
            cells += [cell for other in found[1:] for cell in (f"{other * 1e3:.1f}", f"{other / found[0]:.2f}")]
            print(ROW.format(preset, name, *cells, *["-"] * (5 - len(cells))), flush=True)


if __name__ == "__main__":
    main()
