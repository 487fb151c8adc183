"""What a process knows of the others: rank, world size, and four small collectives.

Contract: works with one process and no process group. The group itself is opened by training/engine.py (DeepSpeed).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from minillm.utils.errors import UserError
from minillm.utils.threads import num_cores, threads_of_user

T = TypeVar("T")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Ranks on this machine."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):  # torchrun's, DeepSpeed's, a single machine's
        if name in os.environ:
            return int(os.environ[name])
    return 1


def threads_of_rank() -> int:
    """The most threads a rank computes with on a CPU: the user's word, else an even share of the machine's cores."""
    return threads_of_user() or max(1, num_cores() // local_world_size())


def default_device() -> torch.device:
    """This rank's: a GPU where there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0 if _has_one_of_slurms_gpus() else local_rank())


def _has_one_of_slurms_gpus() -> bool:
    """Whether Slurm has given this task a GPU of its own (srun --gpus-per-task=1, --gpu-bind=...).

    Such a task sees one device, number 0, whatever its place on the machine. Slurm says so in variables of the step
    (srun's manual page, output environment variables); a launcher within the step has other LOCAL_RANKs.
    """
    bound = any(os.environ.get(name) for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU"))
    bound = bound or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")
    return bound and torch.cuda.device_count() == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank())


def check_device() -> torch.device:
    """`default_device`, which is there.

    Raises:
        UserError: this machine has GPUs, and fewer than ranks.
    """
    device = default_device()
    if device.type == "cuda" and device.index >= (count := torch.cuda.device_count()):
        raise UserError(
            f"rank {rank()} is number {local_rank()} (from 0) on its machine and sees {count} GPU(s): a rank needs one "
            f"of its own. Start {count} rank(s) a machine (deepspeed --num_gpus {count}), or train on CPUs with "
            f"DS_ACCELERATOR=cpu"
        )
    return device


def reduce_sum(values: list[float]) -> list[float]:
    """Element-wise sum over the ranks, in float64 (exact for counts below 2^53)."""
    tensor = torch.tensor(values, dtype=torch.float64, device=default_device())
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor.tolist()


def reduce_max(values: list[float]) -> list[float]:
    """Element-wise maximum over the ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=default_device())
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def broadcast_object(value: object) -> object:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: object) -> list[object]:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    box: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def on_rank_zero(action: Callable[[], T]) -> T | None:
    """Run `action` on rank 0 and wait for it on the others.

    Returns:
        What it returned on rank 0, None elsewhere.

    Raises:
        UserError: on every rank, when it raised a UserError or an OSError on rank 0; nobody is left waiting.
    """
    result, problem = None, None
    if rank() == 0:
        try:
            result = action()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error}; mend that and run again"
    problem = broadcast_object(problem)
    if problem is not None:
        raise UserError(problem)
    return result


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
