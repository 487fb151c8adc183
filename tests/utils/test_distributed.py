"""Which device is a rank's, on machines that are not here: torch is told of their GPUs."""

from __future__ import annotations

import pytest
import torch

from minillm.training.engine import process_group
from minillm.utils import distributed
from minillm.utils.errors import UserError

SLURM = ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_NTASKS_PER_GPU", "SLURM_TRES_PER_TASK", "SLURM_LOCALID")


@pytest.fixture
def rank_three(monkeypatch):
    """A function that puts this process at place 3 of a machine, beside so many GPUs."""
    for name in SLURM:
        monkeypatch.delenv(name, raising=False)

    def place(num_gpus: int, **variables: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
        for name, value in {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", **variables}.items():
            monkeypatch.setenv(name, value)

    return place


def test_a_gpu_for_each_rank(rank_three):
    rank_three(8)
    assert distributed.check_device() == torch.device("cuda", 3)
    rank_three(0)
    assert distributed.check_device() == torch.device("cpu")


@pytest.mark.parametrize("num_gpus", [1, 3])
def test_more_ranks_than_gpus_are_refused_by_name(rank_three, num_gpus):
    rank_three(num_gpus)
    message = rf"rank 11 is number 3 .* sees {num_gpus} GPU.*--num_gpus {num_gpus}.*DS_ACCELERATOR=cpu"
    with pytest.raises(UserError, match=message), process_group():
        pass


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_GPUS_PER_TASK": "1"},
        {"SLURM_GPU_BIND": "single:1"},
        {"SLURM_NTASKS_PER_GPU": "1"},
        {"SLURM_TRES_PER_TASK": "cpu=4,gres/gpu=1"},
    ],
)
def test_a_task_that_slurm_gave_a_gpu_of_its_own_takes_it(rank_three, variables):
    """The variables are those of srun's manual page."""
    rank_three(1, SLURM_LOCALID="3", **variables)
    assert distributed.check_device() == torch.device("cuda", 0)
    # DeepSpeed's launcher in such a task: its four ranks would share the one GPU.
    rank_three(1, SLURM_LOCALID="0", **variables)
    with pytest.raises(UserError, match="sees 1 GPU"):
        distributed.check_device()


def test_a_task_that_sees_all_gpus_of_its_node_takes_its_own(rank_three):
    rank_three(8, SLURM_LOCALID="3", SLURM_TRES_PER_TASK="cpu=4")
    assert distributed.check_device() == torch.device("cuda", 3)
