"""One definition of tokens/s, MFU and time left, and the progress line made of them."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass, field

import torch

from minillm.training.devices import DATASHEET_FLOPS
from minillm.training.state import TrainState
from minillm.utils import distributed


def measure_matmul_flops(dtype: torch.dtype, repeats: int = 6) -> float:
    """FLOP/s of a square matrix product on this rank's device, all ranks at once (CPU ranks share the cores).

    On a CPU without bf16 instructions the model multiplies bf16 through fp32, so the better of the two is the peak.
    """
    device = distributed.default_device()
    size = 8192 if device.type == "cuda" else 1024
    best = 0.0
    for kind in (dtype,) if device.type == "cuda" else {dtype, torch.float32}:
        own = torch.Generator(device).manual_seed(0)  # the run's generators are restored or fresh: leave them alone
        a, b = (torch.randn(size, size, dtype=kind, device=device, generator=own) for _ in range(2))
        distributed.barrier()
        best = max(best, 2 * size**3 / min(_seconds_of_product(a, b) for _ in range(repeats)))
    return best


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    a @ b
    if a.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_flops(dtype: torch.dtype) -> tuple[float, str]:
    """Peak of all ranks together, and where the number is from."""
    device = distributed.default_device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = next((value for key, value in DATASHEET_FLOPS.items() if re.search(rf"\b{key}\b", name)), None)
        if known is not None:
            return known * distributed.world_size(), f"{name} datasheet"
    (total,) = distributed.reduce_sum([measure_matmul_flops(dtype)])
    return total, "measured matrix product"


SECONDS_BETWEEN_LINES = 5.0


@dataclass
class Meter:
    """Speed since the last `read`, counting only time inside steps (not validation, samples or saves)."""

    flops_per_token: float
    peak: float
    max_steps: int
    _seconds: float = 0.0
    _tokens: int = 0
    _steps: int = 0
    _total_seconds: float = 0.0
    _total_steps: int = 0
    _started: float = field(default_factory=time.perf_counter)
    _last_line: float = -math.inf

    def start_step(self) -> None:
        self._started = time.perf_counter()

    def end_step(self, tokens: int) -> float:
        seconds = time.perf_counter() - self._started
        self._seconds += seconds
        self._total_seconds += seconds
        self._tokens += tokens
        self._steps += 1
        self._total_steps += 1
        return seconds

    def read(self) -> dict[str, float]:
        rate = self._tokens / max(self._seconds, 1e-9)
        self._seconds, self._tokens, self._steps = 0.0, 0, 0
        return {"tokens_per_s": round(rate, 1), "mfu": round(rate * self.flops_per_token / self.peak, 4)}

    def line_is_due(self, step: int) -> bool:
        """The first step, the last, and one every SECONDS_BETWEEN_LINES: as much as a person reads."""
        now = time.perf_counter()
        if step < self.max_steps and now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def seconds_left(self, step: int) -> float:
        """Steps left at the mean speed of this start."""
        return (self.max_steps - step) * self._total_seconds / max(1, self._total_steps)


def format_seconds(seconds: float) -> str:
    hours, rest = divmod(int(round(seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def progress_line(record: dict[str, float], state: TrainState, meter: Meter) -> str:
    """One line that lines up under the last one, in a terminal and in a log file."""
    width = len(str(meter.max_steps))
    return (
        f"step {state.step:{width}d}/{meter.max_steps}  loss {record['loss']:7.4f}  lr {record['lr']:.2e}  "
        f"grad {record['grad_norm']:6.2f}  {record['tokens_per_s']:>9,.0f} tok/s  mfu {record['mfu']:4.0%}  "
        f"left {format_seconds(meter.seconds_left(state.step))}"
    )
