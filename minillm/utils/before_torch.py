"""What has to be in the environment before torch is loaded, in every process that trains.

Contract: stdlib only. What the user has set stays.
"""

from __future__ import annotations

import os

from minillm.utils.threads import set_wait_policy


def prepare_environment() -> None:
    """Called by entry points before their first import of torch; child processes inherit it."""
    set_wait_policy()
    hide_gpus_from_cpu_runs()


def hide_gpus_from_cpu_runs() -> None:
    """DS_ACCELERATOR=cpu, DeepSpeed's own word, means the CPU to torch as well.

    An empty CUDA_VISIBLE_DEVICES cannot say it: DeepSpeed's launcher writes the ranks' numbers there, on CPUs too.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
