"""How the command of this process was started, and which words of a command are for the deepspeed launcher."""

from __future__ import annotations

from collections.abc import Iterable

# Options of the `deepspeed` command (0.19.8), which go before the script: those with a value, and those without.
LAUNCHER_VALUES = {
    "-H", "--hostfile", "-i", "--include", "-e", "--exclude", "--num_nodes", "--num_gpus", "--num_accelerators",
    "--master_port", "--master_addr", "--node_rank", "--launcher", "--launcher_args", "--enable_each_rank_log",
    "--bind_core_list", "--ssh_port", "--venv_script", "--log_level",
}  # fmt: skip
LAUNCHER_FLAGS = {
    "--no_local_rank", "--no_ssh", "--no_ssh_check", "--force_multi", "--save_pid", "--bind_cores_to_rank", "-q",
    "--quiet",
}  # fmt: skip

started_as: str | None = None  # `minillm chat`: set by minillm/__main__.py, None where the module or script was started


def command_name(module: str) -> str:
    """What the user typed to start `module`: `minillm chat`, or `python -m minillm.chat`."""
    return started_as or f"python -m {module}"


def split_launcher(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(what goes to the deepspeed launcher, what goes to the script), both in their order."""
    launcher, rest = [], []
    words = iter(words)
    for word in words:
        option, separator, _ = word.partition("=")
        if option in LAUNCHER_FLAGS | LAUNCHER_VALUES:
            launcher.append(word)
            if option in LAUNCHER_VALUES and not separator:
                launcher += [value for value in [next(words, None)] if value is not None]
        else:
            rest.append(word)
    return launcher, rest
