"""What other work on the machine costs a run: the demo on the CPU, quiet and beside a busy process.

    python tests/benchmarks/bench_busy.py [--ranks 1 2] [--rounds 2] [--seconds 20] [--policies before now ...]

Every policy and number of ranks is a run of its own of launch/pretrain.py (demo, bf16, ZeRO-2, the built-in corpus).
While it trains, the machine is left quiet, then gets one neighbour after the other, again and again; a figure is the
median over the steps of its kind, in target tokens a second over all ranks. Policies are variables of the environment;
`now` sets none, and `before` is what libgomp does by itself. Runs take turns, `--rounds` times.
"""

from __future__ import annotations

import itertools
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import ROOT, parser_of

from minillm.utils.threads import WAIT_VARIABLES, num_cores
from tests.support.launching import TIMEOUT, command, environment, metrics

POLICIES = {
    "before": {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": "all"},
    "now": {},
    "passive": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "all"},
    "spin-1000": {"GOMP_SPINCOUNT": "1000", "OMP_NUM_THREADS": "all"},
    "spin-3000": {"GOMP_SPINCOUNT": "3000", "OMP_NUM_THREADS": "all"},
    "spin-10000": {"GOMP_SPINCOUNT": "10000", "OMP_NUM_THREADS": "all"},
    "spin-20000": {"GOMP_SPINCOUNT": "20000", "OMP_NUM_THREADS": "all"},
    "one-thread": {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"},
}
MATRIX = "import torch; torch.set_num_threads(2); a, b = torch.ones(1024, 256), torch.ones(256, 256)\nwhile True: a @ b"
NEIGHBOURS = {"quiet": None, "busy loop": "while True: pass", "2-thread products": MATRIX}
SETTLE = 2.0  # seconds of a phase that do not count


def main() -> None:
    parser = parser_of(__doc__, rounds=2, cycles=1)  # cycles of the phases in one run
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=20, help="of one phase")
    parser.add_argument("--policies", nargs="+", default=["before", "now"], choices=POLICIES)
    args = parser.parse_args()
    found: dict[tuple[int, str], dict[str, list[float]]] = {}
    for _, ranks, policy in itertools.product(range(args.rounds), args.ranks, args.policies):
        for name, speeds in measure(policy, ranks, args.seconds, args.cycles).items():
            found.setdefault((ranks, policy), {}).setdefault(name, []).extend(speeds)
    print(f"{'ranks':5s} {'policy':12s}" + "".join(f"{name:>28s}" for name in NEIGHBOURS))
    for ranks in args.ranks:
        quiet = statistics.median(found[ranks, args.policies[0]]["quiet"])
        for policy in args.policies:
            cells = (cell(found[ranks, policy][name], quiet) for name in NEIGHBOURS)
            print(f"{ranks:5d} {policy:12s}" + "".join(cells))
    print(f"tokens/s, its part of {args.policies[0]}'s quiet speed, steps that were measured")


def cell(speeds: list[float], quiet: float) -> str:
    if not speeds:
        return f"{'no step ended':>28s}"
    middle = statistics.median(speeds)
    return f"{f'{middle:,.0f} ({middle / quiet:.2f}, {len(speeds)})':>28s}"


def measure(policy: str, ranks: int, seconds: float, cycles: int) -> dict[str, list[float]]:
    """Tokens/s of the steps that began and ended beside each neighbour, in one run."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w") as log:
        settings = {"run_root": folder, "run_name": "busy", "train.max_steps": 100_000, "validation.every": 0,
                    "samples.every": 0, "checkpoint.every": 0, "log.every": 1, "log.wandb": "disabled",
                    "validation.max_sequences": 8}  # fmt: skip
        words = command("pretrain.py", ROOT / "ds_configs" / "zero2.json", settings, ranks)
        run = subprocess.Popen(words, cwd=ROOT, env=surroundings(policy, ranks), stdout=log, stderr=log,
                               start_new_session=True)  # fmt: skip
        try:
            deadline = time.monotonic() + TIMEOUT
            while len(metrics(Path(folder, "busy"))) < 10:
                if run.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(Path(folder, "log").read_text()[-3000:])
                time.sleep(0.2)
            phases = [(name, *beside(code, seconds, Path(folder, "busy"))) for _ in range(cycles)
                      for name, code in NEIGHBOURS.items()]  # fmt: skip
        finally:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        speeds = [record["tokens_per_s"] for record in metrics(Path(folder, "busy"))]
        told = [line for line in Path(folder, "log").read_text().splitlines() if "threads:" in line]
        print(f"{ranks} rank(s), {policy}: " + " | ".join(told), file=sys.stderr, flush=True)
    found: dict[str, list[float]] = {name: [] for name in NEIGHBOURS}
    for name, first, last in phases:
        found[name] += speeds[first:last]
    return found


def surroundings(policy: str, ranks: int) -> dict[str, str]:
    left = {k: v for k, v in environment().items() if k not in (*WAIT_VARIABLES, "OMP_NUM_THREADS")}
    share = str(max(1, num_cores() // ranks))
    return left | {name: share if value == "all" else value for name, value in POLICIES[policy].items()}


def beside(code: str | None, seconds: float, run_dir: Path) -> tuple[int, int]:
    """The steps (from, to) that were taken wholly beside this neighbour."""
    neighbour = None if code is None else subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(SETTLE + (5.0 if code == MATRIX else 0.0))  # torch loads
        first = len(metrics(run_dir)) + 1  # the one in flight began before
        time.sleep(seconds)
        return first, len(metrics(run_dir))
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


if __name__ == "__main__":
    main()
