"""What a process may know of its machine's GPUs before torch is imported.

Contract: stdlib only; nothing is started on a GPU. Whoever is asked answers None where it cannot be told.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

QUERY = ("nvidia-smi", "--query-gpu=memory.total,mig.mode.current", "--format=csv,noheader,nounits")
SECONDS = 30  # a driver without persistence mode wakes its cards first


def smallest_gpu_memory() -> int | None:
    """Bytes of the smallest GPU that a rank of this process's environment may get; None where it computes on the CPU.

    None too for a card in slices (MIG), whose parts nvidia-smi does not show here.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "" or os.environ.get("DS_ACCELERATOR") == "cpu" or not torch_uses_cuda():
        return None
    if shutil.which(QUERY[0]) is None:
        return None
    only = [f"--id={visible}"] if visible else []
    try:
        done = subprocess.run([*QUERY, *only], capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [row.split(", ") for row in done.stdout.splitlines()]
    if done.returncode or not rows or not all(len(row) == 2 and row[0].isdecimal() for row in rows):
        return None
    if any(mig == "Enabled" for _, mig in rows):
        return None
    return min(int(size) for size, _ in rows) * 2**20  # nvidia-smi counts in MiB


def torch_uses_cuda() -> bool:
    """False for PyTorch's CPU builds, which its version tells."""
    try:
        return not version("torch").endswith("+cpu")
    except PackageNotFoundError:
        return False
