"""Submit a run to Slurm, with a time limit from the plan.

python launch/submit.py CONFIG [section.key=value ...] [--stage sft] [--nodes N] [--gpus 8] [--sweep FILE]
    [--deepspeed JSON] [--hours H] [--sbatch=--partition=gpu] [--dry-run]

Contract: configuration problems come in one error before anything is submitted, those of every line of a sweep too. The
time limit is the planned step time times the steps, times MARGIN, plus STARTUP, at most --max-hours (a longer run is
requeued at its limit and goes on). `--dry-run` prints the sbatch command and the script as its options fill it.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import entry  # noqa: F401 (first: it finds minillm without `pip install`)

from minillm.planning.devices import DEVICES
from minillm.planning.step import MFU, Setup, speed
from minillm.settings.resolve import Resolved, resolve
from minillm.utils import commands
from minillm.utils.errors import UserError, exit_on_user_error
from minillm.utils.places import configs_dir, launch_dir

MARGIN = 1.5  # validation, samples, checkpoints, and what the plan does not know: disks, launches of small steps
STARTUP = 15 * 60  # seconds: environment, data, compiling
SCRIPTS = launch_dir() / "slurm"


@dataclass(frozen=True)
class Job:
    """What is submitted: `environment` and `options` of sbatch, then the script and its words."""

    environment: dict[str, str]
    options: dict[str, str]
    more: list[str]
    script: Path
    words: list[str]

    @property
    def command(self) -> list[str]:
        options = [f"--{name}={value}" for name, value in self.options.items()]
        return ["sbatch", *options, *self.more, str(self.script), *self.words]

    def shown(self) -> str:
        """The command as it can be typed."""
        return " ".join([f"{k}={shlex.quote(v)}" for k, v in self.environment.items()] + [shlex.join(self.command)])

    def filled(self) -> str:
        """The script with the #SBATCH lines that hold: sbatch's own options win over the file's."""
        lines, given = [], dict(self.options)
        for line in self.script.read_text(encoding="utf-8").splitlines():
            match = re.match(r"#SBATCH --([\w-]+)=", line)
            if match and match[1] in given:
                line = f"#SBATCH --{match[1]}={given.pop(match[1])}"
            elif given and not line.startswith("#"):  # the directives end here
                lines += [f"#SBATCH --{name}={value}" for name, value in given.items()]
                given = {}
            lines.append(line)
        return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=commands.started_as, description="Submit a run to Slurm, with a time limit from the plan."
    )
    parser.add_argument("config", metavar="CONFIG", help="a name in launch/configs, or a path")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--stage", choices=("pretrain", "sft"), default="pretrain")
    parser.add_argument("--sweep", metavar="FILE", help="one run for each line of overrides")
    parser.add_argument("--deepspeed", default="ds_configs/zero1.json", metavar="JSON", help="(default zero1.json)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="(default 1)")
    parser.add_argument("--gpus", type=int, metavar="N", help="a node (default 8; 1 for each run of a sweep)")
    parser.add_argument("--hours", type=float, metavar="H", help="the time limit (default: planned)")
    parser.add_argument("--max-hours", type=float, default=24, metavar="H", help="the cluster's longest (default 24)")
    parser.add_argument("--tokens", type=float, metavar="N", help="to plan with, where the config counts epochs")
    parser.add_argument("--device", choices=DEVICES, default="rtx3090", help="to plan with (default rtx3090)")
    parser.add_argument("--mfu", type=float, default=MFU, help=f"to plan with (default {MFU})")
    parser.add_argument("--sbatch", action="append", default=[], metavar="=OPTION", help="more options of sbatch")
    parser.add_argument("--dry-run", action="store_true", help="print the command and the script, submit nothing")
    arguments = parser.parse_intermixed_args()
    if arguments.gpus is None:
        arguments.gpus = 1 if arguments.sweep else 8
    for name in ("nodes", "gpus", "hours", "max_hours", "tokens", "mfu"):
        if (value := getattr(arguments, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value}: it must be above 0")
    if arguments.sweep and arguments.nodes > 1:
        parser.error("--sweep puts every run on one node: leave out --nodes")
    return arguments


def resolve_all(arguments: argparse.Namespace) -> list[Resolved]:
    """Every run that is submitted, checked.

    Raises:
        UserError: all that is wrong with any of them.
    """
    starts = [("", arguments.overrides)]
    if arguments.sweep:
        # A name for each run, as in sweep.sbatch.
        stem = Path(arguments.config).stem
        starts = [
            (f"{arguments.sweep}, run {number}: ", [f"run_name={stem}-sweep-{number}", *arguments.overrides, *words])
            for number, words in enumerate(sweep_lines(Path(arguments.sweep)), start=1)
        ]
    resolved, problems = [], []
    for where, words in starts:
        try:
            resolved.append(
                resolve(arguments.config, words, arguments.deepspeed, stage=arguments.stage,
                        world_size=arguments.nodes * arguments.gpus, configs_dir=configs_dir())
            )  # fmt: skip
        except UserError as error:
            problems.append(f"{where}{error}")
    folders = [str(one.run.run_dir) for one in resolved]
    for folder in sorted({f for f in folders if folders.count(f) > 1}):
        problems.append(f"{arguments.sweep}: {folder} would be written by several runs; give each its own run_name")
    if problems:
        raise UserError("\n".join(problems))
    return resolved


def sweep_lines(path: Path) -> list[list[str]]:
    """The words of each line that counts.

    Raises:
        UserError: no file, no line, or a quotation that does not end.
    """
    if not path.is_file():
        raise UserError(f"--sweep {path}: no such file; write one line of section.key=value words for each run")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not re.match(r"\s*(#|$)", line)]
    if not lines:
        raise UserError(f"--sweep {path}: there is no line in it; write one of section.key=value words for each run")
    try:
        return [shlex.split(line) for line in lines]
    except ValueError as error:
        raise UserError(f"--sweep {path}: {error}; close the quotation") from error


def planned_seconds(resolved: Resolved, arguments: argparse.Namespace) -> tuple[float, str]:
    """Of the whole run, without margin, and how that was found.

    Raises:
        UserError: it cannot be told.
    """
    run, arch = resolved.run, resolved.model.architecture
    per_step = run.train.train_batch_size * run.data.seq_len
    steps = arguments.tokens / per_step if arguments.tokens else run.train.max_steps
    if steps is None or arch is None:
        epochs = f"train.num_epochs = {run.train.num_epochs} of data that nobody has counted"
        why = f"the model is {resolved.model.name}" if arch is None else epochs
        fix = "--hours H" if arch is None else "--tokens N (of the whole run) or --hours H"
        raise UserError(f"the time limit cannot be planned: {why}; give {fix}")
    setup = replace(Setup.of(run, arch, resolved.deepspeed, resolved.world_size), gpus_per_node=arguments.gpus)
    device = DEVICES[arguments.device]
    seconds = speed(setup, device, arguments.mfu).seconds
    return steps * seconds, f"{steps:,.0f} steps x {seconds:.3g} s on {setup.world_size} x {device.name} (planned)"


def time_limit(seconds: float) -> str:
    """As Slurm writes it, whole minutes."""
    minutes = max(1, -(-round(seconds) // 60))
    days, rest = divmod(minutes, 24 * 60)
    return f"{days}-{rest // 60:02d}:{rest % 60:02d}:00"


def build_job(arguments: argparse.Namespace) -> tuple[Job, str]:
    """The job, and a line about its time limit.

    Raises:
        UserError: a problem of the configuration, or no way to tell how long it takes.
    """
    runs = resolve_all(arguments)
    longest = arguments.max_hours * 3600
    if arguments.hours:
        seconds, how = arguments.hours * 3600, "as given"
    else:
        planned = [planned_seconds(resolved, arguments) for resolved in runs]
        seconds, how = max(planned, key=lambda found: found[0])
        seconds, how = MARGIN * seconds + STARTUP, f"{how}, x {MARGIN}, + {STARTUP // 60} min"
    if seconds > longest:
        seconds, how = longest, f"--max-hours; the run needs {seconds / 3600:,.1f} h and is requeued ({how})"
    name = "sweep" if arguments.sweep else "multinode" if arguments.nodes > 1 else arguments.stage
    first = runs[0].run
    options = {"job-name": Path(arguments.config).stem if arguments.sweep else first.run_name}
    options |= {"array": f"1-{len(runs)}"} if arguments.sweep else {}
    options |= {"nodes": str(arguments.nodes), "gres": f"gpu:{arguments.gpus}",
                "ntasks-per-node": str(arguments.gpus), "time": time_limit(seconds)}  # fmt: skip
    environment = {"DEEPSPEED": arguments.deepspeed, "GPUS": str(arguments.gpus)}
    environment |= {"STAGE": arguments.stage} if name in ("sweep", "multinode") else {}
    words = [arguments.config, *([arguments.sweep] if arguments.sweep else []), *arguments.overrides]
    job = Job(environment, options, arguments.sbatch, SCRIPTS / f"{name}.sbatch", words)
    return job, f"time limit {options['time']}: {how}"


def main() -> int:
    arguments = parse_arguments()
    with exit_on_user_error():
        job, about = build_job(arguments)
        print(about)
        print(job.shown())
        if arguments.dry_run:
            print(f"\n# {job.script}, as its options fill it\n{job.filled()}")
            return 0
        if shutil.which("sbatch") is None:
            raise UserError("sbatch is not on PATH: run this on a login node of the cluster, or look with --dry-run")
        return subprocess.run(job.command, env={**os.environ, **job.environment}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
