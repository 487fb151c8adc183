"""Tokens/s of one optimizer step through DeepSpeed's engine, by expert backend, against a dense model and stock MoE.

    python tests/benchmarks/bench_expert_parallel.py [--ranks N] [--layers 4] [--hidden 256] [--seq-len 256] [--batch 4]

A step is the trainer's take_step on an engine from its build_engine with the ZeRO settings of
ds_configs/moe_zero2.json and moe_zero3.json; experts are shared out among all ranks. Rows, at 8 experts top-2 and at
64 experts top-6, which have the same active parameters:
  dense              the yardstick: no experts, an MLP as wide as the experts a token uses
  native (stock)     deepspeed.moe.layer.MoE in place of our block: its TopKGate, its list of experts (SwiGLU),
                     drop_tokens off; at top-2 without noise on the second choice, so that both gates choose alike
  native (ours)      moe_backend deepspeed, dropless
  native, cap. 1.25  the same with moe_capacity_factor 1.25
  torch              every expert on every rank
  autoep             moe_backend autoep, dropless, at ZeRO-2 and ZeRO-3
All models of a shape start from the same weights, and the learning rate is 0: each step of each row routes the same
tokens to the same experts, and all rows of a shape without drops must show one loss (in bf16, to rounding). `/ dense`
and `/ stock` are tokens/s over that row's. `fullest` is the fullest expert's load over the mean in the worst layer:
native sends buffers of that size. One engine is built at a time; the whole cycle is repeated, and a row keeps its best
step, so that a slow moment of the machine does not fall on one of them. The table goes to stdout, the engines' own
lines to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

HEAD = 64
VOCABULARY = 1024  # small, so that the layers are what is measured
# Wide, so that untrained routers load their experts about as evenly as trained ones: at 0.02 the fullest of 64 experts
# has five times the mean, and every buffer of native is as long as that.
INITIAL_RANGE = 0.1
SHAPES = {"8 top-2": (8, 2), "64 top-6": (64, 6)}
ACTIVE = 3  # width of the experts a token uses, over the hidden size
ROW = "{:<9} {:<18} {:>4} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>8}"
ON_GPU = ROW + " {:>7}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, help="default: the GPUs of this machine, 2 without; must divide 8")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, help="a multiple of 64; default: 256, on a GPU 1024")
    parser.add_argument("--seq-len", type=int, help="default: 256, on a GPU 1024")
    parser.add_argument("--batch", type=int, help="sequences a rank; default: 4, on a GPU 8")
    parser.add_argument("--rounds", type=int, default=4, help="timed steps of each row in each cycle")
    parser.add_argument("--cycles", type=int, default=2, help="times that every row is built and measured")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 where the machine has it")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="rows whose text has all of these")
    args = parser.parse_args()

    import torch

    args.ranks = args.ranks or torch.cuda.device_count() or 2
    on_gpu = torch.cuda.is_available()
    for name, on_cpu_value, on_gpu_value in (("hidden", 256, 1024), ("seq_len", 256, 1024), ("batch", 4, 8)):
        if getattr(args, name) is None:
            setattr(args, name, on_gpu_value if on_gpu else on_cpu_value)
    if args.hidden % HEAD:
        parser.error(f"--hidden {args.hidden}: must be a multiple of {HEAD}")
    if 8 % args.ranks:
        parser.error(f"--ranks {args.ranks}: must divide 8, the fewest experts of a row")
    return args


@dataclass(frozen=True)
class Row:
    """One line of the table; `backend` is moe_backend, or `dense` or `stock`."""

    shape: str
    label: str
    backend: str
    stage: int = 2
    capacity: float | None = None

    def __str__(self) -> str:
        return f"{self.shape} {self.label} ZeRO-{self.stage}"


def rows() -> list[Row]:
    """What ratios divide by comes first."""
    found = [Row("-", "dense", "dense")]
    for shape in SHAPES:
        found += [
            Row(shape, "native (stock)", "stock"),
            Row(shape, "native (ours)", "deepspeed"),
            Row(shape, "native, cap. 1.25", "deepspeed", capacity=1.25),
            Row(shape, "torch", "torch"),
            Row(shape, "autoep", "autoep"),
            Row(shape, "autoep", "autoep", stage=3),
        ]
    return found


@dataclass
class Measured:
    """Best seconds of a step so far, and what a step found; memory in bytes, the fullest rank's, 0 on a CPU."""

    seconds: float
    loss: float
    fullest: float
    dropped: float
    memory: float


def main() -> int:
    args = parse_arguments()
    if "RANK" not in os.environ:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.ranks}"]
        # What process_group sets anyway; torch.distributed.run warns where it is not given.
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // args.ranks))}
        return subprocess.call([sys.executable, *launcher, __file__, *sys.argv[1:]], env={**threads, **os.environ})
    from minillm.training.engine import process_group

    with process_group():
        return compare(args)


def compare(args: argparse.Namespace) -> int:
    """Measure every row in each cycle; rank 0 prints. The exit code."""
    import torch

    from minillm.models.linear import CPU_MULTIPLIES_BF16

    precision = args.precision or ("bf16" if torch.cuda.is_available() or CPU_MULTIPLIES_BF16 else "fp32")
    form = ON_GPU if torch.cuda.is_available() else ROW
    speak = print if int(os.environ["RANK"]) == 0 else lambda *_, **__: None
    for line in header(args, precision):
        speak(line)
    names = ("experts", "row", "ZeRO", "ms/step", "tokens/s", "/ dense", "/ stock", "loss", "fullest", "dropped")
    speak(form.format(*names, "GB/rank"), flush=True)
    chosen = [row for row in rows() if all(word in str(row) for word in args.only)]
    best: dict[Row, Measured] = {}
    for cycle in range(args.cycles):
        for row in chosen:
            with contextlib.redirect_stdout(sys.stderr):
                found = measure(row, args, precision)
            if row in best:
                found.seconds = min(found.seconds, best[row].seconds)
            best[row] = found
            if cycle == args.cycles - 1:
                speak(form.format(*cells(row, best, args)), flush=True)
    for shape in SHAPES if torch.cuda.is_available() else ():
        native, autoep = best.get(Row(shape, "native (ours)", "deepspeed")), best.get(Row(shape, "autoep", "autoep"))
        if native and autoep:
            speak(f"{shape}: autoep / native {native.seconds / autoep.seconds:.2f}x")
    return 0 if chosen else 1


def header(args: argparse.Namespace, precision: str) -> list[str]:
    import deepspeed
    import torch

    if torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), None)
        machine = f"{model or platform.processor()}, {torch.get_num_threads()} thread(s) a rank"
    widths = ", ".join(f"{name} of width {ACTIVE * args.hidden // top_k}" for name, (_, top_k) in SHAPES.items())
    return [
        f"{machine}; {args.ranks} rank(s); {precision}; torch {torch.__version__}, deepspeed {deepspeed.__version__}",
        f"{args.layers} layers, hidden {args.hidden}, vocabulary {VOCABULARY}; experts: {widths}; dense width "
        f"{ACTIVE * args.hidden}",
        f"{args.batch} x {args.seq_len} tokens a rank, best of {args.cycles} x {args.rounds} steps",
        f"python tests/benchmarks/bench_expert_parallel.py {' '.join(sys.argv[1:])}",
    ]


def cells(row: Row, best: dict[Row, Measured], args: argparse.Namespace) -> list[str]:
    own = best[row]

    def against(other: Row) -> str:
        return f"{best[other].seconds / own.seconds:.2f}" if other in best else "-"

    sparse = row.backend != "dense"
    return [
        row.shape, row.label, str(row.stage), f"{own.seconds * 1e3:.1f}",
        f"{args.ranks * args.batch * args.seq_len / own.seconds:,.0f}",
        against(Row("-", "dense", "dense")), against(Row(row.shape, "native (stock)", "stock")), f"{own.loss:.4f}",
        f"{own.fullest:.2f}" if sparse else "-", f"{own.dropped:.1%}" if sparse else "-", f"{own.memory / 2**30:.2f}",
    ]  # fmt: skip


def measure(row: Row, args: argparse.Namespace, precision: str) -> Measured:
    """Build the engine, warm it up, time `--rounds` steps, take it down. Every rank calls this."""
    import torch

    from minillm.training.engine import build_engine
    from minillm.training.step import move_to_device, take_step
    from minillm.utils import distributed

    run, values = configuration(row, args, precision)
    engine = build_engine(build_model(row, args), run, values)
    on_gpu = engine.device.type == "cuda"
    generator = torch.Generator().manual_seed(distributed.rank())
    tokens = torch.randint(0, VOCABULARY, (args.batch, args.seq_len + 1), generator=generator)
    batch = move_to_device({"input_ids": tokens[:, :-1], "shift_labels": tokens[:, 1:]}, engine.device)
    num_targets = args.ranks * args.batch * args.seq_len
    best, memory = float("inf"), 0.0
    for number in range(-2, args.rounds):  # two steps to warm up: the first also makes the optimizer's state
        if on_gpu and number == 0:
            torch.cuda.reset_peak_memory_stats()
        synchronize(on_gpu)
        start = time.perf_counter()
        result = take_step(engine, [batch], num_targets, learning_rate=0.0)
        synchronize(on_gpu)
        if number >= 0:
            best = min(best, time.perf_counter() - start)
    if on_gpu:
        memory = float(torch.cuda.max_memory_allocated())
    best, memory = distributed.reduce_max([best, memory])
    engine.destroy()
    del engine
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    if result.routing is None:
        return Measured(best, result.loss, 0.0, 0.0, memory)
    counts = result.routing["counts"]
    fullest = float((counts.amax(-1) / counts.mean(-1)).max())
    return Measured(best, result.loss, fullest, float(result.routing["dropped"].sum() / counts.sum()), memory)


def synchronize(on_gpu: bool) -> None:
    """Wait for the device and for the other ranks: a step begins and ends for all of them together."""
    import torch

    from minillm.utils import distributed

    if on_gpu:
        torch.cuda.synchronize()
    distributed.barrier()


def model_fields(row: Row, args: argparse.Namespace) -> dict[str, object]:
    heads = args.hidden // HEAD
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": args.hidden, "intermediate_size": ACTIVE * args.hidden,
        "num_hidden_layers": args.layers, "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": HEAD,
        "max_position_embeddings": args.seq_len, "initializer_range": INITIAL_RANGE,
    }  # fmt: skip
    if row.backend == "dense":
        return fields
    experts, top_k = SHAPES[row.shape]
    return {
        **fields, "mlp_layer_types": ["sparse"] * args.layers, "num_experts": experts, "num_experts_per_tok": top_k,
        "moe_intermediate_size": ACTIVE * args.hidden // top_k, "router_aux_loss_coef": 0.01,
    }  # fmt: skip


def configuration(row: Row, args: argparse.Namespace, precision: str):
    """The trainer's configuration of a row, and DeepSpeed's: the shipped JSON, in the precision that was asked for."""
    from minillm.settings.architecture import Architecture
    from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
    from minillm.settings.moe_backends import resolve_moe_backend
    from minillm.settings.run import RunConfig, raise_problems

    shared_out = row.backend in ("deepspeed", "autoep")
    run = RunConfig.model_validate({
        "model": {
            "moe_backend": row.backend if shared_out else "torch", "moe_capacity_factor": row.capacity,
            "expert_parallel_size": args.ranks if shared_out else 1,
        },
        "train": {
            "max_steps": 1, "train_batch_size": args.batch * args.ranks, "train_micro_batch_size_per_gpu": args.batch,
        },
    })  # fmt: skip
    path = ROOT / "ds_configs" / f"moe_zero{row.stage}.json"
    dropped = {"expert_parallel"} if row.backend != "autoep" else set()
    dropped |= {"bf16", "data_types"} if precision == "fp32" else set()
    values = {key: value for key, value in read_deepspeed_json(path).items() if key not in dropped}
    resolved, problems = resolve_deepspeed_config(values, run, args.ranks, str(path))
    fields = Architecture(**model_fields(row, args))
    raise_problems(problems or resolve_moe_backend(run, fields, resolved, args.ranks), str(row))
    return run, resolved


def build_model(row: Row, args: argparse.Namespace):
    """The row's model on this rank, the same weights for every row of a shape."""
    import torch

    from minillm.models import MiniLLMConfig, MiniLLMForCausalLM

    torch.manual_seed(0)
    model = MiniLLMForCausalLM(MiniLLMConfig(**model_fields(row, args)))
    if row.backend == "stock":
        for layer in model.model.layers:
            layer.mlp = stock_block(layer.mlp, model.config, args.ranks)
    return model


def stock_block(ours, config, ranks: int):
    """DeepSpeed's own MoE block with the weights of `ours` (SparseMoE), experts shared out among all ranks.

    Its balancing term goes into the loss in the place of ours, with the same coefficient, and its own count of the
    routes into the statistics.
    """
    import torch
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups
    from torch import nn

    from minillm.models.balancing import Routing
    from minillm.models.mlp import build_dense_mlp
    from minillm.utils import distributed

    class StockMoE(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = MoE(
                config.hidden_size, expert=build_dense_mlp(config, config.moe_intermediate_size),
                num_experts=config.num_experts, ep_size=ranks, k=config.num_experts_per_tok, drop_tokens=False,
                top2_2nd_expert_sampling=False,
            )  # fmt: skip

        def forward(self, x: torch.Tensor, counted: torch.Tensor):
            y, term, counts = self.moe(x)
            zero = counts.new_zeros((), dtype=torch.float32)
            return y, Routing(counts.float(), zero, zero, zero, {"load_balancing": term.expand(x.shape[0])})

    if f"ep_size_{ranks}" not in groups._get_expert_parallel_group_dict():  # else DeepSpeed prints a line a layer
        groups._create_expert_and_data_parallel(ranks)
    block = StockMoE()
    experts = block.moe.deepspeed_moe.experts.deepspeed_experts
    first = distributed.rank() * len(experts)
    with torch.no_grad():
        block.moe.deepspeed_moe.gate.wg.weight.copy_(ours.gate.weight)
        for number, expert in enumerate(experts, first):
            gate, up = ours.experts.gate_up_proj[number].chunk(2)
            expert.gate_proj.weight.copy_(gate)
            expert.up_proj.weight.copy_(up)
            expert.down_proj.weight.copy_(ours.experts.down_proj[number])
    return block


if __name__ == "__main__":
    sys.exit(main())
