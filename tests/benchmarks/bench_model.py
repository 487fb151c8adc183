"""Forward + backward of our decoder against transformers' LlamaForCausalLM of the same shape, in one run.

    python tests/benchmarks/bench_model.py [--threads 1] [--batch 4] [--seq-len 512] [--device cpu] [--clock cpu]

Prints one row a (precision, mode): tokens/s of both, the quotient, and MFU of ours over the fp32 or bf16 matrix-product
rate measured first. `packed` rows give our decoder document ids and restarting positions, which Llama's row has not.
Both models train (loss, backward) without an optimizer; the best of several rounds is kept, ours and theirs in turn.
"""

from __future__ import annotations

import argparse
import time

ROW = "{:<6} {:<9} {:<8} {:>14} {:>12} {:>8} {:>8}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="dense-26m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="one core a rank, as in training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds, for a busy machine")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    import torch

    from minillm.interop import to_transformers
    from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
    from minillm.settings.accounting import flops_per_token
    from minillm.settings.presets import PRESETS

    torch.set_num_threads(args.threads)
    fields, device = PRESETS[args.preset], torch.device(args.device)
    shape = (args.batch, args.seq_len)
    ids = torch.randint(0, fields["vocab_size"], shape, device=device)
    document_ids = (torch.arange(args.seq_len, device=device) // 150).expand(shape)
    position_ids = (torch.arange(args.seq_len, device=device) % 150).expand(shape)
    plain = {"input_ids": ids, "shift_labels": ids}
    packed = {**plain, "document_ids": document_ids, "position_ids": position_ids}
    theirs_inputs = {"input_ids": ids, "labels": ids, "shift_labels": ids}

    def clock() -> float:
        return time.perf_counter() if args.clock == "wall" else time.process_time() / args.threads

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(call) -> float:
        synchronize()
        start = clock()
        call()
        synchronize()
        return clock() - start

    def product_rate(dtype: torch.dtype) -> float:
        a = torch.randn(2048, 2048, device=device, dtype=dtype)
        return 2 * 2048**3 / min(seconds(lambda: a @ a) for _ in range(3))

    # On a CPU without bf16 products, the rate that bf16 models can reach is that of fp32 products.
    peak = {"fp32": product_rate(torch.float32)}
    peak["bf16"] = max(peak["fp32"] if device.type == "cpu" else 0, product_rate(torch.bfloat16))
    where = f"{args.threads} thread(s), torch {torch.__version__}, {device}"
    print(f"{args.preset}, {args.batch} x {args.seq_len}, {where}")
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
            steps = [step(ours, plain), step(ours, packed), step(theirs, theirs_inputs)]
            best = [float("inf")] * len(steps)
            for round_ in range(args.rounds + 2):
                for i, call in enumerate(steps):
                    took = seconds(call)
                    if round_ >= 2:
                        best[i] = min(best[i], took)
            for inputs, took in (("plain", best[0]), ("packed", best[1])):
                rate, llama = ids.numel() / took, ids.numel() / best[2]
                mfu = rate * flops_per_token(fields, args.seq_len) / peak[name]
                cells = (f"{rate:.0f}", f"{llama:.0f}", f"{rate / llama:.2f}", f"{mfu:.2f}")
                print(ROW.format(name, mode, inputs, *cells), flush=True)


if __name__ == "__main__":
    main()
