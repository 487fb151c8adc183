"""Memory, speed, traffic and cost of a run before the first GPU hour: `python -m minillm.plan --config NAME
[--deepspeed JSON] [--gpus 8] [--gpu-memory 24] [section.key=value ...]`.

Contract: no GPU and no torch; a second. Every ds_config side by side, or the one of --deepspeed in detail; the best one
is named, with the reason. What is refused is listed with the reason. --json prints the same for machines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from minillm.accounting import num_parameters
from minillm.config import RunConfig, load_run_config, nearest, raise_problems, resolve_accumulation
from minillm.training.deepspeed_config import (
    precision,
    read_deepspeed_json,
    resolve_deepspeed_config,
    section,
    zero_stage,
)
from minillm.training.devices import DEVICES, Device
from minillm.training.moe_backends import BACKENDS, backend_problems, has_experts, largest_size, resolve_moe_backend
from minillm.training.planning import (
    MFU,
    Fields,
    Memory,
    Setup,
    Speed,
    assumptions,
    cost,
    days,
    largest_micro_batch,
    memory,
    speed,
)
from minillm.training.resolve import model_fields
from minillm.utils.errors import UserError, exit_on_user_error

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
LEVEL = 0.01  # two times closer than this are the same


def build_parser() -> argparse.ArgumentParser:
    """The command line; numbers are checked by `read_numbers`, so that all that is wrong is said at once."""
    parser = argparse.ArgumentParser(
        prog="python -m minillm.plan", description="Predict memory, speed, traffic and cost of a run; no GPU needed.",
        epilog="Overrides: section.key=value, for example train.gradient_checkpointing=true data.seq_len=1024",
    )  # fmt: skip
    parser.add_argument("--config", required=True, metavar="NAME|PATH", help="in launch/configs")
    parser.add_argument("--deepspeed", metavar="JSON", help="this one in detail (default: all in ds_configs)")
    parser.add_argument("--gpus", default="8", metavar="N", help="GPUs of the run (default 8)")
    parser.add_argument("--gpu-memory", default="24", metavar="GIB", help="memory of one of them (default 24)")
    parser.add_argument("--device", default="rtx3090", help=f"{', '.join(DEVICES)} (default rtx3090)")
    parser.add_argument("--bandwidth", metavar="GB/S", help="bus bandwidth of an all-reduce among the cards")
    parser.add_argument("--overlap", metavar="PART", help="of the arithmetic's time that traffic runs beside, 0 to 1")
    parser.add_argument("--mfu", default=str(MFU), help=f"part of the peak that products reach (default {MFU})")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on (default: the config's, where it says)")
    parser.add_argument("--price-per-gpu-hour", metavar="PRICE", help="in any currency, for the cost")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


@dataclass(frozen=True)
class Order:
    """What was asked for besides the configurations."""

    gpus: int
    gpu_memory: float  # bytes
    device: Device
    mfu: float
    tokens: float | None
    price: float | None


def read_numbers(args: argparse.Namespace) -> Order:
    """Raises UserError with everything that is wrong."""
    problems: list[str] = []

    def number(option: str, most: float = math.inf, whole: bool = False, zero: bool = False) -> float | None:
        text = getattr(args, option.removeprefix("--").replace("-", "_"))
        if text is None:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        in_range = value >= 0 if zero else value > 0
        if not math.isfinite(value) or not in_range or value > most or (whole and value != int(value)):
            rule = f"a {'whole ' if whole else ''}number {'of 0 or more' if zero else 'above 0'}"
            problems.append(f"{option} {text}: it must be {rule}{'' if math.isinf(most) else f', at most {most:g}'}")
            return 1.0
        return value

    device = DEVICES.get(args.device.lower())
    if device is None:
        problems.append(f"--device {args.device}: unknown{nearest(args.device, list(DEVICES))}")
        device = DEVICES["rtx3090"]
    bandwidth, overlap = number("--bandwidth"), number("--overlap", most=1.0, zero=True)
    if bandwidth is not None:
        device = device._replace(bus=bandwidth * 1e9, link="given")
    order = Order(
        gpus=int(number("--gpus", most=100_000, whole=True)),
        gpu_memory=number("--gpu-memory") * GIB,
        device=device if overlap is None else device._replace(overlap=overlap),
        mfu=number("--mfu", most=1.0),
        tokens=number("--tokens"),
        price=number("--price-per-gpu-hour", zero=True),
    )
    if problems:
        raise UserError("; ".join(problems))
    return order


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


def candidates(run: RunConfig, fields: Fields, gpus: int) -> list[tuple[str, int | str]]:
    """(backend, expert_parallel_size) to look at: the run's own, and where it leaves the backend open, every one."""
    size = run.model.expert_parallel_size
    if not has_experts(fields):
        return [(run.model.moe_backend, size)]
    shared = largest_size(fields, gpus) if size in ("auto", 1) else size
    if run.model.moe_backend != "auto":
        return [(run.model.moe_backend, size if size != "auto" else 1 if run.model.moe_backend == "torch" else shared)]
    return [(backend, 1 if backend == "torch" else shared) for backend in BACKENDS]


def plan_json(path: Path, run: RunConfig, fields: Fields, order: Order) -> tuple[list[Row], list[tuple[str, str, str]]]:
    """The rows of one DeepSpeed configuration, and what is refused: (file, experts, reason)."""
    values = read_deepspeed_json(path)
    rows, refused = [], []
    for backend, size in candidates(run, fields, order.gpus):
        own = run.model_copy(deep=True)
        own.model.moe_backend, own.model.expert_parallel_size = backend, size
        resolved, problems = resolve_deepspeed_config(values, own, order.gpus, str(path))
        experts = f"{backend} x {size}" if has_experts(fields) else ""
        enabled = section(values, "expert_parallel").get("enabled")
        if not problems and has_experts(fields) and (not enabled or backend == "autoep"):
            problems = backend_problems(fields, backend, size, resolved, order.gpus)
        problems = problems or resolve_moe_backend(own, fields, resolved, order.gpus)
        if problems:
            refused.append((path.stem, experts, "; ".join(problems)))
            continue
        setup = Setup(
            fields=fields,
            values=resolved,
            world_size=order.gpus,
            backend=own.model.moe_backend,
            expert_parallel=own.model.expert_parallel_size,
            batch=run.train.train_batch_size,
            length=run.data.seq_len,
            micro=run.train.train_micro_batch_size_per_gpu,
            checkpointing=run.train.gradient_checkpointing,
            capacity=run.model.moe_capacity_factor,
        )
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


MEMORY_PARTS = ("parameters", "gradients", "optimizer", "plain", "checkpointed", "logits", "buffers")


def memory_table(rows: list[Row]) -> list[str]:
    """GiB of one GPU at the peak, one line a row; 120 columns."""
    head = f"{'ds_config':14}{'experts':13}{'micro':>6}" + "".join(
        f"{name:>8}" for name in ("weights", "grads", "optim", "activ.", "(ckpt)", "logits", "buffers", "other")
    )
    lines = [f"{head}{'peak':>7}{'largest':>9}{'host':>7}"]
    for row in rows:
        m = row.memory
        parts = [getattr(m, part) for part in MEMORY_PARTS] + [m.fragmentation + m.context]
        line = f"{row.name[:13]:14}{row.experts:13}{row.setup.micro:>6}" + "".join(f"{x / GIB:>8.2f}" for x in parts)
        lines.append(f"{line}{m.total / GIB:>7.2f}{row.largest or 'none':>9}{m.host / GIB:>7.2f}")
    return lines


def speed_table(rows: list[Row], order: Order, tokens: float | None) -> list[str]:
    """Of one optimizer step, one line a row; 120 columns."""
    head = f"{'ds_config':14}{'experts':14}{'micro x':>9}{'compute':>9}{'waiting':>9}{'update':>8}{'step s':>8}"
    head += f"{'tokens/s':>11}{'GB sent':>9}{'host GB':>9}"
    head += f"{'days':>8}" if tokens else ""
    head += f"{'cost':>11}" if tokens and order.price is not None else ""
    lines = [head]
    for row in rows:
        s, steps = row.speed, f"{row.setup.micro} x {row.setup.micro_steps}"
        line = f"{row.name[:13]:14}{row.experts:14}{steps:>9}{s.compute:>9.3f}{s.waiting:>9.3f}{s.update:>8.3f}"
        line += f"{s.seconds:>8.3f}{s.tokens_per_s:>11,.0f}"
        line += f"{(s.traffic.total - s.traffic.host) / 1e9:>9.2f}{s.traffic.host / 1e9:>9.2f}"
        if tokens:
            time = days(tokens, s)
            line += f"{time:>8.2f}"
            line += f"{cost(time, order.gpus, order.price):>11,.2f}" if order.price is not None else ""
        lines.append(line + ("" if row.fits else "  does not fit"))
    return lines


def refusals(refused: list[tuple[str, str, str]]) -> list[str]:
    """One line a reason, with the files and experts it holds for."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, experts, reason in refused:
        by_reason.setdefault((experts, reason), []).append(name)
    lines = []
    for (experts, reason), names in by_reason.items():
        what = f"{', '.join(names)}{f' with {experts}' if experts else ''}: refused: {reason}"
        lines += _wrapped(what)
    return lines


def _wrapped(text: str, width: int = 118) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = "   "
        line = f"{line} {word}" if line else word
    return [*lines, line]


def details(row: Row) -> list[str]:
    """What the tables add up, for one row."""
    t, m = row.speed.traffic, row.memory
    sent = {"gradients": t.reduce, "weights": t.gather, "tokens to experts": t.exchange, "to main memory": t.host}
    sent = ", ".join(f"{what} {size / 1e9:.2f} GB" for what, size in sent.items())
    kind = f"ZeRO-{zero_stage(row.setup.values)}, {precision(row.setup.values)}"
    return _wrapped(
        f"{row.name} {row.experts}".strip() + f": {kind}; each GPU sends in a step: {sent}; activations without "
        f"checkpointing {m.plain / GIB:.2f} GiB, with it {m.checkpointed / GIB:.2f}; largest micro-batch "
        f"{row.largest or 'none'}, with checkpointing {row.checkpointed or 'none'}"
    )


def describe(name: str, run: RunConfig, fields: Fields, order: Order) -> list[str]:
    counts = num_parameters(fields)
    active = f", {counts['active']:,} active" if counts["active"] < counts["total"] else ""
    checkpointing = "with" if run.train.gradient_checkpointing else "without"
    batch = f"{run.train.train_batch_size} x {run.data.seq_len} tokens"
    return [
        f"{name}: {counts['total']:,} parameters{active}; batch {batch}, {checkpointing} checkpointing",
        f"{order.gpus} x {order.device.name} with {order.gpu_memory / GIB:g} GiB",
    ]


def planned_tokens(run: RunConfig, order: Order) -> float | None:
    """The budget: --tokens, else what max_steps make; epochs are known when the data is."""
    if order.tokens is not None or run.train.max_steps is None:
        return order.tokens
    return float(run.train.max_steps * run.train.train_batch_size * run.data.seq_len)


def as_json(row: Row, order: Order, tokens: float | None) -> dict[str, object]:
    time = days(tokens, row.speed) if tokens else None
    return {
        "ds_config": row.name,
        "zero_stage": zero_stage(row.setup.values),
        "precision": precision(row.setup.values),
        "moe_backend": row.setup.backend,
        "expert_parallel_size": row.setup.expert_parallel,
        "train_micro_batch_size_per_gpu": row.setup.micro,
        "gradient_accumulation_steps": row.setup.micro_steps,
        "fits": row.fits,
        "largest_micro_batch": row.largest,
        "largest_micro_batch_with_checkpointing": row.checkpointed,
        "memory_bytes": {**asdict(row.memory), "allocated": row.memory.allocated, "total": row.memory.total},
        "seconds_per_step": row.speed.seconds,
        "compute_seconds": row.speed.compute,
        "waiting_seconds": row.speed.waiting,
        "update_seconds": row.speed.update,
        "tokens_per_s": row.speed.tokens_per_s,
        "traffic_bytes_per_step": {**asdict(row.speed.traffic), "total": row.speed.traffic.total},
        "days": time,
        "cost": None if time is None or order.price is None else cost(time, order.gpus, order.price),
    }


def plan(args: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        UserError: bad numbers or configurations, or a GPU too small for every one of them.
    """
    order = read_numbers(args)
    run, problems = load_run_config(
        args.config, args.overrides, stage="pretrain", configs_dir=ROOT / "launch" / "configs"
    )
    if not problems:
        try:
            resolve_accumulation(run, order.gpus)
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems, args.config)
    fields, name = model_fields(run)
    if fields is None:  # the weights are not there yet: the shape the config names
        fields, name = model_fields(run.model_copy(update={"model": run.model.model_copy(update={"init_from": None})}))
    paths = [Path(args.deepspeed)] if args.deepspeed else sorted((ROOT / "ds_configs").glob("*.json"))
    rows, refused = [], []
    for path in paths:
        found, not_found = plan_json(path, run, fields, order)
        rows, refused = rows + found, refused + not_found
    if not rows:
        raise UserError("\n".join(refusals(refused)))
    if not any(row.fits or row.checkpointed for row in rows):
        least = min(memory(replace(row.setup, micro=1, checkpointing=True)).total for row in rows)
        raise UserError(
            f"--gpu-memory {args.gpu_memory}: nothing fits on {order.gpus} GPU(s); with a micro-batch of 1 and "
            f"train.gradient_checkpointing=true the least is {least / GIB:.1f} GiB: use more or larger GPUs, a shorter "
            f"data.seq_len or a smaller model"
        )
    tokens, best = planned_tokens(run, order), best_row(rows)
    why = reasons(best, rows, order) if best else [
        "nothing fits as configured: set train.gradient_checkpointing=true, with which "
        + ", ".join(f"{row.name} {row.experts}".strip() for row in rows if row.checkpointed) + " fit"
    ]  # fmt: skip
    rests_on = assumptions(order.device, order.mfu)
    if args.json:
        return json.dumps({
            "model": name, "gpus": order.gpus, "gpu_memory_bytes": order.gpu_memory, "device": order.device.name,
            "tokens": tokens, "best": best and {"ds_config": best.name, "moe_backend": best.setup.backend,
                                                "expert_parallel_size": best.setup.expert_parallel, "why": why},
            "why": why, "rows": [as_json(row, order, tokens) for row in rows],
            "refused": [{"ds_config": n, "experts": e, "reason": r} for n, e, r in refused], "assumptions": rests_on,
        }, indent=1)  # fmt: skip
    lines = [*describe(name, run, fields, order), "", "GiB of one GPU at the peak (activ.: without checkpointing):"]
    lines += [*memory_table(rows), ""]
    budget = f", and {tokens:,.0f} tokens" if tokens else ""
    lines += [f"One optimizer step{budget}:", *speed_table(rows, order, tokens), ""]
    if args.deepspeed:
        lines += [line for row in rows for line in details(row)] + [""]
    if refused:
        lines += [*refusals(refused), ""]
    if best is None:
        lines += _wrapped(why[0])
    else:
        lines += _wrapped(f"best: {best.name} {best.experts}".strip() + f": {'; '.join(why)}")
    lines += ["", "assumed:", *(line for text in rests_on for line in _wrapped(f"- {text}"))]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = build_parser().parse_intermixed_args(argv)
    with exit_on_user_error():
        text = plan(args)
        try:
            print(text, flush=True)
        except BrokenPipeError:  # the reader of our output left (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
