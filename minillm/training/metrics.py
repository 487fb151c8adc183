"""One definition of tokens/s, MFU and time left, and the progress line made of them."""

from __future__ import annotations

import functools
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from minillm.planning.devices import datasheet_flops
from minillm.training.state import TrainState
from minillm.training.step import StepResult
from minillm.utils import distributed


@functools.cache
def measure_matmul_flops(dtype: torch.dtype, repeats: int = 6) -> float:
    """FLOP/s of a square matrix product on this rank's device, all ranks at once (CPU ranks share the cores).

    It is measured once in a process: a run that rolls back builds its trainer again on the same machine.
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


PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def peak_flops(dtype: torch.dtype) -> tuple[float, str]:
    """Peak FLOP/s of all ranks together for products of `dtype`, and where the number is from: the card's datasheet, or
    a product of that type measured now."""
    device = distributed.default_device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = datasheet_flops(name, PRECISIONS[dtype])
        if known is not None:
            return known * distributed.world_size(), f"{name} datasheet, {PRECISIONS[dtype]}"
    (total,) = distributed.reduce_sum([measure_matmul_flops(dtype)])
    return total, f"measured matrix product, {PRECISIONS[dtype]}"


SECONDS_BETWEEN_LINES = 5.0
RECENT = 60.0  # seconds of steps that the progress line speaks of


@dataclass
class Meter:
    """Speed, counting only time inside steps (not validation, samples or saves).

    tokens_per_s counts target tokens. MFU counts every token of a document that the model computes, prompts included
    and padding left out: of a conversation both questions and answers cost arithmetic, though answers alone are
    targets. `flops_per_token` is that of a sequence of full length.

    `read` is the speed since it was last called, for metrics.jsonl. `recent` and `seconds_left`, for the person who
    reads the progress line, are of the last minute of steps: a machine that becomes busy is told of within a minute.
    """

    flops_per_token: float
    peak: float
    max_steps: int
    clock: Callable[[], float] = time.perf_counter
    recent_seconds: deque[float] = field(default_factory=deque)  # of each step of the last minute, the newest last
    _recent_tokens: deque[tuple[int, int]] = field(default_factory=deque)  # targets, computed
    _recent_sums: tuple[float, int, int] = (0.0, 0, 0)
    _sums: tuple[float, int, int] = (0.0, 0, 0)  # seconds, targets, computed since the last `read`
    _started: float = 0.0
    _last_line: float = -math.inf

    def start_step(self) -> None:
        self._started = self.clock()

    def end_step(self, targets: int, computed: int) -> float:
        """Seconds of the step; `targets` and `computed` are tokens of the global batch."""
        seconds = self.clock() - self._started
        self._sums = self._sums[0] + seconds, self._sums[1] + targets, self._sums[2] + computed
        self._remember(seconds, targets, computed)
        return seconds

    def _remember(self, seconds: float, targets: int, computed: int) -> None:
        """As the newest step of the last minute; what is older goes."""
        self.recent_seconds.append(seconds)
        self._recent_tokens.append((targets, computed))
        total = self._recent_sums[0] + seconds
        counts = self._recent_sums[1] + targets, self._recent_sums[2] + computed
        while total - self.recent_seconds[0] >= RECENT:
            total -= self.recent_seconds.popleft()
            oldest = self._recent_tokens.popleft()
            counts = counts[0] - oldest[0], counts[1] - oldest[1]
        self._recent_sums = total, *counts

    def read(self) -> dict[str, float]:
        sums, self._sums = self._sums, (0.0, 0, 0)
        return self._speed(*sums)

    def recent(self) -> dict[str, float]:
        """The same of the last minute."""
        return self._speed(*self._recent_sums)

    def _speed(self, seconds: float, targets: int, computed: int) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        mfu = computed / seconds * self.flops_per_token / self.peak
        return {"tokens_per_s": round(targets / seconds, 1), "mfu": round(mfu, 4)}

    def line_is_due(self, step: int) -> bool:
        """The first step, the last, and one every SECONDS_BETWEEN_LINES: as much as a person reads."""
        now = self.clock()
        if step < self.max_steps and now - self._last_line < SECONDS_BETWEEN_LINES:
            return False
        self._last_line = now
        return True

    def seconds_left(self, step: int) -> float:
        """Steps left at the mean speed of the last minute."""
        return (self.max_steps - step) * self._recent_sums[0] / max(1, len(self.recent_seconds))


def format_seconds(seconds: float) -> str:
    hours, rest = divmod(int(round(seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def step_record(result: StepResult, lr: float, state: TrainState, meter: Meter) -> dict[str, float]:
    """What metrics.jsonl says of a step."""
    record = {"loss": result.loss, "lr": lr, "grad_norm": result.grad_norm, "tokens": state.tokens}
    record |= {**result.auxiliary, **meter.read()}
    return record | ({"bad_rows": state.bad_rows} if state.bad_rows else {})


def progress_line(record: dict[str, float], state: TrainState, meter: Meter) -> str:
    """One line that lines up under the last one, in a terminal and in a log file."""
    width = len(str(meter.max_steps))
    speed = meter.recent()
    return (
        f"step {state.step:{width}d}/{meter.max_steps}  loss {record['loss']:7.4f}  lr {record['lr']:.2e}  "
        f"grad {record['grad_norm']:6.2f}  {speed['tokens_per_s']:>9,.0f} tok/s  mfu {speed['mfu']:4.0%}  "
        f"left {format_seconds(meter.seconds_left(state.step))}"
    )


def last_line(state: TrainState) -> str:
    """What a run came to."""
    before = f"{state.first_val_loss:.4f} -> " if state.first_val_loss is not None else ""
    loss = f", validation loss {before}{state.val_loss:.4f}" if state.val_loss is not None else ""
    return f"{state.step} steps, {state.tokens:,} tokens in {format_seconds(state.train_seconds)}{loss}"
