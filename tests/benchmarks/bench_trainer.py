"""Training speed against transformers' Trainer, and what the engine and the loop cost over a bare PyTorch step.

    python tests/benchmarks/bench_trainer.py [--steps 12] [--ranks 2] [--preset dense-26m] [--seq-len 512] [--micro 4]

All rows are measured in this one run, bf16, accumulation 1, the first steps left out:
  Trainer + DeepSpeed ZeRO-2   transformers' LlamaForCausalLM of the same shape, random tokens, no document mask
  minillm ZeRO-2               launch/pretrain.py on the built-in corpus: packed documents under a document mask
  bare step, one rank          our model, torch.compile, fused AdamW on bf16 weights, same batches, no engine
  minillm, one rank            launch/pretrain.py on one rank
Speeds are target tokens a second over all ranks; the median step counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, parser_of

from tests.support.launching import environment, metrics, words

SKIP = 3


def main() -> None:
    parser = parser_of(__doc__, steps=12, ranks=2, seq_len=512, micro=4)
    parser.add_argument("--preset", default="dense-26m")
    parser.add_argument("--only", choices=["trainer", "minillm", "bare", "one-rank"], action="append")
    parser.add_argument("--worker", choices=["trainer", "bare"], help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        {"trainer": trainer_worker, "bare": bare_worker}[args.worker](args)
        return
    rows = {
        "trainer": (f"Trainer + ZeRO-2, {args.ranks} ranks", lambda out: measure_worker(args, "trainer", out)),
        "minillm": (f"minillm ZeRO-2, {args.ranks} ranks", lambda out: measure_minillm(args, args.ranks, out)),
        "bare": ("bare compiled step, one rank", lambda out: measure_worker(args, "bare", out)),
        "one-rank": ("minillm ZeRO-2, one rank", lambda out: measure_minillm(args, 1, out)),
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, (label, measure) in rows.items():
            if args.only is None or key in args.only:
                found[key] = measure(Path(folder) / key)
                print(f"{label:40s} {found[key]:10,.0f} tokens/s", flush=True)
    if {"trainer", "minillm"} <= set(found):
        print(f"minillm / Trainer: {found['minillm'] / found['trainer']:.2f}x")
    if {"bare", "one-rank"} <= set(found):
        print(f"engine and loop over the bare step: {found['bare'] / found['one-rank'] - 1:+.1%} time")


def launcher(ranks: int) -> list[str]:
    port = str(29300 + os.getpid() % 500)
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", port]


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


def measure_worker(args: argparse.Namespace, worker: str, out: Path) -> float:
    own = ["--worker", worker, "--out", str(out), "--steps", str(args.steps), "--preset", args.preset]
    own += ["--seq-len", str(args.seq_len), "--micro", str(args.micro)]
    prefix = launcher(args.ranks) if worker == "trainer" else [sys.executable]
    run([*prefix, __file__, *own])
    return json.loads(out.read_text())


def measure_minillm(args: argparse.Namespace, ranks: int, out: Path) -> float:
    settings = {
        "run_root": str(out), "run_name": "bench", "model.preset": args.preset, "train.num_epochs": None,
        "train.max_steps": args.steps, "train.train_batch_size": args.micro * ranks,
        "train.train_micro_batch_size_per_gpu": args.micro, "data.seq_len": args.seq_len, "train.compile": True,
        "validation.max_sequences": 8, "validation.every": 0, "checkpoint.every": 0, "log.every": 1,
        "log.wandb": "disabled",
    }  # fmt: skip
    script = [str(ROOT / "launch" / "pretrain.py"), "--deepspeed", str(ROOT / "ds_configs" / "zero2.json")]
    prefix = launcher(ranks) if ranks > 1 else [sys.executable]
    run([*prefix, *script, "--config", "dense-26m", *words(settings)])
    speeds = [r["tokens_per_s"] for r in metrics(out / "bench") if "tokens_per_s" in r]
    return statistics.median(speeds[SKIP:])


def trainer_worker(args: argparse.Namespace) -> None:
    """One rank of transformers' Trainer."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from minillm.interop.families import require_native_family
    from minillm.models import MiniLLMConfig
    from minillm.settings.presets import PRESETS

    ranks = int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    ours = MiniLLMConfig(**PRESETS[args.preset])
    config = require_native_family(ours).config_to_theirs(ours)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    tokens = torch.randint(0, config.vocab_size, (args.micro * ranks * args.steps, args.seq_len))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    deepspeed = {
        "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(args.out) + ".trainer", max_steps=args.steps, per_device_train_batch_size=args.micro, bf16=True,
        deepspeed=deepspeed, report_to=[], save_strategy="no", use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch", logging_steps=1000, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[Clock()])
    trainer.train()
    if ranks == 1 or os.environ["RANK"] == "0":
        steps = [b - a for a, b in zip(times, times[1:])]
        args.out.write_text(json.dumps(args.micro * ranks * args.seq_len / statistics.median(steps[SKIP - 1 :])))


def bare_worker(args: argparse.Namespace) -> None:
    """Our model without engine and loop: forward, backward, clip, fused AdamW."""
    import torch

    from minillm.data.loader import BatchLoader
    from minillm.data.sequence_stream import build_stream
    from minillm.data.sources import open_sources
    from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
    from minillm.settings.presets import PRESETS

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Path("data/python-docs")
    sources = open_sources(str(data / "shards/train"), tokenizer_path=data / "tokenizer", cache_dir=Path("data/cache"))
    stream = build_stream(sources, seq_len=args.seq_len, packing="concat", seed=42)
    loader = BatchLoader(stream, train_batch_size=args.micro, micro_batch_size=args.micro, rank=0, world_size=1)
    torch.manual_seed(42)
    model = MiniLLMForCausalLM(MiniLLMConfig(**PRESETS[args.preset])).to(device, torch.bfloat16).train()
    step_model = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    speeds = []
    for step in range(args.steps):
        (batch,) = loader.batch_at(step).micro_batches
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        tokens = int((batch["shift_labels"] != -100).sum())
        start = time.perf_counter()
        loss = step_model(**batch, num_items_in_batch=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        speeds.append(tokens / (time.perf_counter() - start))
    loader.close()
    args.out.write_text(json.dumps(statistics.median(speeds[SKIP:])))


if __name__ == "__main__":
    main()
