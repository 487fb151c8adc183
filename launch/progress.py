"""How far the run of a command line is: prints `STEP FOLDER` of its newest good checkpoint, `0 none` before the first.

python launch/progress.py deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json --config demo

Contract: prints nothing where the words start neither pretrain.py nor sft.py, or have a mistake in them (the command
itself reports it). No torch: supervise.sh asks between two starts.
"""

import sys
from pathlib import Path

from entry import parse_arguments

from minillm.config import load_run_config
from minillm.interop.load import newest_checkpoint
from minillm.utils.errors import exit_on_user_error
from minillm.utils.places import configs_dir

STAGES = {"pretrain.py": ("pretrain", "demo"), "sft.py": ("sft", "sft-demo")}


def run_of(words: list[str]) -> Path | None:
    """The folder of the run that a command starts; None where it starts none."""
    for place, word in enumerate(words):
        if (name := Path(word).name) in STAGES:
            stage, default = STAGES[name]
            sys.argv = words[place:]
            arguments = parse_arguments(stage, default)
            run, problems = load_run_config(
                arguments.config, arguments.overrides, stage=stage, configs_dir=configs_dir()
            )
            return None if problems else run.run_dir
    return None


def main() -> None:
    with exit_on_user_error():
        if (folder := run_of(sys.argv[1:])) is not None:
            newest = newest_checkpoint(folder)
            print(0 if newest is None else int(newest.name.removeprefix("step-")), newest or "none")


if __name__ == "__main__":
    main()
