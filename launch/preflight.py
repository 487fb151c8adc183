"""Checks before a run: devices, communication, disks, clocks, versions, and two steps of the real run.

deepspeed launch/preflight.py [--deepspeed ds_configs/zero2.json --config NAME|PATH] [section.key=value ...]

Also `python`, torchrun and srun, started like the run itself. Exit code 1 where a row fails, 2 for a mistake in the
configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys

import entry

from minillm.settings.accounting import num_parameters
from minillm.settings.run import RunConfig
from minillm.utils import commands
from minillm.utils.errors import exit_on_user_error


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=commands.started_as, description="Check everything that can be known before a run starts."
    )
    parser.add_argument("--deepspeed", "--deepspeed_config", metavar="JSON", help="the run's ds_configs/*.json")
    parser.add_argument("--config", metavar="NAME|PATH", help="the run's, in launch/configs; without: the machine only")
    parser.add_argument("--stage", choices=["pretrain", "sft"], default="pretrain", help="which script will run it")
    parser.add_argument("--json", action="store_true", help="one JSON object on one line instead of the table")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="for one call (default 60)")
    parser.add_argument(
        "--trial-timeout", type=float, default=900, metavar="SECONDS", help="for one stage of the trial (default 900)"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if (arguments.config is None) != (arguments.deepspeed is None):
        parser.error("--deepspeed JSON and --config NAME go together: they are the run that is tried")
    if arguments.overrides and arguments.config is None:
        parser.error(f"{arguments.overrides[0]}: settings of a run go with --deepspeed JSON and --config NAME")
    if min(arguments.timeout, arguments.trial_timeout) <= 0:
        parser.error("--timeout and --trial-timeout are seconds above 0")
    arguments.ranks = None  # the launcher decides, as for a run
    return arguments


def main() -> int:
    arguments = parse_arguments()
    for number in (signal.SIGTERM, signal.SIGINT):  # leave by an exception, so that folders and children are removed
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with exit_on_user_error():
        planned = entry.resolve_start(arguments, arguments.stage) if arguments.config else None
        # after the checks: torch takes seconds to import
        from minillm.preflight.checks import Plan, preflight
        from minillm.preflight.ranks import Ranks
        from minillm.preflight.rows import FAIL, format_table, summary, worst

        if "RANK" not in os.environ:
            from minillm.training.engine import lone_rank_environment  # with DeepSpeed, which ranks can do without

            os.environ.update(lone_rank_environment())
        ranks = Ranks()
        if ranks.rank != 0:
            ranks.serve()
            return 0
        plan = None
        if planned is not None:
            arch = planned.model.architecture
            count = None if arch is None else num_parameters(arch)["total"]
            plan = Plan(planned.run, planned.deepspeed, num_parameters=count, try_run="preflight:prepare_and_try")
        rows = preflight(ranks, plan, arguments.timeout, arguments.trial_timeout)
        ranks.dismiss()
        verdict = worst([row.verdict for row in rows])
        if arguments.json:
            print(json.dumps({"verdict": verdict, "ranks": ranks.size, "rows": [row.as_dict() for row in rows]}))
        else:
            print(f"{format_table(rows)}\n\n{summary(rows)}", flush=True)
        return 1 if verdict == FAIL else 0


def prepare_and_try(report, **arguments) -> dict[str, object]:
    """In the children: the built-in corpus where the run wants it, then the trial."""
    from minillm.preflight.trial import try_run

    report.stage("preparing the built-in corpus")
    entry.prepare_builtin_data(RunConfig.model_validate(arguments["run"]))
    return try_run(report, **arguments)


if __name__ == "__main__":
    sys.exit(main())
