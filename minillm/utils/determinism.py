"""Whether two equal runs on a GPU end with the same bits.

Contract: CPUs repeat by themselves and are left alone. On CUDA the backward passes of the attention kernels, and of the
embedding in a compiled model, add gradients up in the order in which threads happen to come; PyTorch has slower kernels
that do not (https://docs.pytorch.org/docs/stable/notes/randomness.html).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from minillm.utils import distributed

# cuBLAS reads it when its first handle is made; eight buffers of 4 MiB are one of the two settings that repeat.
CUBLAS_VARIABLE, CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Within the block PyTorch takes kernels that repeat to the last bit; afterwards it is as it was.

    Args:
        wanted: False leaves everything alone, and so does a rank without a GPU.

    Raises:
        RuntimeError: within the block, by an operation that has no such kernel; PyTorch's message names it.
    """
    if not wanted or distributed.default_device().type != "cuda":
        yield
        return
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    own_variable = CUBLAS_VARIABLE not in os.environ
    os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    # Filling new memory with nan finds reads of what was never written, and costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills
        if own_variable:
            del os.environ[CUBLAS_VARIABLE]
