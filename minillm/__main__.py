"""Every command under one name: `minillm COMMAND ...`, `python -m minillm COMMAND ...`; alone, the list of them.

Contract: a command is the module or the script of its row in COMMANDS, with that one's options, output, signals and
exit code; only that one is imported. `minillm pretrain` is `deepspeed launch/pretrain.py`. An unknown command is one
error, exit code 2.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys

from minillm.utils import commands
from minillm.utils.errors import UserError, exit_on_user_error, nearest
from minillm.utils.places import PACKAGE, home

COMMANDS = {  # what is typed: what runs, in one line what it does
    "pretrain": ("launch/pretrain.py", "train a model from its first step (default: the demo on the built-in corpus)"),
    "sft": ("launch/sft.py", "fine-tune on conversations (default: the newest pretraining run)"),
    "preflight": ("launch/preflight.py", "check the machine, and two steps of a run, before it starts"),
    "submit": ("launch/submit.py", "submit a run to Slurm, with a time limit from the plan"),
    "chat": ("minillm.chat", "talk to a model"),
    "export": ("minillm.export", "write a trained model as a folder that transformers loads"),
    "plan": ("minillm.plan", "memory, speed, traffic and cost of a run, before the first GPU hour"),
    "describe": ("minillm.describe", "the layers of a preset and the parameters of every part"),
    "parity": ("minillm.parity", "does the DeepSpeed engine compute here what plain torch computes?"),
    "versions": ("minillm.versions", "the packages of this environment against those that were tested"),
    "data builtin": ("data_tools.builtin", "the built-in corpus, its tokenizer and shards"),
    "data corpus": ("data_tools.corpus", "a corpus from a folder of text, this machine's documentation, or toy tasks"),
    "data tokenizer": ("data_tools.tokenizer", "train, import and inspect tokenizers"),
    "data shards": ("data_tools.shards", "write, check and tokenize shards, for pretraining and fine-tuning"),
    "data download": ("data_tools.download", "load corpora of a catalogue, a hub or an address"),
    "data crawl": ("data_tools.crawl", "crawl web pages politely"),
    "data clean": ("data_tools.clean", "repair, filter and mask texts"),
    "data dedup": ("data_tools.dedup", "remove exact and near duplicates"),
    "data contamination": ("data_tools.contamination", "find evaluation items in a corpus"),
    "data sample": ("data_tools.sample", "draw a share of a corpus"),
    "data inspect": ("data_tools.inspect", "a corpus on one page: lengths, languages, repetition, examples"),
    "data lda": ("data_tools.lda", "topics of a corpus"),
    "data item2vec": ("data_tools.item2vec", "similar items from sequences"),
}
LAUNCHED = ("pretrain", "sft", "preflight")
PACKAGES = ("torch", "deepspeed", "transformers")


def listing(prefix: str = "") -> str:
    """The commands that begin with `prefix`, one a line."""
    chosen = {name: line for name, (_, line) in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, chosen)) + 2
    return "\n".join([
        f"usage: minillm {prefix or '[--version] '}COMMAND ...     (or: python -m minillm ...)", "",
        *(f"  {name:{width}}{line}" for name, line in chosen.items()), "",
        "minillm COMMAND --help explains one. pretrain, sft and preflight also take the options of the deepspeed",
        "launcher (--num_gpus N, --include, --hostfile, ...).",
    ])  # fmt: skip


def version_text() -> str:
    """Of minillm and of what it stands on, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    import minillm

    def installed(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} is not installed"

    packages = [f"Python {sys.version.split()[0]}", *map(installed, PACKAGES)]
    return f"minillm {minillm.__version__} from {PACKAGE}\n{', '.join(packages)}"


def find_command(words: list[str]) -> tuple[str, list[str]]:
    """The command that the words begin with, and its own words.

    Raises:
        UserError: there is no such command.
    """
    prefix, words = ("data ", words[1:]) if words[0] == "data" else ("", words)
    name = prefix + words[0]
    if name not in COMMANDS:
        near = nearest(words[0], [other.removeprefix(prefix) for other in COMMANDS if other.startswith(prefix)])
        raise UserError(f"minillm {name}: there is no such command{near} (`minillm {prefix}--help` lists them)")
    return name, words[1:]


def run_script(name: str, script: str, words: list[str]) -> None:
    """A launch script: in this process where it starts no ranks or is one, else by the deepspeed launcher in its place.

    Raises:
        UserError: launcher options where no launcher is started, or DeepSpeed is not installed.
    """
    path = str(home() / script)
    launcher, rest = commands.split_launcher(words) if name in LAUNCHED else ([], words)
    asks = name not in LAUNCHED or not {"-h", "--help", "--dry-run"}.isdisjoint(rest)
    if asks or "RANK" in os.environ:
        if launcher:
            why = "--dry-run and --help start no ranks (--ranks N plans for N)" if asks else "RANK says that one runs"
            raise UserError(f"{' '.join(launcher)}: for the deepspeed launcher, but {why}; leave it out")
        sys.path[0] = os.path.dirname(path)  # as for every script
        sys.argv = [path, *rest]
        runpy.run_path(path, run_name="__main__")
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"minillm {name} needs DeepSpeed, which {sys.executable} does not have: install minillm anew")
    sys.stdout.flush()
    # In this process's place, so that signals and exit codes are the launcher's.
    os.execv(sys.executable, [sys.executable, "-m", "deepspeed.launcher.runner", *launcher, path, *rest])


def main() -> int | None:
    """Entry point; returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print(listing())
        return 0
    if words[0] == "--version":
        print(version_text())
        return 0
    if words[0] == "data" and (len(words) == 1 or words[1] in ("-h", "--help")):
        print(listing("data "))
        return 0
    with exit_on_user_error():
        name, rest = find_command(words)
        target, commands.started_as = COMMANDS[name][0], f"minillm {name}"
        if target.endswith(".py"):
            return run_script(name, target, rest)
    sys.argv = [commands.started_as, *rest]
    return importlib.import_module(target).main()


if __name__ == "__main__":
    sys.exit(main())
