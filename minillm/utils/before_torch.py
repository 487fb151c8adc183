"""What has to be in the environment before torch is loaded, in every process that trains.

Contract: stdlib only. What the user has set stays.
"""

from __future__ import annotations

import os

from minillm.utils.threads import set_wait_policy

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def prepare_environment() -> None:
    """Called by entry points before their first import of torch; child processes inherit it."""
    set_wait_policy()
    hide_gpus_from_cpu_runs()
    let_memory_grow()


def let_memory_grow() -> None:
    """CUDA's allocator extends its segments in place of adding new ones beside those that are too small by now.

    Rows of varying length, and experts' shares, ask for other sizes at every step, and the pieces in between would be
    lost. The second name is that of earlier versions of PyTorch; a user's word under either stays.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def hide_gpus_from_cpu_runs() -> None:
    """DS_ACCELERATOR=cpu, DeepSpeed's own word, means the CPU to torch as well.

    An empty CUDA_VISIBLE_DEVICES cannot say it: DeepSpeed's launcher writes the ranks' numbers there, on CPUs too.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
