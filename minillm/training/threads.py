"""How many threads each rank computes with on a CPU: measured, written down, and followed again on resume.

Contract: another number of threads adds up in another order, which changes the last bits of a run. So
`threads.json` of the run folder says which number holds from which step on, before that step is taken; a start that
comes to steps already done takes them with the same numbers, to the bit as before, and measures only past the last
entry. OMP_NUM_THREADS is the user's word and ends all measuring. Every rank uses the same number. On a GPU none of
this happens.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from minillm.models.linear import should_widen
from minillm.run_folder import RunFolder
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_json
from minillm.utils.logging import say
from minillm.utils.threads import threads_of_user

SECONDS_BETWEEN_MEASUREMENTS = 60.0
MUCH_SLOWER = 1.5  # times the best pace since the last measurement: the machine is not what it was
GAIN = 1.15  # by which fewer threads must be faster than the most; with less, chance would choose on a quiet machine
STEPS_OF_PACE = 5  # a pace is the median of so many steps


@dataclass(frozen=True)
class Change:
    """After `step` steps, and with so many ranks, each rank computes with `threads` threads."""

    step: int
    ranks: int
    threads: int


class ThreadCount:
    """The number of threads over the steps of a run. Every rank makes the same calls and gets the same numbers.

    Args:
        step: steps done so far.
        measure: seconds that the same work takes with each of these numbers of threads, on this rank.
        clock: seconds.

    Raises:
        UserError: threads.json is not what this wrote.
    """

    def __init__(
        self, folder: RunFolder, step: int, measure: Callable[[list[int]], list[float]],
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._path, self._measure, self._clock = folder.threads, measure, clock
        self._start_watching(step)
        self._changes: list[Change] = []
        if distributed.default_device().type != "cpu":
            self._numbers = []
            return
        most = -int(distributed.reduce_max([-distributed.threads_of_rank()])[0])
        asked = bool(distributed.reduce_max([threads_of_user() is not None])[0])
        self._numbers = [most] if asked else sorted({most, max(1, most - 1), max(1, most // 2)}, reverse=True)
        known = _read(self._path)
        fitting = range(most, most + 1) if asked else range(1, most + 1)
        done = [change for change in known if change.step <= step]
        self._changes = done
        if done and done[-1].ranks == distributed.world_size() and done[-1].threads in fitting:
            later = [change for change in known if change.step > step]
            if all(change.ranks == done[-1].ranks and change.threads in fitting for change in later):
                self._changes = known
            self._use(done[-1].threads)
        else:
            self._settle(step)

    def doubt(self, step: int, seconds: Sequence[float]) -> bool:
        """Whether this rank wants the number measured again before its next step.

        It does where steps have become much slower than they were, and while fewer threads than possible are in use;
        once a minute at most.

        Args:
            step: steps done so far.
            seconds: that the last steps took, the newest last.
        """
        if len(self._numbers) < 2 or step < max(self._measured_step, self._changes[-1].step) + STEPS_OF_PACE:
            return False
        pace = statistics.median(itertools.islice(reversed(seconds), STEPS_OF_PACE))
        self._best_pace = min(self._best_pace, pace)
        if self._clock() - self._measured_at < SECONDS_BETWEEN_MEASUREMENTS:
            return False
        return pace > MUCH_SLOWER * self._best_pace or self._changes[-1].threads < self._numbers[0]

    def begin_step(self, step: int, doubted: bool) -> None:
        """Use the number that belongs to the next step; `doubted` is what any rank's `doubt` said."""
        if doubted:
            self._settle(step)
        for change in self._changes:
            if change.step == step:
                self._use(change.threads)

    def _settle(self, step: int) -> None:
        """Measure where there is a choice, write the number down, and use it."""
        numbers, found = self._numbers, ""
        best = numbers[0]
        if len(numbers) > 1:
            seconds = distributed.reduce_max(self._measure(numbers))
            fastest = numbers[seconds.index(min(seconds))]
            best = fastest if min(seconds) * GAIN < seconds[0] else numbers[0]
            listed = ", ".join(f"{number}: {1e3 * each:.2f}" for number, each in zip(numbers, seconds, strict=True))
            found = f" (milliseconds of the same products by threads, {listed})"
        self._start_watching(step)
        now = Change(step, distributed.world_size(), best)
        before = self._changes[-1] if self._changes else None
        if before is None or (before.ranks, before.threads) != (now.ranks, best):
            self._changes = [change for change in self._changes if change.step < step] + [now]
            entries = [asdict(change) for change in self._changes]
            distributed.on_rank_zero(lambda: write_json(self._path, entries))
            say(f"threads: {best} a rank from step {step + 1} on{found}")
        self._use(best)

    def _start_watching(self, step: int) -> None:
        self._best_pace, self._measured_step, self._measured_at = math.inf, step, self._clock()

    @staticmethod
    def _use(number: int) -> None:
        if torch.get_num_threads() != number:
            torch.set_num_threads(number)


def _read(path: Path) -> list[Change]:
    """The entries of threads.json, none where it is not there."""
    entries = distributed.on_rank_zero(lambda: read_json(path) if path.exists() else [])
    entries = distributed.broadcast_object(entries)
    try:
        changes = [Change(**{key: int(value) for key, value in entry.items()}) for entry in entries]
        if any(change.step < 0 or change.ranks < 1 or change.threads < 1 for change in changes):
            raise ValueError(f"{entries}")
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}): it must be a list of {{step, ranks, threads}}; move it away, and the number "
            f"of threads is measured again"
        ) from error
    return sorted(changes, key=lambda change: change.step)


ROUNDS = 5
SECONDS_OF_SAMPLE = 0.03  # several slices of a scheduler
WIDEST, MOST_OPERATIONS = (1024, 4096), 1e9  # of one piece of work, so that it is short for wide models too


def product_seconds(rows: int, hidden_size: int, intermediate_size: int, dtype: torch.dtype):
    """What ThreadCount measures by: an MLP's products, forward and backward, on data of their own.

    Args:
        rows: tokens of a micro-batch.

    Returns:
        A function from numbers of threads to the median seconds of one such MLP with each. All ranks work at once, as
        in a step, and the numbers take turns, so that what comes and goes meanwhile meets all of them.
    """
    hidden_size, intermediate_size = min(hidden_size, WIDEST[0]), min(intermediate_size, WIDEST[1])
    rows = max(1, min(rows, int(MOST_OPERATIONS / (12 * hidden_size * intermediate_size))))

    def seconds_with(numbers: list[int]) -> list[float]:
        own = torch.Generator().manual_seed(0)  # the run's generators belong to the run
        x, up, down = (
            torch.randn(*shape, generator=own).to(dtype).requires_grad_()
            for shape in ((rows, hidden_size), (intermediate_size, hidden_size), (hidden_size, intermediate_size))
        )
        if should_widen(x):
            x, up, down = (tensor.detach().float().requires_grad_() for tensor in (x, up, down))

        def work() -> float:
            start = time.perf_counter()
            torch.autograd.grad(F.linear(F.silu(F.linear(x, up)), down).sum(), (x, up, down))
            return time.perf_counter() - start

        before = torch.get_num_threads()
        found: dict[int, list[float]] = {number: [] for number in numbers}
        for _ in range(ROUNDS):
            for number in numbers:
                torch.set_num_threads(number)
                work()  # wakes the threads
                distributed.barrier()
                sample = [work()]
                while sum(sample) < SECONDS_OF_SAMPLE:
                    sample.append(work())
                found[number].append(statistics.mean(sample))
        torch.set_num_threads(before)
        return [statistics.median(found[number]) for number in numbers]

    return seconds_with
