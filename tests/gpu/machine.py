"""What this machine's first GPU is, and two ceilings measured on it: a bf16 product and a copy in its memory."""

from __future__ import annotations

import importlib.metadata
import json
import statistics

import torch

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "fla-core")


def seconds_of(action, repeats: int = 10) -> float:
    """Median, by the device's own clock."""
    times = []
    for number in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def main() -> None:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, object] = {"versions": {**versions, "cuda": torch.version.cuda}}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        size = 8192
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        source = torch.empty(2**28, device="cuda", dtype=torch.float32).normal_()  # 1 GiB, far above any cache
        target = torch.empty_like(source)
        found |= {
            "card": torch.cuda.get_device_name(0),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "memory_bytes": properties.total_memory,
            "gpus": torch.cuda.device_count(),
            "product_flops": {"bf16": 2 * size**3 / seconds_of(lambda: a @ b)},
            "copy_bytes_per_s": 2 * source.nbytes / seconds_of(lambda: target.copy_(source)),
        }
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
