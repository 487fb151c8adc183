"""What pretrain.py and sft.py share: arguments, the checked configuration, `--dry-run`, and the built-in corpus.

Contract: every configuration problem is reported in one error, in under a second, before torch is imported. A rank that
fails exits non-zero, so that the launcher stops the others.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Works from a clone without `pip install`, and before another clone on PYTHONPATH; where a wheel was installed, ROOT is
# the package itself, which is found without this.
if (ROOT / "minillm").is_dir():
    sys.path.insert(0, str(ROOT))

import minillm.training.signals  # noqa: E402, F401 (first: it looks who started this process)
from minillm.compat.versions import TRAINING, check_environment, require_installed  # noqa: E402
from minillm.utils.errors import exit_on_user_error  # noqa: E402

with exit_on_user_error():
    require_installed(TRAINING)  # before the imports below would say it in twenty lines

from minillm.planning.micro_batch import fill_gpu  # noqa: E402
from minillm.planning.states import Zero, parameter_groups, states  # noqa: E402
from minillm.settings.accounting import flops_per_token, num_parameters  # noqa: E402
from minillm.settings.deepspeed_json import precision, zero_stage  # noqa: E402
from minillm.settings.resolve import BUILTIN_ROOT, Resolved, check_places, resolve, uses_builtin_data  # noqa: E402
from minillm.settings.run import RunConfig  # noqa: E402
from minillm.utils import commands  # noqa: E402
from minillm.utils.before_torch import prepare_environment  # noqa: E402
from minillm.utils.gpus import smallest_gpu_memory  # noqa: E402
from minillm.utils.logging import is_main_process, say  # noqa: E402
from minillm.utils.places import configs_dir  # noqa: E402

prepare_environment()


def parse_arguments(description: str, default_config: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=commands.started_as,
        description=description,
        epilog="Overrides: section.key=value, for example train.max_steps=100 optim.learning_rate=3e-4 run_name=try1",
    )
    parser.add_argument(
        "--deepspeed", "--deepspeed_config", default="zero2", metavar="JSON",
        help="a path, or a name in ds_configs (default zero2)",
    )  # fmt: skip
    parser.add_argument(
        "--config", default=default_config, metavar="NAME|PATH", help=f"in launch/configs (default {default_config})"
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print everything, start nothing")
    parser.add_argument("--ranks", type=int, metavar="N", help="with --dry-run: as if on N ranks")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.ranks is not None and (arguments.ranks < 1 or not arguments.dry_run):
        parser.error("--ranks N (1 or more) goes with --dry-run; the launcher decides how many ranks a run has")
    return arguments


def main(stage: str, description: str, default_config: str) -> int:
    """Run one launch script; returns its exit code."""
    arguments = parse_arguments(description, default_config)
    with exit_on_user_error():
        check_environment(TRAINING)
        resolved = resolve_start(arguments, stage)
        if arguments.dry_run:
            print_plan(resolved)
            return 0
        check_places(resolved.run, reads=not uses_builtin_data(resolved.run))
        prepare_builtin_data(resolved.run)
        say(f"batch: {describe_batch(resolved)}")
        from minillm.training.loop import train  # after the checks: torch and DeepSpeed take seconds to import

        return train(resolved)


def ranks(arguments: argparse.Namespace) -> int:
    return arguments.ranks or int(os.environ.get("WORLD_SIZE", 1))


def resolve_start(arguments: argparse.Namespace, stage: str) -> Resolved:
    """What the words of a command line mean."""
    return resolve(
        arguments.config,
        arguments.overrides,
        arguments.deepspeed,
        stage=stage,
        world_size=ranks(arguments),
        configs_dir=configs_dir(),
        fill=lambda *settings: fill_gpu(*settings, smallest_gpu_memory()),
    )


def prepare_builtin_data(run: RunConfig) -> None:
    """Build the corpus of this machine's Python documentation where a run wants it and it is not there."""
    if not uses_builtin_data(run):
        return
    from data_tools.builtin import prepare_builtin

    say(f"data: the built-in corpus (this machine's Python documentation) in {BUILTIN_ROOT}")
    prepare_builtin(BUILTIN_ROOT)


def print_plan(resolved: Resolved) -> None:
    """What --dry-run shows."""
    if not is_main_process():
        return
    run = resolved.run
    length = f"{run.train.max_steps} steps" if run.train.max_steps else f"{run.train.num_epochs:g} epochs"
    rows = {
        "run": f"{run.run_name} ({run.stage}) in {run.run_dir}, {length}",
        "model": resolved.model.name,
        **describe_model(resolved),
        "batch": describe_batch(resolved),
        "DeepSpeed": f"ZeRO-{zero_stage(resolved.deepspeed)}, {precision(resolved.deepspeed)}",
        "data": f"{run.data.train} | {run.data.validation}",
    }
    for name, value in rows.items():
        print(f"{name:14s} {value}")


def describe_batch(resolved: Resolved) -> str:
    """How a step's sequences are split, which says what an `auto` micro-batch became."""
    train = resolved.run.train
    return (
        f"{train.train_batch_size} sequences of {resolved.run.data.seq_len} = {train.train_micro_batch_size_per_gpu} x "
        f"{resolved.deepspeed['gradient_accumulation_steps']} micro-steps x {resolved.world_size} rank(s)"
    )


def describe_model(resolved: Resolved) -> dict[str, str]:
    """The rows about the architecture, where it is known."""
    run, arch = resolved.run, resolved.model.architecture
    if arch is None:
        return {}
    counts = num_parameters(arch)
    active = f", {counts['active']:,} active" if counts["active"] < counts["total"] else ""
    size = run.model.expert_parallel_size
    groups = parameter_groups(arch, run.model.moe_backend, size, resolved.world_size, run.optim.name)
    kept = states(groups, Zero.of(resolved.deepspeed))
    memory = {"weights": kept.parameters, "gradients": kept.gradients, "optimizer": kept.optimizer}
    parts = ", ".join(f"{part} {held / 2**20:,.1f} MiB" for part, held in memory.items())
    parts += f"; {kept.host / 2**20:,.1f} MiB on the host" if kept.host else ""
    experts = {}
    if counts["routed"]:
        own = arch.num_experts // size
        experts = {"experts": f"{run.model.moe_backend}: {own} of {arch.num_experts} a layer on each rank"}
    return {
        **experts,
        "parameters": f"{counts['total']:,}{active} ({counts['non_embedding']:,} without embeddings)",
        "FLOPs a token": f"{flops_per_token(arch, run.data.seq_len):,} (forward and backward, attention included)",
        "memory a GPU": f"{sum(memory.values()) / 2**20:,.1f} MiB before activations ({parts})",
    }
