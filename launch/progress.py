"""How far the run of a command line is: `STEP FOLDER` of its newest checkpoint (by sizes), `0 none` before the first.

python launch/progress.py deepspeed launch/pretrain.py --deepspeed ds_configs/zero2.json --config demo

Contract: `minillm pretrain` is understood too. Prints nothing where the words start neither pretraining nor
fine-tuning, or have a mistake in them (the command itself reports it). No torch: supervise.sh asks between two starts.
"""

import sys
from pathlib import Path

from entry import parse_arguments

from minillm.run_folder import RunFolder
from minillm.settings.reading import load_run_config
from minillm.utils.commands import split_launcher
from minillm.utils.errors import exit_on_user_error
from minillm.utils.places import configs_dir

DEFAULT_CONFIGS = {"pretrain": "demo", "sft": "sft-demo"}


def run_of(words: list[str]) -> Path | None:
    """The folder of the run that a command starts; None where it starts none."""
    for place, word in enumerate(words):
        stage = Path(word).stem
        is_command = word == stage and place > 0 and Path(words[place - 1]).name == "minillm"
        if stage in DEFAULT_CONFIGS and (word.endswith(".py") or is_command):
            rest = split_launcher(words[place + 1 :])[1] if is_command else words[place + 1 :]
            arguments = parse_arguments(stage, DEFAULT_CONFIGS[stage], rest)
            run, problems = load_run_config(
                arguments.config, arguments.overrides, stage=stage, configs_dir=configs_dir()
            )
            return None if problems else run.run_dir
    return None


def main() -> None:
    with exit_on_user_error():
        if (folder := run_of(sys.argv[1:])) is not None:
            newest = RunFolder(folder).newest()
            print(*((0, "none") if newest is None else (newest.step, newest.path)))


if __name__ == "__main__":
    main()
