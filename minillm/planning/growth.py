"""A run on more and more GPUs: speed, efficiency, memory, what a save costs and what the data asks, size by size.

Contract: no GPU and no torch. Strong scaling keeps the global batch, and with it what is learned; weak scaling keeps
the batch of a GPU, so that the batch grows. Every size has the best of the DeepSpeed configurations it is given; a size
that cannot run has the reason instead. Units: bytes, seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from minillm.planning.choice import Order, Row, best_row, plan_json
from minillm.planning.devices import Device
from minillm.planning.network import HOP_BETWEEN, HOP_INSIDE, Layout
from minillm.planning.states import MASTER, moment_bytes, parameter_groups
from minillm.planning.step import HOST_LINK, HOST_MEMORY, Setup, cost, days, speed
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import zero_stage
from minillm.settings.run import RunConfig

DISK = 1e9  # bytes/s of the file system that checkpoints go to
HASHING = 1.5e9  # bytes/s of sha256 on one core with SHA instructions
TOKEN_CHUNK = 8192  # minillm.data.token_shards.CHUNK_TOKENS


@dataclass(frozen=True)
class Save:
    """What one checkpoint costs.

    Attributes:
        size: bytes on the disk, and in rank 0's main memory while they are written in the background.
        gathered: seconds that every rank stands still while tensors are gathered and copied to main memory.
        written: seconds rank 0 writes and hashes; training waits for them as well where saves are not asynchronous.
        stall: seconds that training stands still.
    """

    size: float
    gathered: float
    written: float
    stall: float


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        batch: sequences of a step.
        row: the best way to run it; None: it cannot run, and `reason` says why.
        of_one, of_node: tokens/s over those of as many single GPUs (single nodes); None where there is no such run.
        data_rate: bytes/s of token shards that a node reads.
    """

    gpus: int
    nodes: int
    batch: int
    row: Row | None = None
    reason: str = ""
    of_one: float | None = None
    of_node: float | None = None
    save: Save | None = None
    data_rate: float = 0.0


def growth(run: RunConfig, arch: Architecture, paths: list[Path], order: Order, sizes: list[int], weak: bool,
           disk: float = DISK) -> list[Point]:  # fmt: skip
    """One point a size, in order.

    Args:
        paths: the DeepSpeed configurations to choose from.
        weak: the batch per GPU of the smallest size is kept, not the batch.
        disk: bytes/s.
    """
    smallest = min(sizes)

    def batch_of(gpus: int) -> int:
        batch = run.train.train_batch_size
        return batch * gpus // smallest if weak else batch

    node = _point(run, arch, paths, replace(order, gpus=order.gpus_per_node), batch_of(order.gpus_per_node))
    points = []
    for gpus in sizes:
        point = _point(run, arch, paths, replace(order, gpus=gpus), batch_of(gpus))
        if point.row is None:
            points.append(point)
            continue
        rate, nodes = point.row.speed.tokens_per_s, point.nodes
        of_node = rate / (nodes * node.row.speed.tokens_per_s) if node.row and gpus >= order.gpus_per_node else None
        own = replace(order, gpus=gpus)
        points.append(replace(
            point,
            of_one=rate / (gpus * one_gpu(point.row.setup, order.device, order.mfu)),
            of_node=of_node,
            save=save(point.row.setup, own.device, run.checkpoint.asynchronous, disk),
            data_rate=rate / nodes * token_bytes(arch.vocab_size),
        ))  # fmt: skip
    return points


def _point(run: RunConfig, arch: Architecture, paths: list[Path], order: Order, batch: int) -> Point:
    gpus, per_node = order.gpus, order.gpus_per_node
    empty = Point(gpus, -(-gpus // per_node), batch)
    if gpus > per_node and gpus % per_node:
        return replace(empty, reason=f"with {gpus} GPUs the last node of {per_node} is not full")
    if batch < gpus or batch % gpus:
        return replace(empty, reason=f"a batch of {batch} sequences does not divide among {gpus} GPUs")
    own = run.model_copy(deep=True)
    share, micro = batch // gpus, own.train.train_micro_batch_size_per_gpu
    own.train.train_batch_size = batch
    own.train.train_micro_batch_size_per_gpu = max(m for m in range(1, micro + 1) if share % m == 0)
    rows, refused = [], []
    for path in paths:
        found, not_found = plan_json(path, own, arch, order)
        rows, refused = rows + found, refused + not_found
    best = best_row(rows)
    if best is not None:
        return replace(empty, row=best)
    if not rows:
        return replace(empty, reason=refused[0][2])
    again = any(row.checkpointed for row in rows)
    return replace(
        empty,
        reason="nothing fits"
        + (" without train.gradient_checkpointing=true" if again else f" in {order.gpu_memory / 2**30:g} GiB"),
    )


def one_gpu(setup: Setup, device: Device, mfu: float) -> float:
    """Tokens/s of one GPU that sends nothing, as if the model fitted there."""
    alone = replace(setup, world_size=1, backend="torch", expert_parallel=1, gpus_per_node=None)
    found = speed(alone, device, mfu)
    return found.tokens / (found.compute + found.update)


def save(setup: Setup, device: Device, asynchronous: bool, disk: float = DISK) -> Save:
    """One checkpoint (training.checkpoint): weights and moments in fp32, gathered tensor by tensor on every rank, which
    copies each to main memory; rank 0 writes them, and hashes what it writes.

    DeepSpeed gathers by an all-reduce of each tensor at stages 1 and 2 (utils/tensor_fragment.py) and by an all-gather
    at stage 3; at stage 0 every rank has them.
    """
    groups = parameter_groups(setup.arch, "torch", 1, setup.world_size, setup.optimizer)
    layout = Layout.of(setup.world_size, setup.gpus_per_node)
    each = [MASTER + moment_bytes(group) for group in groups]  # bytes a parameter
    size = float(sum(bytes_ * sum(group.sizes) for bytes_, group in zip(each, groups, strict=True)))
    tensors = sum(bytes_ // 4 * len(group.sizes) for bytes_, group in zip(each, groups, strict=True))
    rounds = {0: 0, 3: 1}.get(zero_stage(setup.values), 2)
    ring = groups[0]
    near = size * layout.inside(ring) / device.bus + tensors * (layout.gpus_per_node - 1) * HOP_INSIDE
    far = size * layout.between(ring) / device.node_network(layout.gpus_per_node)
    far += tensors * (layout.nodes - 1) * HOP_BETWEEN
    gathered = rounds * (near + far) + size / min(HOST_LINK, HOST_MEMORY / layout.gpus_per_node)
    written = size / disk + size / HASHING
    return Save(size, gathered, written, gathered if asynchronous else gathered + written)


def token_bytes(vocab_size: int) -> float:
    """Bytes of a token in a shard without a mask: 2 or 4 (minillm.data.token_shards), and a chunk's two tar headers and
    padding, a part of them."""
    width = 2 if vocab_size <= 1 << 16 else 4
    content = 128 + TOKEN_CHUNK * width
    return (512 + content + -content % 512) / TOKEN_CHUNK


def seconds(value: float) -> str:
    """In seven characters."""
    return f"{value:.3f}" if value < 1000 else f"{value:.1f}"


def growth_table(
    points: list[Point], wrap: Callable[[str], list[str]], tokens: float | None = None, price: float | None = None
) -> list[str]:
    """Two tables, a line a size, and a line for every size that cannot run; 120 columns.

    Args:
        tokens: to train on, for the days.
        price: of a GPU and hour, for the cost.
    """
    head = f"{'GPUs':>5}{'nodes':>6} {'ds_config':14}{'experts':14}{'batch':>6}{'micro x':>9}{'compute':>9}"
    lines = [f"{head}{'inside':>8}{'between':>9}{'step s':>8}{'tokens/s':>12}{'of 1 GPU':>10}{'of node':>8}"]
    running = [point for point in points if point.row is not None]
    for point in running:
        row, s = point.row, point.row.speed
        steps = f"{row.setup.micro} x {row.setup.micro_steps}"
        line = f"{point.gpus:>5}{point.nodes:>6} {row.name[:13]:14}{row.experts:14}{point.batch:>6}{steps:>9}"
        line += f"{seconds(s.compute + s.update):>9}{seconds(s.inside + s.host):>8}{seconds(s.between):>9}"
        line += f"{seconds(s.seconds):>8}"
        line += f"{s.tokens_per_s:>12,.0f}{point.of_one:>10.0%}"
        lines.append(line + (f"{point.of_node:>8.0%}" if point.of_node is not None else ""))
    head = f"{'GPUs':>5}{'GiB a GPU':>11}{'save GiB':>10}{'stall s':>9}{'written s':>11}{'data MB/s a node':>18}"
    head += f"{'days':>10}" if tokens else ""
    lines += ["", head + (f"{'cost':>16}" if tokens and price is not None else "")]
    for point in running:
        line = f"{point.gpus:>5}{point.row.memory.total / 2**30:>11.1f}{point.save.size / 2**30:>10.1f}"
        line += f"{point.save.stall:>9.1f}{point.save.written:>11.1f}{point.data_rate / 1e6:>18.2f}"
        if tokens:
            time = days(tokens, point.row.speed)
            line += f"{time:>10.2f}" + (f"{cost(time, point.gpus, price):>16,.2f}" if price is not None else "")
        lines.append(line)
    return lines + refused_sizes(points, wrap)


def refused_sizes(points: list[Point], wrap: Callable[[str], list[str]]) -> list[str]:
    """One line a reason, with the sizes it holds for."""
    by_reason: dict[str, list[int]] = {}
    for point in points:
        if point.row is None:
            by_reason.setdefault(point.reason.replace(f" {point.gpus} GPUs", " so many GPUs"), []).append(point.gpus)
    return [
        line for reason, sizes in by_reason.items() for line in wrap(f"{', '.join(map(str, sizes))} GPUs: {reason}")
    ]
