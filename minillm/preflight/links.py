"""Communication before a run: an all-reduce, and every pair of ranks on its own, with the contents checked.

Contract: `probe` runs in a child of every rank (child.py) and names each call before it is made, so that one
that hangs is known by pair and call.
"""

from __future__ import annotations

import os
import statistics
import time
from datetime import timedelta
from itertools import combinations

import torch
import torch.distributed as dist

from minillm.preflight.child import SECONDS_TO_START, Report
from minillm.preflight.ranks import open_store
from minillm.utils import distributed

KIB, MIB = 2**10, 2**20
ALL_REDUCE_BYTES = {"cpu": (1 * MIB, 16 * MIB), "cuda": (1 * MIB, 64 * MIB)}
PAIR_BYTES = {"cpu": (4 * KIB, 1 * MIB, 16 * MIB), "cuda": (4 * KIB, 1 * MIB, 64 * MIB)}
WARM_UPS, REPEATS = 2, 5


def probe(report: Report, attempt: str) -> dict[str, object]:
    """Measure; every rank's child calls this at once.

    Args:
        attempt: another name each time, since the store keeps the keys of earlier process groups.

    Returns:
        `all_reduce`: GB/s of the bus; `pairs`: {"0-1": {"gbps", "latency_us"}} of the pairs this rank leads.

    Raises:
        ValueError: something else arrived than was sent.
    """
    rank, size, device = distributed.rank(), distributed.world_size(), distributed.default_device()
    store = open_store(attempt, 3600)
    store.set(f"up/{rank}", "")
    report.stage("waiting for every rank's process", at_least=SECONDS_TO_START)
    store.wait([f"up/{other}" for other in range(size)], timedelta(hours=1))
    report.stage("joining the process group")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # Waiting is the parent's business, which knows where this stands.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=timedelta(hours=1),
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    found = {"all_reduce": all_reduce_speed(report, device), "pairs": {}}
    report.note("all_reduce", found["all_reduce"])
    for low, high in combinations(range(size), 2):
        name = f"{low}-{high}"
        if rank in (low, high):
            speeds = pair_speed(report, device, low, high)
            if rank == low:
                found["pairs"][name] = speeds
                report.note("pairs", found["pairs"])
            store.set(f"done/{name}/{rank}", "")
        report.stage(f"waiting for pair {name}")
        store.wait([f"done/{name}/{low}", f"done/{name}/{high}"], timedelta(hours=1))
    report.stage("leaving the process group")
    dist.destroy_process_group()
    return found


def all_reduce_speed(report: Report, device: torch.device) -> float:
    """GB/s of the bus for the largest size: 2 (n - 1) / n x bytes / seconds (nccl-tests, PERFORMANCE.md)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    speed = 0.0
    for num_bytes in ALL_REDUCE_BYTES[device.type]:
        report.stage(f"all-reduce of {num_bytes // KIB} KiB")
        tensor = torch.full((num_bytes // 4,), float(rank + 1), device=device)
        dist.all_reduce(tensor)
        expected = size * (size + 1) / 2
        if not bool((tensor == expected).all()):
            raise ValueError(f"an all-reduce of {num_bytes // KIB} KiB gave {tensor.unique()[:4].tolist()}, "
                             f"not {expected}")  # fmt: skip
        tensor.zero_()
        seconds = _seconds(device, lambda: dist.all_reduce(tensor))  # noqa: B023
        speed = 2 * (size - 1) / size * num_bytes / seconds / 1e9
    return speed


def pair_speed(report: Report, device: torch.device, low: int, high: int) -> dict[str, float]:
    """There and back between two ranks: GB/s one way at the largest size, microseconds one way at the smallest."""
    rank, peer = dist.get_rank(), high if dist.get_rank() == low else low
    times = []
    for num_bytes in PAIR_BYTES[device.type]:
        pattern = torch.arange(251, dtype=torch.uint8, device=device).repeat(num_bytes // 251 + 1)[:num_bytes]
        buffer = torch.zeros_like(pattern)

        def there_and_back(size: int = num_bytes, pattern=pattern, buffer=buffer, say: bool = False) -> None:
            for call in ("send", "recv") if rank == low else ("recv", "send"):
                if say:
                    side = f"to rank {peer}" if call == "send" else f"from rank {peer}"
                    report.stage(f"pair {low}-{high}: {call} of {size // KIB} KiB {side}")
                dist.send(pattern if rank == low else buffer, peer) if call == "send" else dist.recv(buffer, peer)
                if device.type == "cuda":
                    torch.cuda.synchronize()

        there_and_back(say=True)
        if not torch.equal(buffer, pattern):
            wrong = int((buffer != pattern).sum())
            raise ValueError(f"pair {low}-{high}: {wrong} of {num_bytes} bytes arrived as others than were sent")
        report.stage(f"pair {low}-{high}: timing {num_bytes // KIB} KiB there and back")
        times.append(_seconds(device, there_and_back) / 2)
    return {"gbps": PAIR_BYTES[device.type][-1] / times[-1] / 1e9, "latency_us": times[0] * 1e6}


def _seconds(device: torch.device, action) -> float:
    """The median of REPEATS, after WARM_UPS."""
    times = []
    for _ in range(WARM_UPS + REPEATS):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UPS:])
