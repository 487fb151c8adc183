"""Optimizer steps of the real engine on one GPU: speed, MFU and peak memory of a model and a way to train it.

    python -m tests.gpu.steps ROW ... [--steps N] [--tiny] [--profile FOLDER]     (--list names the rows)

Contract: the engine is the trainer's own (build_engine, take_step); rows of random tokens, cut into documents of 170
tokens on average as packed text is. A line `RESULT {...}` a row, in the form that `minillm.plan --calibrate` reads;
rows share a process, since importing takes longer than measuring.
Without a GPU it needs --tiny, which is for trying the script.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import json
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minillm.models import MiniLLMConfig, MiniLLMForCausalLM
from minillm.planning.step import Setup, memory
from minillm.settings.accounting import flops_per_token
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
from minillm.settings.presets import preset
from minillm.settings.run import RunConfig
from minillm.training.engine import build_engine, process_group
from minillm.training.metrics import peak_flops
from minillm.training.step import take_step

ROOT = Path(__file__).resolve().parents[2]
WARM = 2  # steps before the clock starts: optimizer state, and graphs of shapes that vary


@dataclass(frozen=True)
class Row:
    """One measurement: a preset with changed fields, a file of ds_configs, micro-batch and accumulation."""

    preset: str
    json_file: str
    micro: int
    micro_steps: int
    compile: bool
    checkpointing: bool = False
    length: int = 512
    fields: dict[str, object] = field(default_factory=dict)


# As many active parameters as moe-876m, with one MLP as wide as its four experts together.
DENSE_OF_MOE = {"mlp_layer_types": None, "num_experts": None, "num_experts_per_tok": None,
                "moe_intermediate_size": None, "intermediate_size": 16384, "router_type": "softmax",
                "router_importance_loss_coef": 0.0, "router_aux_loss_coef": 0.0}  # fmt: skip
ROWS = {
    "dense-26m": Row("dense-26m", "zero1", 32, 2, True),
    "dense-171m": Row("dense-171m", "zero1", 16, 2, True),
    "dense-171m-eager": Row("dense-171m", "zero1", 16, 2, False),
    "dense-171m-micro-64": Row("dense-171m", "zero1", 64, 1, True),
    "dense-171m-checkpointed": Row("dense-171m", "zero1", 64, 1, True, checkpointing=True),
    "dense-171m-heads-of-64": Row("dense-171m", "zero1", 16, 2, True, fields={
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}),
    "moe-876m": Row("moe-876m", "zero1", 8, 4, True),
    "moe-876m-eager": Row("moe-876m", "zero1", 8, 4, False),
    "moe-876m-zero2": Row("moe-876m", "zero2", 8, 4, True),
    "moe-876m-micro-32": Row("moe-876m", "zero1", 32, 1, True),
    "dense-of-moe-876m": Row("moe-876m", "zero1", 32, 1, True, fields=DENSE_OF_MOE),
    "qwen3-next-mini": Row("qwen3-next-mini", "zero1", 16, 1, False),
    "qwen3-next-mini-compiled": Row("qwen3-next-mini", "zero1", 16, 1, True),
    "deepseek-v3-mini": Row("deepseek-v3-mini", "zero1", 16, 1, True),
}  # fmt: skip


def batches(arch: Architecture, row: Row, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """`micro_steps` times the same packed rows."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, arch.vocab_size, (row.micro, row.length), generator=generator)
    documents = (torch.rand(ids.shape, generator=generator) < 1 / 170).long().cumsum(1)
    begins = torch.cat((torch.ones(row.micro, 1, dtype=torch.bool), documents[:, 1:] != documents[:, :-1]), 1)
    place = torch.arange(row.length).expand(row.micro, -1)
    positions = place - torch.where(begins, place, 0).cummax(1).values
    one = {"input_ids": ids, "shift_labels": ids, "document_ids": documents, "position_ids": positions}
    if "document_borders" in inspect.signature(inspect.unwrap(MiniLLMForCausalLM.forward)).parameters:
        from minillm.data.loader import document_borders

        one["document_borders"] = torch.from_numpy(document_borders(documents.numpy()))
    return [{name: tensor.to(device) for name, tensor in one.items()} for _ in range(row.micro_steps)]


def measure(name: str, steps: int, small: bool, profile: Path | None) -> dict[str, object]:
    """What came out, in the form of the file's header."""
    row = ROWS[name]
    smaller = {"num_hidden_layers": 2, "vocab_size": 512} if small else {}
    arch = preset(row.preset, **row.fields, **smaller)
    if small:
        row = Row(**{**vars(row), "micro": 2, "length": 64, "fields": {}})
    batch, gpu = row.micro * row.micro_steps, torch.cuda.is_available()
    run = RunConfig.model_validate({"train": {
        "max_steps": 1, "train_batch_size": batch, "train_micro_batch_size_per_gpu": row.micro,
        "compile": row.compile, "gradient_checkpointing": row.checkpointing,
    }})  # fmt: skip
    run.model.moe_backend, run.model.expert_parallel_size = "torch", 1
    path = ROOT / "ds_configs" / f"{row.json_file}.json"
    values, problems = resolve_deepspeed_config(read_deepspeed_json(path), run, 1, path.name)
    assert not problems, problems
    with torch.device("cuda" if gpu else "cpu"):
        model = MiniLLMForCausalLM(MiniLLMConfig(**arch))
    engine = build_engine(model, run, values)
    data, tokens, times = batches(arch, row, engine.device), batch * row.length, []
    for step in range(WARM + steps):
        if step == WARM and gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        result = take_step(engine, data, tokens, 1e-4)  # it ends with the gradient's norm, read from the device
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    took = statistics.median(times[WARM:])
    mfu = flops_per_token(arch, row.length) * tokens / took / peak_flops(torch.bfloat16)[0]
    setup = Setup(arch, values, 1, "torch", 1, batch, row.length, row.micro, row.checkpointing)
    found = {
        "name": name, "preset": row.preset, "ds_config": row.json_file, "micro": row.micro,
        "micro_steps": row.micro_steps, "length": row.length, "compile": row.compile,
        "checkpointing": row.checkpointing, "tokens_per_s": round(tokens / took), "step_seconds": round(took, 5),
        "first_step_seconds": round(times[0], 2), "mfu": round(mfu, 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "planned_bytes": round(memory(setup).allocated), "loss": round(result.loss, 4), "error": None,
    }  # fmt: skip
    if profile:
        found |= profiled(lambda: take_step(engine, data, tokens, 1e-4), profile / f"profile-{name}.txt", took)
    engine.destroy()
    return found


def profiled(step, path: Path, seconds: float) -> dict[str, object]:
    """One step's kernels and calls, to `path`; how much of it the GPU works, and what was launched and waited for."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    on_gpu = torch.cuda.is_available()
    with record(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as trace:
        step()
    events = trace.key_averages()
    keys = ["self_device_time_total"] * on_gpu + ["self_cpu_time_total"]
    tables = [events.table(sort_by=key, row_limit=45, max_name_column_width=90) for key in keys]
    path.write_text("\n".join(tables))
    counts = {event.key: event.count for event in events}
    names = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaLaunchKernel", "cuLaunchKernel", "aten::nonzero")
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6 / seconds
    return {"calls": {name: counts.get(name, 0) for name in names}, "gpu_busy": round(busy, 3)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure optimizer steps on one GPU.")
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], metavar="ROW")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    if arguments.list or not arguments.rows:
        print("\n".join(f"{name:<26}{row}" for name, row in ROWS.items()))
        return 0
    if not torch.cuda.is_available() and not arguments.tiny:
        print("error: there is no GPU here; --tiny tries the script on the CPU", file=sys.stderr)
        return 2
    failed = 0
    with process_group():
        for name in arguments.rows:
            try:
                found = measure(name, arguments.steps, arguments.tiny, arguments.profile)
            except (RuntimeError, ValueError) as problem:  # out of memory, a kernel: the other rows stand
                traceback.print_exc()
                found, failed = {"name": name, "error": f"{type(problem).__name__}: {str(problem)[:300]}"}, 1
            print("RESULT " + json.dumps(found), flush=True)
            torch.compiler.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return failed


if __name__ == "__main__":
    sys.exit(main())
