"""Memory, speed, traffic and cost of a run before the first GPU hour: `python -m minillm.plan --config NAME
[--deepspeed JSON] [--gpus 8 | 8..1024 | 8,64] [--device CARD | --calibrate RESULT] [section.key=value ...]`.

Contract: no GPU and no torch; a second. Every ds_config side by side, or the one of --deepspeed in detail; the best one
is named, with the reason. What is refused is listed with the reason. Several sizes: one line a size. --json prints the
same for machines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

from minillm.planning.calibration import (
    Result,
    measured_device,
    measured_sentence,
    measured_step,
    read_result,
)
from minillm.planning.choice import GIB, Order, Row, best_row, plan_json, reasons
from minillm.planning.devices import DEVICES
from minillm.planning.growth import (
    DISK,
    HASHING,
    Point,
    growth,
    growth_table,
    refused_sizes,
    seconds,
)
from minillm.planning.published import check_published, published_table
from minillm.planning.step import MFU, assumptions, cost, days, memory
from minillm.settings.accounting import num_parameters
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import precision, zero_stage
from minillm.settings.presets import PRESETS, preset
from minillm.settings.reading import load_run_config
from minillm.settings.resolve import choose_model
from minillm.settings.run import AUTO_MICRO_BATCH, RunConfig, model_overrides, raise_problems, resolve_accumulation
from minillm.utils.commands import command_name
from minillm.utils.errors import UserError, exit_on_user_error, nearest
from minillm.utils.places import configs_dir, deepspeed_dir


def build_parser() -> argparse.ArgumentParser:
    """The command line; numbers are checked by `read_numbers`, so that all that is wrong is said at once."""
    parser = argparse.ArgumentParser(
        prog=command_name("minillm.plan"),
        description="Predict memory, speed, traffic and cost of a run; no GPU needed.",
        epilog="Overrides: section.key=value, for example train.gradient_checkpointing=true data.seq_len=1024",
    )  # fmt: skip
    parser.add_argument("--config", metavar="NAME|PATH", help="in launch/configs")
    parser.add_argument("--deepspeed", metavar="JSON", help="this one in detail (default: all in ds_configs)")
    parser.add_argument("--gpus", default="8", metavar="N", help="of the run (default 8); 8..1024 or 8,64: growth")
    parser.add_argument("--gpus-per-node", default="8", metavar="N", help="GPUs of one machine (default 8)")
    parser.add_argument("--weak", action="store_true", help="growth with the batch per GPU kept, not the batch")
    parser.add_argument("--gpu-memory", metavar="GIB", help="memory of one of them (default: the device's)")
    parser.add_argument("--device", help=f"{', '.join(DEVICES)} (default rtx3090)")
    parser.add_argument("--calibrate", metavar="RESULT", help="JSON of `bash tests/run.sh --gpu`: the card it saw")
    parser.add_argument("--bandwidth", metavar="GB/S", help="bus bandwidth of an all-reduce among the cards")
    parser.add_argument("--network", metavar="GB/S", help="what leaves a node, all its cards together")
    parser.add_argument("--disk", default=f"{DISK / 1e9:g}", metavar="GB/S", help="of checkpoints (default 1)")
    parser.add_argument("--overlap", metavar="PART", help="of the arithmetic's time that traffic runs beside, 0 to 1")
    parser.add_argument("--mfu", help=f"part of the peak that products reach (default {MFU})")
    parser.add_argument("--tokens", metavar="N", help="tokens to train on (default: the config's, where it says)")
    parser.add_argument("--price-per-gpu-hour", metavar="PRICE", help="in any currency, for the cost")
    parser.add_argument("--check-published", action="store_true", help="what others measured against the plan")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def read_numbers(args: argparse.Namespace, result: Result | None) -> Order:
    """What was asked for; a measured card in place of a listed one.

    Raises:
        UserError: everything that is wrong.
    """
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

    if args.calibrate and args.device:
        problems.append(f"--device {args.device}: the file of --calibrate names the card; leave one of them out")
    device = measured_device(result) if result else DEVICES.get((args.device or "rtx3090").lower())
    if device is None:
        problems.append(f"--device {args.device}: unknown{nearest(args.device, list(DEVICES))}")
        device = DEVICES["rtx3090"]
    bandwidth, network = number("--bandwidth"), number("--network")
    overlap, gpu_memory = number("--overlap", most=1.0, zero=True), number("--gpu-memory")
    if bandwidth is not None:
        device = device._replace(bus=bandwidth * 1e9, link="given")
    if network is not None:
        device = device._replace(network=network * 1e9, fabric="given", shared=True)
    sizes = read_sizes(args.gpus, problems)
    if args.weak and len(sizes) == 1:
        problems.append("--weak: it compares sizes; name several, for example --gpus 8..64")
    order = Order(
        gpus=sizes[0],
        gpu_memory=device.memory if gpu_memory is None else gpu_memory * GIB,
        device=device if overlap is None else device._replace(overlap=overlap),
        mfu=number("--mfu", most=1.0) or MFU,
        tokens=number("--tokens"),
        price=number("--price-per-gpu-hour", zero=True),
        gpus_per_node=int(number("--gpus-per-node", most=100_000, whole=True)),
        sizes=tuple(sizes),
        disk=number("--disk") * 1e9,
    )
    if problems:
        raise UserError("; ".join(problems))
    return order


MOST_GPUS = 100_000


def read_sizes(text: str, problems: list[str]) -> list[int]:
    """`8`, `8,64,512`, or `8..1024`: 8 doubled as long as it stays at or below the last."""
    first, dots, last = text.partition("..")
    words = [first, last] if dots else text.split(",")
    sizes = [int(word) for word in words if word.isdecimal() and 0 < int(word) <= MOST_GPUS]
    if len(sizes) < len(words) or (dots and sizes[0] > sizes[1]) or sorted(set(sizes)) != sizes:
        problems.append(
            f"--gpus {text}: it must be a whole number above 0, at most {MOST_GPUS:,}, or several that rise "
            f"(8,64,512), or the first and last of a range that doubles (8..1024)"
        )
        return [8]
    if dots:
        sizes = [sizes[0] << power for power in range(20) if sizes[0] << power <= sizes[1]]
    return sizes


MEMORY_PARTS = ("parameters", "gradients", "optimizer", "plain", "checkpointed", "logits", "buffers")


def memory_table(rows: list[Row]) -> list[str]:
    """GiB of one GPU at the peak, one line a row; 120 columns."""
    head = f"{'ds_config':14}{'experts':13}{'micro':>6}" + "".join(
        f"{name:>8}" for name in ("weights", "grads", "optim", "activ.", "(ckpt)", "logits", "buffers", "other")
    )
    lines = [f"{head}{'peak':>7}{'largest':>9}{'host':>7}"]
    for row in rows:
        m = row.memory
        parts = [getattr(m, part) for part in MEMORY_PARTS] + [m.fragmentation + m.context + m.workspace + m.correction]
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
        line = f"{row.name[:13]:14}{row.experts:14}{steps:>9}{seconds(s.compute):>9}{seconds(s.waiting):>9}"
        line += f"{seconds(s.update):>8}{seconds(s.seconds):>8}{s.tokens_per_s:>11,.0f}"
        line += f"{(s.traffic.total - s.traffic.host) / 1e9:>9.2f}{s.traffic.host / 1e9:>9.2f}"
        if tokens and row.fits:
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


def describe(name: str, run: RunConfig, arch: Architecture, order: Order) -> list[str]:
    counts = num_parameters(arch)
    active = f", {counts['active']:,} active" if counts["active"] < counts["total"] else ""
    checkpointing = "with" if run.train.gradient_checkpointing else "without"
    batch = f"{run.train.train_batch_size} x {run.data.seq_len} tokens"
    cards = order.gpus if len(order.sizes) == 1 else f"{order.sizes[0]} to {order.sizes[-1]}"
    nodes = f", {order.gpus_per_node} a node" if order.sizes[-1] > order.gpus_per_node else ""
    return [
        *_wrapped(f"{name}: {counts['total']:,} parameters{active}; batch {batch}, {checkpointing} checkpointing"),
        f"{cards} x {order.device.name} with {order.gpu_memory / GIB:.4g} GiB{nodes}",
    ]


def named_fields(run: RunConfig, config: str) -> tuple[str, Architecture]:
    """The architecture, and the name of its preset; the config's where that changes the preset."""
    model = choose_model(run)
    # Where the weights are not there yet, the shape that the config names.
    arch = model.architecture or preset(run.model.preset, **model_overrides(run))
    name = run.model.preset if model.architecture is None else model.name
    changed = name in PRESETS and arch != PRESETS[name]
    return (Path(config).stem if changed else name), arch


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
        "waiting_seconds_inside_nodes": row.speed.inside,
        "waiting_seconds_between_nodes": row.speed.between,
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
    if args.check_published:
        records = check_published(deepspeed_dir())
        return json.dumps(records, indent=1) if args.json else "\n".join(published_table(records))
    result = read_result(Path(args.calibrate)) if args.calibrate else None
    order = read_numbers(args, result)
    if args.config is None:
        raise UserError("--config is missing: it names a file of launch/configs, for example --config dense-171m")
    run, problems = load_run_config(args.config, args.overrides, stage="pretrain", configs_dir=configs_dir())
    if len(order.sizes) > 1 and run is not None and run.train.train_micro_batch_size_per_gpu == "auto":
        run.train.train_micro_batch_size_per_gpu = AUTO_MICRO_BATCH
    elif not problems and len(order.sizes) == 1:
        try:
            resolve_accumulation(run, order.gpus)
        except UserError as error:
            problems.append(str(error))
    raise_problems(problems, args.config)
    name, arch = named_fields(run, args.config)
    if result is not None:
        step = measured_step(result, run, arch)
        order = replace(
            order,
            memory_ratio=step.memory_ratio,
            mfu=order.mfu if args.mfu else step.of_products(order.device),
            measured=measured_sentence(result, step, order.device, run, arch),
        )
    paths = [Path(args.deepspeed)] if args.deepspeed else sorted(deepspeed_dir().glob("*.json"))
    if len(order.sizes) > 1:
        return plan_growth(args, run, arch, name, paths, order)
    rows, refused = [], []
    for path in paths:
        found, not_found = plan_json(path, run, arch, order)
        rows, refused = rows + found, refused + not_found
    if not rows:
        raise UserError("\n".join(refusals(refused)))
    if not any(row.fits or row.checkpointed for row in rows):
        least = min(memory(replace(row.setup, micro=1, checkpointing=True)).total for row in rows)
        raise UserError(
            f"--gpu-memory {order.gpu_memory / GIB:g}: nothing fits on {order.gpus} GPU(s); with a micro-batch of 1 "
            f"and train.gradient_checkpointing=true the least is {least / GIB:.1f} GiB: use more or larger GPUs, a "
            f"shorter data.seq_len or a smaller model"
        )
    tokens, best = planned_tokens(run, order), best_row(rows)
    why = reasons(best, rows, order) if best else [
        "nothing fits as configured: set train.gradient_checkpointing=true, with which "
        + ", ".join(f"{row.name} {row.experts}".strip() for row in rows if row.checkpointed) + " fit"
    ]  # fmt: skip
    rests_on = assumptions(order.device, order.mfu, order.gpus > order.gpus_per_node, order.measured)
    if args.json:
        return json.dumps({
            "model": name, "gpus": order.gpus, "gpu_memory_bytes": order.gpu_memory, "device": order.device.name,
            "tokens": tokens, "best": best and {"ds_config": best.name, "moe_backend": best.setup.backend,
                                                "expert_parallel_size": best.setup.expert_parallel, "why": why},
            "why": why, "rows": [as_json(row, order, tokens) for row in rows],
            "refused": [{"ds_config": n, "experts": e, "reason": r} for n, e, r in refused], "assumptions": rests_on,
        }, indent=1)  # fmt: skip
    lines = [*describe(name, run, arch, order), "", "GiB of one GPU at the peak (activ.: without checkpointing):"]
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


def plan_growth(
    args: argparse.Namespace, run: RunConfig, arch: Architecture, name: str, paths: list[Path], order: Order
) -> str:
    """The plan of several sizes.

    Raises:
        UserError: none of them can run.
    """
    points = growth(run, arch, paths, order, list(order.sizes), args.weak, order.disk)
    if not any(point.row for point in points):
        raise UserError("\n".join(refused_sizes(points, _wrapped)))
    rests_on = [
        *assumptions(order.device, order.mfu, order.sizes[-1] > order.gpus_per_node, order.measured),
        f"checkpoints: {order.disk / 1e9:g} GB/s of disk (--disk), sha256 at {HASHING / 1e9:g} GB/s; they are saved "
        f"{'beside training' if run.checkpoint.asynchronous else 'while training waits'} (checkpoint.asynchronous)",
    ]
    if args.json:
        return json.dumps({
            "model": name, "device": order.device.name, "gpu_memory_bytes": order.gpu_memory, "weak": args.weak,
            "gpus_per_node": order.gpus_per_node, "sizes": [point_json(point, order, run) for point in points],
            "assumptions": rests_on,
        }, indent=1)  # fmt: skip
    kept = "a GPU's share of the batch is kept" if args.weak else "the batch is kept"
    head = describe(name, run, arch, order)
    lines = [*head, f"Growth, {'weak' if args.weak else 'strong'}: {kept}; one optimizer step:"]
    lines += [*growth_table(points, _wrapped, planned_tokens(run, order), order.price), ""]
    lines += _wrapped("of 1 GPU: over as many single GPUs that send nothing, whether the model fits there or not; "
                      "compute: with the update")  # fmt: skip
    lines += ["", "assumed:", *(line for text in rests_on for line in _wrapped(f"- {text}"))]
    return "\n".join(lines)


def point_json(point: Point, order: Order, run: RunConfig) -> dict[str, object]:
    budget = planned_tokens(run, order)
    return {
        "gpus": point.gpus, "nodes": point.nodes, "train_batch_size": point.batch, "reason": point.reason,
        "of_one_gpu": point.of_one, "of_node": point.of_node, "checkpoint": point.save and asdict(point.save),
        "data_bytes_per_s_of_a_node": point.data_rate,
        "best": point.row and as_json(point.row, replace(order, gpus=point.gpus), budget),
    }  # fmt: skip


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
