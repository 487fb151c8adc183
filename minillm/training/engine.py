"""The process group and DeepSpeed's engine: opened, warmed up and closed. The only place that calls
`deepspeed.initialize`; a step is minillm/training/step.py's.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from minillm.compat.deepspeed_api import (
    find_overflow_by_the_norm,
    flat_partitions,
    forget_expert_parallel_groups,
    leave_out_inference_ops,
    link_optimizer_states,
)
from minillm.models.capacity import Capacity
from minillm.settings.deepspeed_json import precision
from minillm.settings.run import RunConfig
from minillm.training.expert_parallel import parallelise_experts
from minillm.training.muon import Muon
from minillm.training.optim import build_optimizer
from minillm.training.step import Fault, MicroBatch, NonFiniteError, StepResult, take_step
from minillm.training.zero_state import loss_scale_state, restore_loss_scale
from minillm.utils import distributed
from minillm.utils.errors import UserError

COLLECTIVES = timedelta(minutes=30)  # how long a collective may take where no limit of a run is longer
ROOM = timedelta(minutes=5)  # for the watch to name the place before a collective fails


@contextlib.contextmanager
def process_group(timeout: timedelta = COLLECTIVES) -> Iterator[None]:
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


def check_precision(name: str, device: torch.device) -> None:
    """Refuse what would not run, or only in emulation.

    Args:
        name: bf16, fp16 or fp32.
    """
    if name == "fp16" and device.type == "cpu":
        raise UserError("fp16 needs a GPU, and this machine has none: use a bf16 JSON, such as ds_configs/zero2.json")
    if name == "bf16" and device.type == "cuda":
        torch.cuda.set_device(device)  # the question below is about the current one
        # PyTorch and DeepSpeed count emulation as support: no tensor cores, no fused attention, several times slower.
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"bf16: {torch.cuda.get_device_name(device)} has no bf16 arithmetic (cards from Ampere on have); use "
                f"--deepspeed ds_configs/zero2_fp16.json"
            )


def group_timeout(seconds: float) -> timedelta:
    """How long a collective may take in a run whose ranks may stand in one place for `seconds` (faults.timeout)."""
    return max(COLLECTIVES, timedelta(seconds=seconds)) + ROOM


def release_memory() -> None:
    """Give back what an engine held that nobody needs any more.

    DeepSpeed's objects refer to each other in circles, and the next engine may not fit beside its buffers.
    """
    gc.collect()
    torch.cuda.empty_cache()  # nothing where CUDA has not been used


def warm_up(engine, micro_batches: list[MicroBatch], num_target_tokens: int) -> StepResult:
    """One whole step at learning rate 0, with every micro-step of the accumulation.

    Out-of-memory and kernel errors come now and not at night, and the optimizer's state exists afterwards. It dirties
    moments, counters and generators; the caller resets or restores them. fp16's loss scale is as it was: what this
    step had to lower, the first step lowers again, but a scale that is too low comes back only after a thousand steps.

    Args:
        micro_batches, num_target_tokens: as for `take_step`; gradients of another size than those of the run would
            find another loss scale.

    Raises:
        NonFiniteError: on every rank, the loss or the gradient is not a finite number.
    """
    scale = loss_scale_state(engine)
    result = take_step(engine, micro_batches, num_target_tokens, learning_rate=0.0)
    if isinstance(result, Fault):
        raise NonFiniteError(result.problem)
    if scale is not None:
        restore_loss_scale(engine, scale)
    link_optimizer_states(engine)
    return result
