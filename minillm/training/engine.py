"""DeepSpeed's engine: opened, warmed up, stepped and closed. The only place that calls `deepspeed.initialize`.

Contract: a step's gradient is the sum over all target tokens of the global batch divided by their number, so that any
split into ranks and micro-batches gives the same update; nothing non-finite is ever applied.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from minillm.compat.deepspeed_api import (
    base_optimizer,
    count_micro_step,
    dynamic_loss_scaler,
    find_overflow_by_the_norm,
    flat_partitions,
    forget_expert_parallel_groups,
    gradient_overflowed,
    leave_out_inference_ops,
    link_optimizer_states,
)
from minillm.models.capacity import Capacity
from minillm.settings.deepspeed_json import precision
from minillm.settings.run import RunConfig
from minillm.training.expert_parallel import parallelise_experts
from minillm.training.muon import Muon
from minillm.training.optim import build_optimizer
from minillm.training.zero_state import loss_scale_state, restore_loss_scale
from minillm.utils import distributed
from minillm.utils.errors import UserError

MicroBatch = dict[str, torch.Tensor]


@dataclass
class StepResult:
    """What one optimizer step found, over the global batch.

    Attributes:
        loss: token-mean cross-entropy.
        auxiliary: the other terms of the loss by name, before their coefficients.
        grad_norm: global gradient norm before clipping.
        routing: MiniLLMCausalLMOutput.routing of the whole batch, float64 on the CPU; None without experts.
    """

    loss: float
    auxiliary: dict[str, float]
    grad_norm: float
    routing: dict[str, torch.Tensor] | None


class NonFiniteError(UserError):
    """A loss or gradient that is not a finite number, on any rank; raised on all of them, before the update."""


class RejectedLossError(Exception):
    """`accept` said no to an update; `loss` is the global batch's."""

    def __init__(self, loss: float):
        super().__init__(f"the loss is {loss:.4f}")
        self.loss = loss


@contextlib.contextmanager
def process_group(timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Open the process group (nccl on GPUs, gloo on CPUs) and close it whatever happens.

    A process that no launcher started becomes a group of one. CPU ranks share the cores of their machine evenly.

    Raises:
        UserError: this rank's machine has fewer GPUs than ranks.
    """
    device = distributed.check_device()
    alone = {} if "RANK" in os.environ else lone_rank_environment()
    os.environ.update(alone)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(distributed.threads_of_rank())
        leave_out_inference_ops()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 has renamed: one warning a call site and rank.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if device.type == "cuda":  # with its device, NCCL connects now and not in the first collective
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    try:
        deepspeed.init_distributed(dist_init_required=False if deepspeed.comm.is_initialized() else None)
        yield
        dist.barrier()
    finally:
        # Without it, about one gloo run in ten aborts at exit.
        dist.destroy_process_group()
        forget_expert_parallel_groups()
        for name in alone:
            del os.environ[name]


def lone_rank_environment() -> dict[str, str]:
    """What a launcher would have set for a single rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}


def build_engine(model: torch.nn.Module, run: RunConfig, deepspeed_config: dict):
    """Wrap `model` (fp32, its weights already in it) in a DeepSpeed engine, its experts shared out.

    Weights come first because ZeRO copies them into its low-precision tensors here and never again.
    """
    capacity = None
    if run.model.moe_capacity_factor is not None:
        capacity = Capacity(run.model.moe_capacity_factor, run.model.moe_min_capacity)
    options = dict(deepspeed_config.get("expert_parallel") or {})
    if precision(deepspeed_config) == "fp32" and distributed.default_device().type == "cuda":
        # There its grouped products know bf16 only, or round to TF32 (RTX 3090).
        options.setdefault("use_grouped_mm", False)
    parallelise_experts(
        model, run.model.moe_backend, run.model.expert_parallel_size, capacity=capacity, options=options
    )
    # AutoEP's layers are in the model by now; DeepSpeed would look for blocks of other people's models to replace.
    deepspeed_config = {key: value for key, value in deepspeed_config.items() if key != "expert_parallel"}
    if run.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = build_optimizer(model, run.optim)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=deepspeed_config, dist_init_required=False
    )
    find_overflow_by_the_norm(engine)
    if isinstance(optimizer, Muon):
        optimizer.bind(flat_partitions(engine), engine.device, next(engine.module.parameters()).dtype)
    if run.train.compile:
        # Not engine.compile(), which makes one graph of the model: all its gradients come at the end of backward, when
        # nothing is left to overlap their reduction with.
        engine.module.compile_regions()
    return engine


def warm_up(engine, micro_batches: list[MicroBatch], num_target_tokens: int) -> StepResult:
    """One whole step at learning rate 0, with every micro-step of the accumulation.

    Out-of-memory and kernel errors come now and not at night, and the optimizer's state exists afterwards. It dirties
    moments, counters and generators; the caller resets or restores them. fp16's loss scale is as it was: what this
    step had to lower, the first step lowers again, but a scale that is too low comes back only after a thousand steps.

    Args:
        micro_batches, num_target_tokens: as for `run_step`; gradients of another size than those of the run would
            find another loss scale.
    """
    scale = loss_scale_state(engine)
    result = run_step(engine, micro_batches, num_target_tokens, learning_rate=0.0)
    if scale is not None:
        restore_loss_scale(engine, scale)
    link_optimizer_states(engine)
    return result


def run_step(
    engine,
    micro_batches: list[MicroBatch],
    num_target_tokens: int,
    learning_rate: float,
    before_update: Callable[[], None] | None = None,
    accept: Callable[[float], bool] | None = None,
) -> StepResult:
    """One optimizer step.

    With fp16 the loss is scaled; where a gradient overflows, DeepSpeed lowers the scale and leaves the update out, and
    the step is taken again on the same batch, so that no batch is lost.

    Args:
        micro_batches: this rank's share, gradient_accumulation_steps of them.
        num_target_tokens: target tokens of the global batch (all ranks, all micro-batches).
        learning_rate: of this step, for every group.
        before_update: called when the gradients are complete, on every rank.
        accept: asked before the last backward pass whether to update, with the global loss (finite). With it the
            engine is fit for another step after an error below; it costs one wait for the loss.

    Raises:
        NonFiniteError, RejectedLossError: on every rank, with weights and moments as they were.
    """
    for group in base_optimizer(engine).param_groups:
        group["lr"] = learning_rate
    while True:
        scale = loss_scale_state(engine)
        result = _attempt_step(engine, micro_batches, num_target_tokens, before_update, accept)
        if not gradient_overflowed(engine):  # ZeRO's optimizers leave such a step out by themselves
            return result
        if scale is None or scale["cur_scale"] <= dynamic_loss_scaler(engine).min_scale:
            raise NonFiniteError(f"the loss is {result.loss:.4f}, but the gradient is not finite")


def _attempt_step(
    engine,
    micro_batches: list[MicroBatch],
    num_target_tokens: int,
    before_update: Callable[[], None] | None,
    accept: Callable[[float], bool] | None,
) -> StepResult:
    scale = distributed.world_size()  # DeepSpeed averages over the ranks; the loss is already divided by all tokens
    # A number would become part of compiled graphs; and filled on the device, it waits for nothing.
    num_items = torch.full((), num_target_tokens, dtype=torch.long, device=engine.device)
    losses: dict[str, torch.Tensor] = {}
    routing: dict[str, torch.Tensor] = {}
    problem = None
    for number, batch in enumerate(micro_batches, 1):
        output = engine(**batch, num_items_in_batch=num_items)
        losses = _add(losses, {"total": output.loss, **output.losses})
        routing = _add(routing, output.routing or {})
        factor = scale
        if accept is not None and number == len(micro_batches):
            losses, routing = _sum_over_ranks(losses, routing)
            problem = _judge(losses, accept)
            # Gradients that are no numbers make DeepSpeed leave the update out and clear what has been added up.
            factor = scale if problem is None else math.nan
        engine.backward(output.loss * factor, scale_wrt_gas=False)
        if number < len(micro_batches):
            engine.step()
    if accept is None:
        losses, routing = _sum_over_ranks(losses, routing)
        problem = _judge(losses)
    norm = plain_gradient_norm(engine) if engine.zero_optimization_stage() == 0 else None
    losses = {name: float(value) for name, value in losses.items()}
    del losses["total"]
    loss = losses.pop("cross_entropy")
    if problem is None and norm is not None and not math.isfinite(norm):
        problem = NonFiniteError(f"the loss is {loss:.4f}, but the gradient norm is {norm}")
    if problem is not None:
        if accept is not None:
            _drop_update(engine)
        raise problem
    if before_update is not None:
        before_update()
    engine.step()
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    return StepResult(loss, losses, norm, routing or None)


def _judge(losses: dict[str, torch.Tensor], accept: Callable[[float], bool] | None = None) -> Exception | None:
    """What speaks against an update by the global losses."""
    values = {name: float(value) for name, value in losses.items()}
    total, loss = values.pop("total"), values.pop("cross_entropy")
    if not math.isfinite(total):
        parts = "".join(f", {name} {value}" for name, value in values.items())
        whole = f" (cross-entropy {loss}{parts})" if values else ""
        return NonFiniteError(f"the loss is {total}{whole}")
    if accept is not None and not accept(loss):
        return RejectedLossError(loss)
    return None


def _drop_update(engine) -> None:
    """Forget the gradients of a step whose last backward pass made them nan."""
    if engine.zero_optimization_stage() == 0:  # DeepSpeed would apply them
        engine.module.zero_grad(set_to_none=True)
        count_micro_step(engine)
        return
    engine.step()
    if not gradient_overflowed(engine):
        raise RuntimeError("DeepSpeed applied a gradient that is no number")


def _add(sums: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`values` added to what earlier micro-batches gave (nothing before the first), in float64, in which counts are
    exact."""
    return {name: sums.get(name, 0.0) + value.detach().double() for name, value in values.items()}


def _sum_over_ranks(*tables: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The same tables with every tensor summed over the ranks, in float64 on the CPU; one all-reduce for all, and one
    wait for the device."""
    values = [value for table in tables for value in table.values()]
    flat = torch.cat([value.flatten() for value in values])
    dist.all_reduce(flat)
    flat = flat.cpu()
    parts = iter(flat.split([value.numel() for value in values]))
    return [{name: next(parts).view(value.shape) for name, value in table.items()} for table in tables]


def plain_gradient_norm(engine) -> float:
    """ZeRO-0 reports no norm and applies any gradient, so look before the step (they are reduced by then)."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(gradients))


def move_to_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
