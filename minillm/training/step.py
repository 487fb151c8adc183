"""One optimizer step: forward, backward and update over the global batch, or the fault that spoke against the update.

Contract: `take_step` is the only place where weights change. Losses are normalised by the target tokens of the global
batch, so that any split into ranks and micro-batches gives the same gradient. A fault is found before the update, on
every rank alike, and leaves weights and moments as they were.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist

from minillm.compat.deepspeed_api import base_optimizer, count_micro_step, dynamic_loss_scaler, gradient_overflowed
from minillm.training.zero_state import loss_scale_state
from minillm.utils import distributed
from minillm.utils.errors import UserError

MicroBatch = dict[str, torch.Tensor]
Tensors = dict[str, torch.Tensor]


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
    routing: Tensors | None


@dataclass
class Fault:
    """Why a step was not taken, or should not have been.

    Attributes:
        kind: "non_finite" or "loss_spike".
        problem: a clause for the person who reads the log.
        loss: of the global batch, where it is a number.
    """

    kind: str
    problem: str
    loss: float | None = None


class NonFiniteError(UserError):
    """A loss or gradient that is not a finite number, on any rank; raised on all of them, before the update."""


class Judge(Protocol):
    """Who is asked about an update (minillm.training.recovery.Guard).

    Attributes:
        may_leave_out: True where the run goes on after a fault. The judgement then comes before the last backward pass,
            which costs a wait for the loss, and the engine is fit for another step afterwards.
    """

    may_leave_out: bool

    def judge(self, losses: dict[str, float]) -> Fault | None:
        """What speaks against an update by the global losses ("total", "cross_entropy" and the other terms)."""


class OnlyFinite:
    """The judge of a step that no policy watches: warm-up, gradient parity, benchmarks."""

    may_leave_out = False

    def judge(self, losses: dict[str, float]) -> Fault | None:
        return not_finite(losses)


def take_step(
    engine,
    micro_batches: list[MicroBatch],
    num_target_tokens: int,
    learning_rate: float,
    judge: Judge | None = None,
    before_update: Callable[[], None] | None = None,
) -> StepResult | Fault:
    """One optimizer step.

    With fp16 the loss is scaled; where a gradient overflows, DeepSpeed lowers the scale and leaves the update out, and
    the step is taken again on the same batch, so that no batch is lost.

    Args:
        micro_batches: this rank's share, gradient_accumulation_steps of them, on the engine's device.
        num_target_tokens: target tokens of the global batch (all ranks, all micro-batches).
        learning_rate: of this step, for every group.
        before_update: called when the gradients are complete, on every rank.
    """
    judge = judge or OnlyFinite()
    for group in base_optimizer(engine).param_groups:
        group["lr"] = learning_rate
    # A number would become part of compiled graphs; and filled on the device, it waits for nothing.
    num_items = torch.full((), num_target_tokens, dtype=torch.long, device=engine.device)
    while True:
        scale = loss_scale_state(engine)
        losses: Tensors = {}
        routing: Tensors = {}
        fault = None
        for number, batch in enumerate(micro_batches, 1):
            output = engine(**batch, num_items_in_batch=num_items)
            losses = _add(losses, {"total": output.loss, **output.losses})
            routing = _add(routing, output.routing or {})
            factor = float(distributed.world_size())  # DeepSpeed averages over ranks; the loss is divided already
            is_last = number == len(micro_batches)
            if is_last and judge.may_leave_out:
                losses, routing = sum_over_ranks(losses, routing)
                fault = judge.judge(_numbers(losses))
                if fault is not None:
                    factor = math.nan  # makes DeepSpeed leave the update out and clear what has been added up
            engine.backward(output.loss * factor, scale_wrt_gas=False)
            if not is_last:
                engine.step()
        if not judge.may_leave_out:
            losses, routing = sum_over_ranks(losses, routing)
            fault = judge.judge(_numbers(losses))
        terms = _numbers(losses)
        del terms["total"]
        loss = terms.pop("cross_entropy")
        norm = plain_gradient_norm(engine) if engine.zero_optimization_stage() == 0 else None
        if fault is None and norm is not None and not math.isfinite(norm):
            fault = Fault("non_finite", f"the loss is {loss:.4f}, but the gradient norm is {norm}", loss)
        if fault is not None:
            if judge.may_leave_out:
                _drop_update(engine)
            return fault
        if before_update is not None:
            before_update()
        engine.step()
        if not gradient_overflowed(engine):  # ZeRO's optimizers leave such a step out by themselves
            norm = float(engine.get_global_grad_norm()) if norm is None else norm
            return StepResult(loss, terms, norm, routing or None)
        if scale is None or scale["cur_scale"] <= dynamic_loss_scaler(engine).min_scale:
            return Fault("non_finite", f"the loss is {loss:.4f}, but the gradient is not finite", loss)


def not_finite(losses: dict[str, float]) -> Fault | None:
    """The fault of a loss that is not a finite number."""
    terms = dict(losses)
    total, loss = terms.pop("total"), terms.pop("cross_entropy")
    if math.isfinite(total):
        return None
    parts = "".join(f", {name} {value}" for name, value in terms.items())
    return Fault("non_finite", f"the loss is {total}" + (f" (cross-entropy {loss}{parts})" if terms else ""))


def _drop_update(engine) -> None:
    """Forget the gradients of a step whose last backward pass made them nan."""
    if engine.zero_optimization_stage() == 0:  # DeepSpeed would apply them
        engine.module.zero_grad(set_to_none=True)
        count_micro_step(engine)
        return
    engine.step()
    if not gradient_overflowed(engine):
        raise RuntimeError("DeepSpeed applied a gradient that is not a number")


def _add(sums: Tensors, values: Tensors) -> Tensors:
    """`values` added to what earlier micro-batches gave (nothing before the first), in float64, in which counts are
    exact."""
    return {name: sums.get(name, 0.0) + value.detach().double() for name, value in values.items()}


def _numbers(losses: Tensors) -> dict[str, float]:
    return {name: float(value) for name, value in losses.items()}


def sum_over_ranks(*tables: Tensors) -> list[Tensors]:
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
    """Copies do not wait where the loader has pinned the memory (on CUDA)."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
