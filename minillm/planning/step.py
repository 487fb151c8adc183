"""Predicted memory, speed, traffic and cost of a run, before the first GPU hour.

Contract: no torch, pure functions. States, buffers and traffic are states.py's, activations are
activations.py's; here they become a peak, the largest micro-batch, a step's time, and a choice among DeepSpeed
configurations. DeepSpeed's own estimators (estimate_zero*_model_states_mem_needs) leave activations, logits and buffers
out. What is assumed and not derived is what `assumptions` says, and is printed with every plan.

Units: bytes, seconds, of one GPU unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from minillm.planning.activations import IMBALANCE, activations
from minillm.planning.devices import Device
from minillm.planning.network import HOP_BETWEEN, HOP_INSIDE, Layout, links
from minillm.planning.states import (
    MASTER,
    Buffers,
    Group,
    States,
    Traffic,
    Zero,
    buffers,
    moment_bytes,
    orthogonalisation_flops,
    parameter_groups,
    sent_in_a_ring,
    states,
    traffic,
)
from minillm.settings.accounting import flops_per_token
from minillm.settings.architecture import Architecture
from minillm.settings.deepspeed_json import precision
from minillm.settings.run import RunConfig

MFU = 0.45  # of the datasheet's peak, one card alone: nanochat d12 on an RTX 3090 (its pull request 509)
CONTEXT = 0.7 * 2**30  # CUDA context, kernels and NCCL's buffers, outside PyTorch's allocator
FRAGMENTATION = 0.05  # of what is allocated anew at each step
HOST_LINK = 12e9  # bytes/s between a card and main memory
HOST_MEMORY = 60e9  # bytes/s of main memory, all cards together
MUON_BUFFERS = 3 * 2 * 2**24  # bytes: what is read, received and orthogonalised of a bucket (training.muon)
HANDLES = 2  # of cuBLAS: the forward pass's thread and autograd's
RECOMPUTATION = 4 / 3  # forward once more: 8 N in place of 6 N operations


@dataclass(frozen=True)
class Setup:
    """One way to run a model.

    Attributes:
        arch: the architecture.
        values: DeepSpeed's configuration.
        world_size: GPUs.
        backend, expert_parallel: who runs the experts, and ranks that share one set of them.
        batch: sequences of a step over all GPUs; length: tokens of a sequence.
        micro: sequences of one forward pass on one GPU.
        checkpointing: activations are recomputed in backward.
        capacity: model.moe_capacity_factor.
        gpus_per_node: of one machine; None: all are in one.
        workspace: bytes of a cuBLAS handle (devices.Device).
        optimizer: adamw or muon.
        memory_ratio: of what is allocated over what is predicted, where a step like it was measured.
    """

    arch: Architecture
    values: dict[str, Any]
    world_size: int
    backend: str
    expert_parallel: int
    batch: int
    length: int
    micro: int
    checkpointing: bool
    capacity: float | None = None
    gpus_per_node: int | None = None
    workspace: int = 8_519_680
    memory_ratio: float = 1.0
    optimizer: str = "adamw"

    @classmethod
    def of(cls, run: RunConfig, arch: Architecture, values: dict[str, Any], world_size: int) -> Setup:
        """A run's own way."""
        return cls(
            arch=arch,
            values=values,
            world_size=world_size,
            backend=run.model.moe_backend,
            expert_parallel=run.model.expert_parallel_size,
            batch=run.train.train_batch_size,
            length=run.data.seq_len,
            micro=run.train.train_micro_batch_size_per_gpu,
            checkpointing=run.train.gradient_checkpointing,
            capacity=run.model.moe_capacity_factor,
            optimizer=run.optim.name,
        )

    @property
    def groups(self) -> list[Group]:
        """The optimizer's."""
        return parameter_groups(self.arch, self.backend, self.expert_parallel, self.world_size, self.optimizer)

    @property
    def micro_steps(self) -> int:
        """Of one step, on each GPU."""
        return self.batch // (self.micro * self.world_size)


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU at the peak, by part; `host` is main memory of one rank.

    Attributes:
        activations: as the setup has it; plain and checkpointed are the two it may choose from.
        correction: what measured steps hold beyond (or, negative, short of) the prediction.
        workspace: of cuBLAS, which PyTorch's allocator counts.
        fragmentation, context: assumptions, everything else is derived.
    """

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    plain: float
    checkpointed: float
    logits: float
    buffers: float
    workspace: float
    correction: float
    fragmentation: float
    context: float
    host: float

    @property
    def allocated(self) -> float:
        """What torch.cuda.max_memory_allocated would say."""
        states = self.parameters + self.gradients + self.optimizer
        return states + self.activations + self.logits + self.buffers + self.workspace + self.correction

    @property
    def total(self) -> float:
        return self.allocated + self.fragmentation + self.context


def memory(setup: Setup) -> Memory:
    """The peak: the largest of the loss (all activations and logits), the begin of backward (all activations and the
    buckets), its end with the last reduction, and the update.

    With one micro-step, gradients of stages 0 to 2 do not exist before backward, which frees activations as it makes
    them.
    """
    arch, zero = setup.arch, Zero.of(setup.values)
    groups = setup.groups
    table = arch.vocab_size * arch.hidden_size if arch.tie_word_embeddings else 0
    kept, extra = _held(tuple(groups), zero, _ranks(setup), table)
    made = activations(arch, zero.low, setup.micro, setup.length, setup.backend, setup.expert_parallel)
    saved, again = made.saved(setup.checkpointing), made.recomputed(setup.checkpointing)
    before = kept.gradients if setup.micro_steps > 1 or zero.stage == 3 else 0
    moments = [  # gradients, activations, logits, buffers
        (before, saved, made.logits, extra.always),
        (before, saved + again, 0, extra.always + extra.backward),
        (kept.gradients, 0, 0, extra.always + max(extra.backward, extra.reduction)),
        (kept.gradients, 0, 0, extra.always + extra.update + (MUON_BUFFERS if setup.optimizer == "muon" else 0)),
    ]
    gradients, acts, logits, held = max(moments, key=sum)
    workspace = HANDLES * setup.workspace
    predicted = kept.parameters + gradients + kept.optimizer + acts + logits + held + workspace
    return Memory(
        parameters=kept.parameters,
        gradients=gradients,
        optimizer=kept.optimizer,
        activations=acts,
        plain=made.saved(False),
        checkpointed=made.saved(True) + made.recomputed(True),
        logits=logits,
        buffers=held,
        workspace=workspace,
        correction=(setup.memory_ratio - 1) * predicted,
        fragmentation=FRAGMENTATION * (acts + logits + held),
        context=CONTEXT,
        host=kept.host,
    )


@lru_cache(maxsize=64)
def _held(groups: tuple[Group, ...], zero: Zero, ranks: int, table: int) -> tuple[States, Buffers]:
    """On the rank that holds most; the same for every micro-batch."""
    kept = max((states(list(groups), zero, rank) for rank in range(ranks)), key=lambda s: s.gradients)
    return kept, buffers(list(groups), zero, table)


def _ranks(setup: Setup) -> int:
    """How many hold different states: all at stage 2 where gradients add up in the weights' type, else one."""
    zero = Zero.of(setup.values)
    return setup.world_size if zero.stage == 2 and zero.accumulation == zero.low else 1


def largest_micro_batch(setup: Setup, capacity: float) -> int:
    """The largest micro-batch that divides the batch and fits into `capacity` bytes; 0 where none does."""
    share = setup.batch // setup.world_size
    fitting = [m for m in range(1, share + 1) if setup.batch % (m * setup.world_size) == 0]
    return max((m for m in fitting if memory(replace(setup, micro=m)).total <= capacity), default=0)


def exchanged(setup: Setup) -> float:
    """Bytes a GPU sends in one micro-step for tokens to reach their experts and come back, forward and backward.

    A token's K copies of D numbers go out and its K results come back, in backward their gradients: 4 K D, of which
    (ranks - 1) / ranks leave the card. DeepSpeed's MoE layer sends buffers as large as the fullest expert (or the
    capacity); checkpointing sends the forward's half again.
    """
    layers = [kind for kind in setup.arch.mlp_layer_types if kind == "sparse"]
    if not layers or setup.expert_parallel == 1:
        return 0.0
    number = len(layers) + setup.arch.num_nextn_predict_layers * (setup.arch.mlp_layer_types[-1] == "sparse")
    numbers = setup.micro * setup.length * setup.arch.num_experts_per_tok * setup.arch.hidden_size
    filled = (setup.capacity or IMBALANCE) if setup.backend == "deepspeed" else 1.0
    leaving = (setup.expert_parallel - 1) / setup.expert_parallel
    return (6 if setup.checkpointing else 4) * number * numbers * Zero.of(setup.values).low * filled * leaving


@dataclass(frozen=True)
class Speed:
    """Of one optimizer step.

    Attributes:
        compute: products, at the assumed part of the peak.
        inside, between: waiting for traffic inside nodes and between them that nothing hides.
        host: waiting for traffic between cards and main memory.
        update: of the optimizer's states.
        traffic: what one GPU sends.
        tokens: of the batch.
    """

    compute: float
    inside: float
    between: float
    host: float
    update: float
    traffic: Traffic
    tokens: int

    @property
    def waiting(self) -> float:
        return self.inside + self.between + self.host

    @property
    def seconds(self) -> float:
        return self.compute + self.waiting + self.update

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds


def speed(setup: Setup, device: Device, mfu: float = MFU) -> Speed:
    """How long a step takes.

    With overlap_comm gradients are reduced beside the backward pass (two thirds of the work), at stage 3 weights are
    gathered beside both passes, in device.overlap of their time; the last bucket of gradients is always waited for, as
    nothing is left to do beside it, and so is everything else.
    """
    zero = Zero.of(setup.values)
    groups = setup.groups
    exchange = setup.micro_steps * exchanged(setup)
    sent = traffic(groups, zero, setup.micro_steps, exchange)
    layout = Layout.of(setup.world_size, setup.gpus_per_node)
    taken = links(groups, zero, setup.micro_steps, exchange, setup.expert_parallel, layout, device)
    tokens, elements = setup.batch * setup.length, sum(sum(group.sizes) for group in groups)
    work = flops_per_token(setup.arch, setup.length) * tokens / setup.world_size
    work *= RECOMPUTATION if setup.checkpointing else 1
    compute = work / (mfu * device.flops[precision(setup.values)])
    reduce, gather = sum(taken.reduce), sum(taken.gather)
    if zero.overlap:
        beside = device.overlap * compute / (1 if zero.stage >= 2 else setup.micro_steps)
        last = reduce * min(1.0, zero.reduce_bucket / elements)
        reduce = max(last, reduce - 2 / 3 * beside)
        gather = max(0.0, gather - 1 / 3 * beside) if zero.stage == 3 else gather
    seen = [_part(reduce, sum(taken.reduce)), _part(gather, sum(taken.gather)), 1.0]
    near, far = (
        sum(part * times[place] for part, times in zip(seen, (taken.reduce, taken.gather, taken.exchange), strict=True))
        for place in (0, 1)
    )
    # The optimizer reads and writes the masters and its moments, and reads the gradient.
    bytes_ = [2 * (MASTER + moment_bytes(group)) + 4 + zero.low for group in groups]
    kept = [sum(group.sizes) / (group.ranks if zero.stage else 1) for group in groups]
    rate = HOST_MEMORY / setup.world_size if zero.offload_optimizer else device.memory_bandwidth
    update = sum(size * number for size, number in zip(bytes_, kept, strict=True)) / rate
    if setup.optimizer == "muon":
        update += _orthogonalisation(setup, groups, device, mfu, layout)
    return Speed(compute, near, far, sent.host / HOST_LINK, update, sent, tokens)


def _orthogonalisation(setup: Setup, groups: list[Group], device: Device, mfu: float, layout: Layout) -> float:
    """Seconds of Muon's matrices: shared out among the ranks, and at stage 3, where all ranks have a slice of each, to
    the owner and back; at stage 0 the results go to everyone. At stages 1 and 2 matrices lie whole on a rank."""
    zero, (total, largest) = Zero.of(setup.values), orthogonalisation_flops(setup.arch)
    seconds = max(total / setup.world_size, largest) / (mfu * device.flops[precision(setup.values)])
    passes = {0: setup.world_size, 3: 2}.get(zero.stage, 0)  # of a rank's own part
    sent = passes * zero.low * sum(sent_in_a_ring(g) * sum(g.sizes) / g.ranks for g in groups if g.muon)
    link = device.bus if layout.nodes == 1 else device.node_network(layout.gpus_per_node) / layout.gpus_per_node
    return seconds + sent / link


def _part(seen: float, whole: float) -> float:
    return seen / whole if whole else 0.0


def days(tokens: float, speed: Speed) -> float:
    """To train on so many tokens."""
    return tokens / speed.tokens_per_s / 86_400


def cost(days: float, gpus: int, price_per_gpu_hour: float) -> float:
    return 24 * days * gpus * price_per_gpu_hour


_MFU_SOURCE = "nanochat d12 on one RTX 3090; what others reach: --check-published"


def assumptions(device: Device, mfu: float, several_nodes: bool = False, measured: str = "") -> list[str]:
    """What the numbers rest on that is not derived, a sentence each.

    Args:
        measured: of a card, in place of what is assumed about it.
    """
    between = (
        f"; between nodes {device.network / 1e9:.3g} GB/s ({device.fabric}, of which NCCL reaches 90 %; --network) and "
        f"{HOP_BETWEEN * 1e6:g} us a hop"
    )
    rates = ", ".join(f"{rate / 1e12:.4g} in {precision}" for precision, rate in device.flops.items())
    reached = f"products reach {mfu:.0%} of it"
    return [
        *([measured] if measured else []),
        f"{device.name}: TFLOP/s {rates}; {reached} ({'as measured' if measured else _MFU_SOURCE}; --mfu)",
        f"all-reduce among the cards at {device.bus / 1e9:g} GB/s of bus bandwidth ({device.link}; preflight measures "
        f"it, --bandwidth sets it), beside {device.overlap:.0%} of the arithmetic with overlap_comm (--overlap); "
        f"{HOP_INSIDE * 1e6:g} us of latency for each hop of a ring{between if several_nodes else ''}",
        f"{CONTEXT / 2**30:g} GiB for CUDA and NCCL, {FRAGMENTATION:.0%} of activations, logits and buffers lost to "
        f"fragmentation",
        f"offloading: {HOST_LINK / 1e9:g} GB/s to main memory for each card, {HOST_MEMORY / 1e9:g} GB/s of it for all",
        f"{'' if measured else 'eager modules (torch.compile keeps less); '}the fullest expert has {IMBALANCE:g} times "
        f"the mean",
    ]
