"""The rows of a plan: every way a configuration can run on the machines there are, and which of them is the best.

Contract: no GPU and no torch. `plan_json` gives a Row for each legal way to run the experts under one DeepSpeed
configuration and says what is refused; `best_row` chooses, `reasons` says why in sentences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from minillm.planning.devices import Device
from minillm.planning.step import Memory, Setup, Speed, largest_micro_batch, memory, speed
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import (
    precision,
    read_deepspeed_json,
    resolve_deepspeed_config,
    section,
    zero_stage,
)
from minillm.settings.moe_backends import BACKENDS, backend_problems, has_experts, largest_size, resolve_moe_backend
from minillm.settings.run import RunConfig

GIB = 2**30
LEVEL = 0.01  # two times closer than this are the same


@dataclass(frozen=True)
class Order:
    """What was asked for besides the configurations."""

    gpus: int
    gpu_memory: float  # bytes
    device: Device
    mfu: float
    tokens: float | None
    price: float | None
    gpus_per_node: int = 8
    sizes: tuple[int, ...] = (8,)
    disk: float = 1e9  # bytes/s of checkpoints
    memory_ratio: float = 1.0  # of what was allocated over what was planned, where it was measured
    measured: str = ""  # the sentence about it


@dataclass(frozen=True)
class Row:
    """One DeepSpeed configuration with one way to run the experts.

    Attributes:
        setup: with the run's micro-batch, or with the largest that fits where that is smaller.
        largest: the largest micro-batch that fits; 0: none does, and `setup` has one of 1.
        checkpointed: the same with gradient_checkpointing.
        best: tokens/s at the largest micro-batch.
    """

    name: str
    experts: str
    setup: Setup
    memory: Memory
    speed: Speed
    largest: int
    checkpointed: int
    best: float

    @property
    def fits(self) -> bool:
        return self.largest > 0


def candidates(run: RunConfig, arch: Architecture, gpus: int) -> list[tuple[str, int | str]]:
    """(backend, expert_parallel_size) to look at: the run's own, and where it leaves the backend open, every one."""
    size = run.model.expert_parallel_size
    if not has_experts(arch):
        return [(run.model.moe_backend, size)]
    shared = largest_size(arch, gpus) if size in ("auto", 1) else size
    if run.model.moe_backend != "auto":
        return [(run.model.moe_backend, size if size != "auto" else 1 if run.model.moe_backend == "torch" else shared)]
    return [(backend, 1 if backend == "torch" else shared) for backend in BACKENDS]


def plan_json(
    path: Path, run: RunConfig, arch: Architecture, order: Order
) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """The rows of one DeepSpeed configuration, and what is refused: (file, experts, reason)."""
    values = read_deepspeed_json(path)
    rows, refused = [], []
    for backend, size in candidates(run, arch, order.gpus):
        own = run.model_copy(deep=True)
        own.model.moe_backend, own.model.expert_parallel_size = backend, size
        resolved, problems = resolve_deepspeed_config(values, own, order.gpus, str(path))
        experts = f"{backend} x {size}" if has_experts(arch) else ""
        enabled = section(values, "expert_parallel").get("enabled")
        if not problems and has_experts(arch) and (not enabled or backend == "autoep"):
            problems = backend_problems(arch, backend, size, resolved, order.gpus)
        problems = problems or resolve_moe_backend(own, arch, resolved, order.gpus)
        if precision(values) not in order.device.flops:
            problems = problems or [f"no rate of {precision(values)} products is known of {order.device.name}"]
        if problems:
            refused.append((path.stem, experts, "; ".join(problems)))
            continue
        setup = replace(Setup.of(own, arch, resolved, order.gpus), gpus_per_node=order.gpus_per_node,
                        workspace=order.device.workspace, memory_ratio=order.memory_ratio)  # fmt: skip
        rows.append(plan_row(path.stem, experts, setup, order))
    return rows, refused


def plan_row(name: str, experts: str, setup: Setup, order: Order) -> Row:
    """Fitted to the memory there is."""
    largest = largest_micro_batch(setup, order.gpu_memory)
    again = largest_micro_batch(replace(setup, checkpointing=True), order.gpu_memory)
    # A micro-batch that fits may be larger than one that does not, where it changes what is held between micro-steps.
    if memory(setup).total > order.gpu_memory:
        setup = replace(setup, micro=min(largest, setup.micro) or 1)
    now = speed(setup, order.device, order.mfu)
    best = speed(replace(setup, micro=largest or 1), order.device, order.mfu).tokens_per_s
    return Row(name, experts, setup, memory(setup), now, largest, again, best)


def best_row(rows: list[Row]) -> Row | None:
    """The fastest that fits; of those as fast, the one with most memory left. fp16 is for cards without bf16."""
    fitting = [row for row in rows if row.fits and precision(row.setup.values) != "fp16"] or [r for r in rows if r.fits]
    if not fitting:
        return None
    fastest = min(row.speed.seconds for row in fitting)
    level = [row for row in fitting if row.speed.seconds <= fastest * (1 + LEVEL)]
    return min(level, key=lambda row: (round(row.memory.total / GIB, 2), len(row.name)))


def reasons(best: Row, rows: list[Row], order: Order) -> list[str]:
    """Why that one, in sentences."""
    gib = f"{best.memory.total / GIB:.1f} of {order.gpu_memory / GIB:g} GiB"
    words = [f"{best.speed.tokens_per_s:,.0f} tokens/s, {gib}"]
    if order.gpus == 1:
        words.append("one GPU sends nothing and has nobody to share with, so stages differ in memory alone")
    elif best.setup.micro_steps == 1:
        words.append("with one micro-step every stage sends its gradients once")
    else:
        words += _against_the_other_stage(best, rows)
    words += _against_the_other_dispatch(best, rows)
    others = [r for r in rows if r.fits and zero_stage(r.setup.values) != zero_stage(best.setup.values)]
    if others:
        following = min(others, key=lambda row: (row.speed.seconds, len(row.name)))
        words.append(f"next: {f'{following.name} {following.experts}'.strip()}, {following.speed.tokens_per_s:,.0f}")
    if best.largest > best.setup.micro and best.best > best.speed.tokens_per_s * (1 + LEVEL):
        words.append(
            f"train.train_micro_batch_size_per_gpu={best.largest} fits as well and makes it {best.best:,.0f} tokens/s"
        )
    return words


def _against_the_other_stage(best: Row, rows: list[Row]) -> list[str]:
    """ZeRO-1 against ZeRO-2, where one of them is the best."""
    stage, steps = zero_stage(best.setup.values), best.setup.micro_steps
    for row in rows:
        other = zero_stage(row.setup.values)
        alike = row.experts == best.experts and precision(row.setup.values) == precision(best.setup.values)
        if {stage, other} == {1, 2} and alike:
            once, often = (best, row) if stage == 1 else (row, best)
            sends = (
                f"ZeRO-1 sends its gradients once a step, ZeRO-2 at each of the {steps} micro-steps: "
                f"{once.speed.traffic.reduce / 1e9:.1f} GB against {often.speed.traffic.reduce / 1e9:.1f}"
            )
            if stage == 1:
                return [sends]
            return [f"{sends}, which is {'hidden behind backward' if row.fits else 'slower, but ZeRO-1 does not fit'}"]
    return []


def _against_the_other_dispatch(best: Row, rows: list[Row]) -> list[str]:
    """Experts shared out among cards against whole ones on each."""
    shared = best.setup.expert_parallel > 1
    others = [r for r in rows if r.fits and r.name == best.name and (r.setup.expert_parallel > 1) != shared]
    if not others:
        return []
    other = min(others, key=lambda row: row.speed.seconds)
    apart, whole = (best, other) if shared else (other, best)
    tokens = apart.speed.traffic.exchange
    states = whole.speed.traffic.total - (apart.speed.traffic.total - tokens)
    return [
        f"experts shared out ({apart.experts}) send {tokens / 1e9:.1f} GB of tokens a step, whole ones "
        f"{states / 1e9:.1f} GB more of gradients and weights: {apart.speed.seconds:.2f} s against "
        f"{whole.speed.seconds:.2f}"
    ]
