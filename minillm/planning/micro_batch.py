"""The micro-batch that fills a GPU, by plan.

Contract: no torch.
"""

from __future__ import annotations

from typing import Any

from minillm.planning.step import Setup, largest_micro_batch
from minillm.settings.architecture import Architecture
from minillm.settings.run import RunConfig

MOST_ROWS = 64  # more sequences at a time fill a GPU no better
FILLED = 0.9


def fill_gpu(
    run: RunConfig, arch: Architecture, resolved: dict[str, Any], world_size: int, capacity: int | None
) -> None:
    """Set the largest micro-batch that a GPU holds by plan, up to MOST_ROWS sequences, in both configurations.

    The batches stay the same; a GPU that is given few sequences at a time waits for its launches.

    Args:
        resolved: DeepSpeed's configuration, with a micro-batch that divides.
        capacity: of one GPU, bytes; a tenth is left to what the plan does not know. None: nothing is changed.
    """
    if capacity is None:
        return
    setup = Setup.of(run, arch, resolved, world_size)
    most = min(MOST_ROWS, largest_micro_batch(setup, FILLED * capacity))
    micro = max((m for m in range(1, most + 1) if setup.batch % (m * world_size) == 0), default=1)
    run.train.train_micro_batch_size_per_gpu = resolved["train_micro_batch_size_per_gpu"] = micro
    resolved["gradient_accumulation_steps"] = setup.batch // (micro * world_size)
