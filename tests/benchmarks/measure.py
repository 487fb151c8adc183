"""What the benchmarks share: their options, clocks, and sides that are timed in turn on one machine."""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))


def parser_of(doc: str, **defaults: int) -> argparse.ArgumentParser:
    """A parser whose help is the file's docstring, with whole-number options such as batch=4 for `--batch`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"default {value}")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    """--threads, --device and --clock."""
    parser.add_argument("--threads", type=int, default=1, help="one core a rank, as in training")
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: CPU seconds, for a busy machine")


class Stopwatch:
    """Times calls on one device, by the clock that was asked for."""

    def __init__(self, args: argparse.Namespace):
        import torch

        torch.set_num_threads(args.threads)
        torch.manual_seed(0)
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.threads, self.by_cpu = args.threads, args.clock == "cpu"
        self.synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        name = self.device.type if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        self.where = f"{args.threads} thread(s), torch {torch.__version__}, {name}"

    def seconds(self, call: Callable[[], object]) -> float:
        clock = time.process_time if self.by_cpu else time.perf_counter
        self.synchronize()
        start = clock()
        call()
        self.synchronize()
        return (clock() - start) / (self.threads if self.by_cpu else 1)

    def in_turn(self, calls: Sequence[Callable[[], object]], rounds: int, warm_up: int = 1, keep=min) -> list[float]:
        """Seconds of each call, `keep` of the rounds (min, or statistics.median), after rounds that do not count."""
        times = [[self.seconds(call) for call in calls] for _ in range(warm_up + rounds)]
        return [keep(column) for column in zip(*times[warm_up:])]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, CPU seconds of this process and of the children that have ended)."""
    wall, cpu = time.perf_counter(), processor_seconds()
    run()
    return time.perf_counter() - wall, processor_seconds() - cpu


def processor_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def sides_in_turn(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """`timed` of each side, once a round: a busy machine slows all of them."""
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            found[side].append(timed(run))
    return found


def ratio(theirs: list[tuple[float, float]], ours: list[tuple[float, float]]) -> tuple[float, float]:
    """How many times as fast ours is, on the clock and by processor time: medians of the rounds."""
    wall, cpu = (statistics.median(a[kind] / b[kind] for a, b in zip(theirs, ours)) for kind in (0, 1))
    return wall, cpu
