"""Forward + backward of our decoder against transformers' LlamaForCausalLM of the same shape, in one run.

    python tests/benchmarks/bench_model.py [--threads 1] [--batch 4] [--seq-len 512] [--device cpu] [--clock cpu]

Prints one row a (precision, mode): tokens/s of both, the quotient, and MFU of ours over the fp32 or bf16 matrix-product
rate measured first. `packed` rows give our decoder document ids and restarting positions, which Llama's row has not.
Both models train (loss, backward) without an optimizer; the best of several rounds is kept, ours and theirs in turn.
"""

from __future__ import annotations

from measure import Stopwatch, add_device, parser_of

ROW = "{:<6} {:<9} {:<8} {:>14} {:>12} {:>8} {:>8}"


def main() -> None:
    parser = parser_of(__doc__, batch=4, seq_len=512, rounds=4)
    add_device(parser)
    parser.add_argument("--preset", default="dense-26m")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    args = parser.parse_args()
    import torch

    from minillm.interop import to_transformers
    from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
    from minillm.settings.accounting import flops_per_token
    from minillm.settings.presets import PRESETS

    watch = Stopwatch(args)
    fields, device, shape = PRESETS[args.preset], watch.device, (args.batch, args.seq_len)
    ids = torch.randint(0, fields["vocab_size"], shape, device=device)
    places = torch.arange(args.seq_len, device=device)
    plain = {"input_ids": ids, "shift_labels": ids}
    packed = {**plain, "document_ids": (places // 150).expand(shape), "position_ids": (places % 150).expand(shape)}

    def product_rate(dtype: torch.dtype) -> float:
        a = torch.randn(2048, 2048, device=device, dtype=dtype)
        return 2 * 2048**3 / watch.in_turn([lambda: a @ a], 3, warm_up=0)[0]

    # On a CPU without bf16 products, the rate that bf16 models can reach is that of fp32 products.
    peak = {"fp32": product_rate(torch.float32)}
    peak["bf16"] = max(peak["fp32"] if device.type == "cpu" else 0, product_rate(torch.bfloat16))
    print(f"{args.preset}, {args.batch} x {args.seq_len}, {watch.where}")
    print("matrix product, GFLOP/s: " + ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peak.items()))
    print(ROW.format("dtype", "mode", "inputs", "ours tokens/s", "Llama", "ratio", "MFU"))

    def step(model, inputs):
        def call():
            model(**inputs).loss.backward()
            model.zero_grad(set_to_none=True)

        return call

    for name in args.dtypes:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
        for mode in args.modes:
            torch.manual_seed(0)
            ours = MiniLLMForCausalLM(MiniLLMConfig(**fields)).to(device, dtype).train()
            theirs = to_transformers(ours).train()
            theirs.config.use_cache = False
            torch._dynamo.reset()
            if mode == "compiled":
                ours, theirs = torch.compile(ours), torch.compile(theirs)
            steps = [step(ours, plain), step(ours, packed), step(theirs, {**plain, "labels": ids})]
            *both, llama = watch.in_turn(steps, args.rounds, warm_up=2)
            for inputs, took in zip(("plain", "packed"), both):
                rate, theirs_rate = ids.numel() / took, ids.numel() / llama
                mfu = rate * flops_per_token(fields, args.seq_len) / peak[name]
                cells = (f"{rate:.0f}", f"{theirs_rate:.0f}", f"{rate / theirs_rate:.2f}", f"{mfu:.2f}")
                print(ROW.format(name, mode, inputs, *cells), flush=True)


if __name__ == "__main__":
    main()
