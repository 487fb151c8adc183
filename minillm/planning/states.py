"""Bytes that DeepSpeed 0.19.8 keeps for parameters, gradients and optimizer, its buffers, and what it sends.

Contract: stdlib only, pure functions, all sizes in bytes of one GPU. States are exact, padding included: tests hold
them against the tensors of a running engine. ZeRO (arXiv:1910.02054), section 3, has who keeps which part and section 7
what is sent; where DeepSpeed does otherwise, it is DeepSpeed's way that is counted, with the place in its source:
- stage 1 keeps whole gradients between micro-steps and stage 2 the parts of this rank (stage_1_and_2.py,
  independent_gradient_partition_epilogue); both reduce by all-reduce, which sends twice what a reduce-scatter would
  (average_tensor, use_multi_rank_bucket_allreduce);
- a group's weights lie in one flat tensor, padded to twice the ranks (nccl_start_alignment_factor), at stage 3 each
  parameter by itself to the ranks (partition_parameters.py, _aligned_size);
- fp32 has masters beside its weights at stages 1 to 3: stage 3 means to share them, but compares a device with its name
  (stage3.py, _create_fp32_partitions).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minillm.settings.accounting import Shapes, parameter_shapes
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import precision, section, zero_stage

MOE_GROUP = 178_956_971  # parameters of a group of experts (deepspeed.moe.utils.split_params_into_different_moe_groups)
REDUCE_BUCKET = 5e8  # DeepSpeed's defaults from here on, in elements (runtime/zero/config.py)
PREFETCH_BUCKET, PERSISTENCE, MAX_LIVE, MAX_REUSE, SUB_GROUP = 5e7, 1e5, 1e9, 1e9, 1e9


def _width(dtype: str) -> int:
    """Bytes of a type by DeepSpeed's names for it (bf16, bfloat16, half, fp32, torch.float32, ...)."""
    return 2 if "16" in dtype or "half" in dtype else 4


@dataclass(frozen=True)
class Group:
    """Parameters that are flattened together.

    Attributes:
        sizes: elements of each, in order.
        ranks: that share the group's states out.
        routed: whether they are experts that are shared out among ranks.
        muon: whether Muon updates them, else AdamW.
    """

    sizes: tuple[int, ...]
    ranks: int
    routed: bool = False
    muon: bool = False


@dataclass(frozen=True)
class Zero:
    """What of DeepSpeed's configuration decides about memory and traffic, defaults filled in."""

    stage: int
    low: int  # bytes of a weight
    accumulation: int  # bytes of an accumulated gradient
    communication: int  # bytes of a sent gradient
    overlap: bool
    contiguous: bool
    scatter: bool  # stages 1 and 2: to the rank that keeps it alone, by a reduce instead of an all-reduce
    reduce_bucket: int
    prefetch: int
    persistence: int
    max_live: int
    max_reuse: int
    sub_group: int
    alignment: bool
    offload_optimizer: bool
    offload_parameters: bool

    @classmethod
    def of(cls, values: dict[str, Any]) -> Zero:
        """From a DeepSpeed configuration."""
        zero, stage, low = section(values, "zero_optimization"), zero_stage(values), _width(precision(values))
        overlap = zero.get("overlap_comm")
        accumulation = section(values, "data_types").get("grad_accum_dtype") or precision(values)
        communication = values.get("communication_data_type") or precision(values)
        return cls(
            stage=stage,
            low=low,
            accumulation=_width(accumulation),
            communication=_width(communication),
            overlap=stage == 3 if overlap is None else bool(overlap),
            contiguous=bool(zero.get("contiguous_gradients", True)),
            scatter=zero.get("use_multi_rank_bucket_allreduce", True) is False and zero.get("reduce_scatter", True),
            reduce_bucket=int(zero.get("reduce_bucket_size", REDUCE_BUCKET)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET)),
            persistence=int(zero.get("stage3_param_persistence_threshold", PERSISTENCE)),
            max_live=int(zero.get("stage3_max_live_parameters", MAX_LIVE)),
            max_reuse=int(zero.get("stage3_max_reuse_distance", MAX_REUSE)),
            sub_group=int(zero.get("sub_group_size", SUB_GROUP)),
            alignment=bool(zero.get("parameter_alignment", False)),
            offload_optimizer=section(zero, "offload_optimizer").get("device", "none") == "cpu",
            offload_parameters=section(zero, "offload_param").get("device", "none") == "cpu",
        )


def engine_shapes(arch: Architecture, backend: str, size: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> shape on one rank, and whether it is an expert of a shared-out set; AutoEP keeps gate and up apart."""
    shapes: Shapes = parameter_shapes(arch)
    own = {}
    for name, shape in shapes.items():
        routed = backend != "torch" and ".mlp.experts." in name
        if not routed:
            own[name] = shape, False
            continue
        experts, *rest = shape
        local = (experts // size, *rest)
        if backend == "autoep" and name.endswith("gate_up_proj"):
            stem, half = name.removesuffix("gate_up_proj"), (local[0], local[1] // 2, local[2])
            down = (local[0], local[2], local[1] // 2)
            own |= {f"{stem}w1": (half, True), f"{stem}w2": (down, True), f"{stem}w3": (half, True)}
        elif backend == "deepspeed" or not name.endswith("down_proj"):
            own[name] = local, True
    return own


_MATRIX = re.compile(r"\.(layers|multi_token_modules)\.\d+\..*_proj(_with_mqa)?(\.weight)?$")


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """training.muon.is_matrix, without torch."""
    return len(shape) >= 2 and bool(_MATRIX.search(name))


def parameter_groups(
    arch: Architecture, backend: str, size: int, world_size: int, optimizer: str = "adamw"
) -> list[Group]:
    """The optimizer's groups (training.optim): decay and no decay, experts apart and cut, Muon's matrices apart."""
    kept: dict[tuple[bool, bool], list[tuple[int, bool]]] = {}
    for name, (shape, routed) in engine_shapes(arch, backend, size).items():
        decays = len(shape) >= 2 and not name.endswith("bias")
        muon = optimizer == "muon" and (is_matrix(name, shape) or (routed and decays))  # AutoEP has its own names
        kept.setdefault((routed, not decays), []).append((math.prod(shape), muon))
    groups = []
    for (routed, _), members in sorted(kept.items()):
        for part in _cut(members) if routed else [members]:
            for of_muon in (True, False):
                sizes = tuple(size for size, muon in part if muon == of_muon)
                ranks = world_size // size if routed else world_size
                groups += [Group(sizes, ranks, routed, of_muon)] if sizes else []
    return groups


def _cut(members: list[tuple[int, bool]]) -> list[list[tuple[int, bool]]]:
    parts: list[list[tuple[int, bool]]] = [[]]
    for member in members:
        if parts[-1] and sum(size for size, _ in parts[-1]) + member[0] > MOE_GROUP:
            parts.append([])
        parts[-1].append(member)
    return parts


def orthogonalisation_flops(arch: Architecture) -> tuple[int, int]:
    """Of one update by Muon: all matrices together, and the largest of them. Five Newton-Schulz steps of a matrix with
    sides s <= l: its product with itself, that one's square, and its product with the matrix (training.muon)."""
    each = []
    for name, shape in parameter_shapes(arch).items():
        if not is_matrix(name, shape):
            continue
        *stack, rows, columns = shape
        heights = [rows // 2] * 2 if name.endswith("gate_up_proj") else [rows]
        if name.endswith("qkv_proj.weight"):
            key = arch.linear_num_key_heads * arch.linear_key_head_dim
            heights = [key, key, rows - 2 * key]
        for height in heights * math.prod(stack):
            small, large = sorted((height, columns))
            each.append(5 * (4 * small * small * large + 2 * small**3))
    return sum(each), max(each, default=0)


@dataclass(frozen=True)
class States:
    """Bytes of one rank between two micro-steps, after the first update.

    Attributes:
        parameters: low-precision weights (at stage 3 this rank's parts, and what stays gathered).
        gradients: what has added up.
        optimizer: fp32 masters, both moments, step counters.
        host: the offloaded part of the three, and the pinned buffers that go with it.
    """

    parameters: int
    gradients: int
    optimizer: int
    host: int = 0


MASTER = 4  # bytes of an fp32 weight


def moment_bytes(group: Group) -> int:
    """Bytes of an element's optimizer state beside its fp32 weight: AdamW's two fp32 moments, Muon's one.

    Memory, the update's time and a checkpoint's size ask here.
    """
    return 4 if group.muon else 8


def _counters(group: Group, tensors: int) -> int:
    """Bytes of AdamW's step counters."""
    return 0 if group.muon else 4 * tensors


def flat_size(group: Group, zero: Zero) -> int:
    """Elements of a group's flat weights at stages 1 and 2."""
    total, step = 0, 16 // math.gcd(16, zero.low) if zero.alignment else 1
    for number, size in enumerate(group.sizes):
        total += size
        total += -total % step if number < len(group.sizes) - 1 else 0
    return total + -total % (2 * group.ranks)


def states(groups: list[Group], zero: Zero, rank: int = 0) -> States:
    """What `rank` keeps; ranks differ at stage 2 alone, where gradients add up in the weights' own type.

    An update of AdamW keeps two moments and a 4-byte step counter for each tensor it is given.
    """
    if zero.stage == 0:
        count = sum(map(_total, groups))
        kept = sum(moment_bytes(g) * _total(g) + _counters(g, len(g.sizes)) for g in groups)
        return States(4 * count, 4 * count, kept)
    if zero.stage == 3:
        return _states_of_stage_3(groups, zero)
    flat = [flat_size(group, zero) for group in groups]
    parts = [size // group.ranks for size, group in zip(flat, groups, strict=True)]
    optimizer = sum((MASTER + moment_bytes(g)) * part + _counters(g, 1) for g, part in zip(groups, parts, strict=True))
    gradients = zero.accumulation * sum(map(_total, groups))
    host = 0
    if zero.stage == 2:
        gradients = sum(_partition_gradients(g, part, zero, rank) for g, part in zip(groups, parts, strict=True))
    if zero.offload_optimizer:
        largest = max(size for group in groups for size in group.sizes)
        host = optimizer + (4 + zero.low) * sum(parts) + zero.low * largest  # + fp32 gradients, weights on their way
        if zero.stage == 2 and zero.accumulation == zero.low:
            host, gradients = host + gradients, 0
        optimizer = 0
    return States(zero.low * sum(flat), gradients, optimizer, host)


def _total(group: Group) -> int:
    return sum(group.sizes)


def _partition_gradients(group: Group, part: int, zero: Zero, rank: int) -> int:
    """Stage 2: a flat fp32 part under low-precision weights, else the whole of every gradient that touches the part."""
    return zero.accumulation * (part if zero.accumulation != zero.low else _touched(group, part, rank))


def _touched(group: Group, part: int, rank: int) -> int:
    """Elements of the parameters that lie in this rank's part, whole where they cross its borders."""
    start, total, begin = rank % group.ranks * part, 0, 0
    for size in group.sizes:
        total += size if begin < start + part and begin + size > start else 0
        begin += size
    return total


def _states_of_stage_3(groups: list[Group], zero: Zero) -> States:
    parts = [sum(-(-size // group.ranks) for size in group.sizes) for group in groups]
    counters = sum(_counters(group, len(_sub_groups(group, zero.sub_group))) for group in groups)
    weights, gradients = zero.low * sum(parts), zero.accumulation * sum(parts)
    optimizer = sum((MASTER + moment_bytes(g)) * part for g, part in zip(groups, parts, strict=True)) + counters
    host = 0
    if zero.offload_optimizer:
        host, optimizer, gradients = optimizer + gradients + 4 * sum(parts), 0, 0
    if zero.offload_parameters:
        host, weights = host + weights, 0
    return States(weights + zero.low * persistent(groups, zero), gradients, optimizer, host)


def persistent(groups: list[Group], zero: Zero) -> int:
    """Elements of the parameters that stage 3 keeps gathered."""
    return sum(
        -(-size // group.ranks) * group.ranks
        for group in groups
        for size in group.sizes
        if size <= zero.persistence and group.ranks > 1
    )


def _sub_groups(group: Group, limit: int) -> list[int]:
    parts = [-(-size // group.ranks) for size in group.sizes]
    if limit >= sum(parts):
        return [sum(parts)]
    found, current = [], 0
    for number, part in enumerate(parts):
        current += part
        if current >= limit or number == len(parts) - 1:
            found.append(current)
            current = 0
    return found


@dataclass(frozen=True)
class Buffers:
    """Bytes beyond the states.

    Attributes:
        always: held through forward and backward.
        backward: on top while gradients are reduced in backward (beside all activations, at worst).
        reduction: on top at the end of an accumulation, when no activations are left.
        update: on top in the optimizer's step.
    """

    always: int
    backward: int
    reduction: int
    update: int


def buffers(groups: list[Group], zero: Zero, tied_table: int) -> Buffers:
    """What reducing, gathering and updating takes, on the rank that takes most.

    Args:
        tied_table: elements of an embedding that is the output matrix too: its gradient waits from backward's first
            operation to its last.
    """
    total, largest = sum(map(_total, groups)), max(size for group in groups for size in group.sizes)
    passing = zero.low * (largest + (tied_table if largest != tied_table else 0))
    sent = 0 if all(group.ranks == 1 for group in groups) else min(zero.reduce_bucket, total)
    if zero.stage == 0:  # engine.buffered_allreduce_fallback flattens
        return Buffers(0, passing, 4 * min(int(REDUCE_BUCKET), total) if sent else 0, 0)
    if zero.stage == 3:
        bucket = zero.communication * zero.reduce_bucket if zero.contiguous else 0
        scatter = 2 * zero.communication * sent  # reduce_scatter_coalesced: a padded copy, and its result
        return Buffers(bucket + zero.low * gathered(groups, zero), passing + scatter, 0, 0)
    staged = zero.accumulation if zero.stage == 1 else zero.low
    bucket = staged * zero.reduce_bucket * (2 if zero.overlap else 1) if zero.contiguous else 0
    offloaded = zero.low * largest if zero.offload_optimizer else 0
    parts = [flat_size(group, zero) // group.ranks for group in groups]
    update = 0
    if not zero.offload_optimizer and (zero.stage == 1 or zero.accumulation == zero.low):
        # The flat gradient of a group, and the same in fp32 where it is not yet.
        update = max(parts) * (zero.accumulation + (4 if zero.accumulation != 4 else 0))
    own = zero.low * sum(max(_touched(g, p, r) for r in range(g.ranks)) for g, p in zip(groups, parts, strict=True))
    copied = zero.communication * sent  # flattened for the all-reduce
    if zero.stage == 1:  # buckets are made at the first micro-step and kept to the end of the accumulation
        return Buffers(bucket + offloaded, passing, copied + own, update)
    again = own if zero.accumulation == zero.low else 0  # this micro-step's gradients, before they are added
    return Buffers(offloaded, passing + bucket + copied + again, 0, update)


def gathered(groups: list[Group], zero: Zero) -> int:
    """Elements that stage 3 holds whole at the end of a forward pass, beyond the persistent ones: at most.

    A parameter stays where it is used again within max_reuse elements (partitioned_param_coordinator.py,
    __params_to_release): forward and backward pass the same ones twice, so the last max_reuse / 2 do. It also stays
    where the prefetcher has passed its next use, and finding it there the prefetcher goes on to the next, until
    max_live are held (seen: with any prefetch, everything below max_live stays). The running module comes on top.
    """
    shared = [size for group in groups if group.ranks > 1 for size in group.sizes if size > zero.persistence]
    kept = max(zero.max_reuse // 2, zero.max_live if zero.prefetch else 0)
    return min(sum(shared), kept + max(shared, default=0))


@dataclass(frozen=True)
class Traffic:
    """Bytes one GPU sends in an optimizer step (in a ring, arXiv:1910.02054, section 7).

    Attributes:
        reduce: gradients.
        gather: weights.
        exchange: tokens to the ranks that hold their experts and back.
        host: between card and main memory, both ways, by offloading.
    """

    reduce: float
    gather: float
    exchange: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.reduce + self.gather + self.exchange + self.host


def sent_in_a_ring(group: Group) -> float:
    """The part of a reduce-scatter's or gather's bytes that each of the group's ranks sends."""
    return (group.ranks - 1) / group.ranks


def traffic(
    groups: list[Group],
    zero: Zero,
    micro_steps: int,
    exchange: float = 0.0,
    share: Callable[[Group], float] = sent_in_a_ring,
) -> Traffic:
    """Of one step; an all-reduce of S bytes among n ranks sends 2 S (n - 1) / n, a reduce-scatter or gather half.

    Args:
        share: bytes that pass a link in a reduce-scatter of one byte of a group: a rank's in one ring by default, or
            those of a link inside or between nodes (network.py).
    """
    times = micro_steps if zero.stage >= 2 else 1
    reduces = 1 if zero.stage == 3 or zero.scatter else 2
    whole = sum(_total(g) * share(g) for g in groups)
    reduce = times * reduces * zero.communication * whole
    parts = sum(flat_size(g, zero) // g.ranks for g in groups)
    gather = host = 0.0
    if zero.stage in (1, 2):
        gather = zero.low * whole
        if zero.offload_optimizer:
            host = (4 + zero.low) * parts
            if zero.stage == 2 and zero.accumulation == zero.low:
                host += zero.low * parts * (2 * micro_steps - 1)
    elif zero.stage == 3:
        free = sum(s * share(g) for g in groups for s in g.sizes if s > zero.persistence)
        kept, shared = gathered(groups, zero), sum(s for g in groups if g.ranks > 1 for s in g.sizes)
        again = 1 - kept / shared if shared else 0.0
        passes = micro_steps * (1 + max(0.0, again))
        gather = zero.low * (free * passes + whole - free)
        if zero.offload_parameters:
            host += zero.low * parts * passes
        if zero.offload_optimizer:
            host += zero.accumulation * parts * (2 * micro_steps - 1) + (4 + zero.low) * parts
    return Traffic(reduce, gather, exchange, host)
