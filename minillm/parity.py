"""Does the DeepSpeed engine compute what plain torch computes, on this machine? A table; exit code 1 where it does not.

python -m minillm.parity [--ranks N] [--only WORD ...] [--list]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from minillm.compat.versions import TRAINING, check_environment
from minillm.utils.before_torch import prepare_environment
from minillm.utils.commands import command_name
from minillm.utils.errors import exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=command_name("minillm.parity"),
        description="Compare one optimizer step of the DeepSpeed engine with plain torch: every gradient, the norm, "
        "every updated weight; toys of every kind of model, ZeRO stage, precision and expert backend."
    )
    parser.add_argument("--ranks", type=int, metavar="N", help="default: the GPUs of this machine, 2 without")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="cases whose text has all of these")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    arguments = parser.parse_args()
    if arguments.ranks is not None and arguments.ranks < 1:
        parser.error(f"--ranks {arguments.ranks}: it must be 1 or more")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    prepare_environment()
    with exit_on_user_error():
        check_environment(TRAINING)
    import torch

    ranks = arguments.ranks or torch.cuda.device_count() or 2
    if "RANK" not in os.environ and not arguments.list:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return subprocess.call([sys.executable, *launcher, "-m", "minillm.parity", *sys.argv[1:]])
    from minillm.training.engine import process_group
    from minillm.training.gradient_parity import legal_cases

    def chosen(world_size: int) -> list:
        return [case for case in legal_cases(world_size) if all(word in str(case) for word in arguments.only)]

    if arguments.list:
        print(*chosen(ranks), sep="\n")
        return 0
    with exit_on_user_error(), process_group():
        return compare(chosen(int(os.environ["WORLD_SIZE"])))


ROW = "{:>9s}  {:>9s}  {:>9s}  {:<78s}{}"


def compare(cases: list) -> int:
    """Run the cases and print the table; the exit code."""
    from minillm.training.gradient_parity import TOLERANCE, run_case
    from minillm.utils.logging import say

    start, failed = time.perf_counter(), 0
    say(f"{len(cases)} cases; tolerance fp32 {TOLERANCE['fp32']:g}, bf16 {TOLERANCE['bf16']:g}, of the largest entry")
    say(ROW.format("gradient", "weight", "norm", "case", ""))
    worst = {name: 0.0 for name in TOLERANCE}
    for case in cases:
        result = run_case(case)
        good = result.within(TOLERANCE[case.precision])
        failed += not good
        error, name = result.worst()
        worst[case.precision] = error if error != error else max(worst[case.precision], error)  # nan stays
        figures = (f"{e:.1e}" for e in (result.gradient[0], result.weight[0], result.norm))
        say(ROW.format(*figures, str(case), "" if good else f"WRONG: {name}"))
    largest = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    say(f"{failed} of {len(cases)} cases wrong, largest errors {largest}, {time.perf_counter() - start:.0f} s")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main())
