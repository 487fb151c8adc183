"""How OpenMP's threads wait, and how many of them a rank may use.

Contract: stdlib only, because `set_wait_policy` must run before torch loads OpenMP's runtime, which reads the
environment once. By default its threads spin at the end of every parallel region; beside another busy process they
burn the very cores that the thread they wait for needs, and training falls to a tenth of its speed.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

# GNU's runtime (torch's Linux wheels), the standard's variable, and Intel's and LLVM's runtime
WAIT_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
# Short waits, of a fraction of a millisecond as between two operators, are worth spinning for: a sleeping thread wakes
# late (tests/benchmarks/bench_busy.py compares counts). Longer ones are not. GNU's runtime obeys the count, the others
# the policy.
WAIT_POLICY = {"GOMP_SPINCOUNT": "10000", "OMP_WAIT_POLICY": "passive"}


def set_wait_policy() -> None:
    """Let threads that wait long give their core away, here and in child processes, unless the user chose otherwise."""
    if not any(name in os.environ for name in WAIT_VARIABLES):
        os.environ.update(WAIT_POLICY)


def threads_of_user() -> int | None:
    """The number of threads a process that OMP_NUM_THREADS asks for; None where the user did not ask.

    torchrun sets it to 1 where nobody did and there are several ranks, so that a 1 is nobody's choice there.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if not asked.isdecimal() or int(asked) == 0:
        return None
    by_torchrun = asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("LOCAL_WORLD_SIZE") != "1"
    return None if by_torchrun else int(asked)


def num_cores() -> int:
    """Cores this process may keep busy: those it may run on, or the share of them its control group is given."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _cores_of_group())))


def _cores_of_group(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The least quota (cores; infinite where there is none) of the control groups around this process."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:  # not Linux
        return math.inf
    least = math.inf
    for _, controllers, path in lines:
        if controllers and "cpu" not in controllers.split(","):
            continue
        for base in (root / controllers, root / "cpu") if controllers else (root,):
            group = base / path.lstrip("/")
            for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(base))):
                least = min(least, _quota(folder))
    return least


def _quota(group: Path) -> float:
    """Cores that one control group may use: version 2 keeps both numbers in one file, version 1 one in each."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = " ".join((group / name).read_text().strip() for name in names).split()
            return int(quota) / int(period) if int(quota) > 0 else math.inf
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return math.inf
