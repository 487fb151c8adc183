"""What a start of a run is: which settings, which model, whose weights, which expert backend, which data.

Contract: `resolve` is the only place that answers these questions, for training and resuming, `--dry-run`, the plan of
a batch job and preflight alike. No torch; every problem of a configuration is in one error, before anything is imported
that takes seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.run_folder import RESUMABLE, newest_run_checkpoint, resolve_model_folder
from minillm.settings.architecture import DEFAULTS, Architecture
from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
from minillm.settings.moe_backends import resolve_moe_backend
from minillm.settings.presets import preset
from minillm.settings.reading import load_run_config
from minillm.settings.run import RunConfig, model_overrides, raise_problems
from minillm.utils.errors import UserError
from minillm.utils.files import read_json

BUILTIN_ROOT = Path("data/python-docs")
BUILTIN_SHARDS = {"pretrain": ("train", "validation"), "sft": ("instructions-train", "instructions-validation")}


@dataclass
class ModelChoice:
    """Which decoder, and whose weights.

    Attributes:
        name: what to call it.
        architecture: None where only the weights tell: they are not there yet, or are of another library.
        base: the model folder that architecture and tokenizer come from: of a run that began with weights, its own
            newest checkpoint, and before its first what `model.init_from` names. None for a preset.
        missing: why there is no base although `model.init_from` asks for one.
    """

    name: str
    architecture: Architecture | None
    base: Path | None = None
    missing: str | None = None


@dataclass
class Resolved:
    """A run whose every question is answered.

    Attributes:
        deepspeed: the configuration for `deepspeed.initialize`.
        model: see ModelChoice; with an architecture, `run.model` says who runs its experts.
    """

    run: RunConfig
    deepspeed: dict[str, Any]
    model: ModelChoice
    world_size: int

    def settle_experts(self) -> list[str]:
        """Settle who runs the experts, where the architecture is known; the problems found."""
        if self.model.architecture is None:
            return []
        return resolve_moe_backend(self.run, self.model.architecture, self.deepspeed, self.world_size)


def resolve(
    config: str,
    overrides: list[str],
    json_file: str,
    *,
    stage: str,
    world_size: int,
    configs_dir: Path,
    fill: Callable[[RunConfig, Architecture, dict, int], None] = lambda *_: None,
) -> Resolved:
    """Read the run's configuration and DeepSpeed's, and answer what a start needs.

    Args:
        fill: called with the run, its architecture, DeepSpeed's configuration and the ranks where the micro-batch is
            `auto`, to set it to what a GPU holds (minillm.planning.micro_batch.fill_gpu).

    Raises:
        UserError: all problems of both.
    """
    run, problems = load_run_config(config, overrides, stage=stage, configs_dir=configs_dir)
    values = read_deepspeed_json(json_file)
    where = f"{config} with {json_file} on {world_size} rank(s)"
    return resolve_run(run, values, world_size, json_name=json_file, where=where, fill=fill, problems=problems)


def resolve_run(
    run: RunConfig,
    values: dict[str, Any],
    world_size: int,
    *,
    json_name: str,
    where: str,
    fill: Callable[[RunConfig, Architecture, dict, int], None] = lambda *_: None,
    problems: list[str] | None = None,
) -> Resolved:
    """`resolve` for what is read already.

    Args:
        values: of DeepSpeed's JSON, called `json_name` in messages.
        problems: of reading the run.
    """
    owned = [values.get(key, "auto") for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    is_auto = [run.train.train_micro_batch_size_per_gpu, *owned] == ["auto"] * 3
    deepspeed, more = resolve_deepspeed_config(values, run, world_size, json_name)
    raise_problems((problems or []) + more, where)
    name_builtin_data(run)
    resolved = Resolved(run, deepspeed, choose_model(run), world_size)
    raise_problems(resolved.settle_experts(), where)
    if is_auto and resolved.model.architecture is not None:
        fill(run, resolved.model.architecture, deepspeed, world_size)
    return resolved


def choose_model(run: RunConfig) -> ModelChoice:
    """The preset with its changes, or the model whose weights the run starts with or goes on from."""
    if run.model.init_from is None:
        return ModelChoice(run.model.preset, preset(run.model.preset, **model_overrides(run)))
    name = f"that of {run.model.init_from}"
    try:
        own = run.folder.newest(needed=RESUMABLE)
        base = own.path if own is not None else _initial_weights(run)
    except UserError as error:
        return ModelChoice(f"{name}, which is not there yet", None, missing=str(error))
    config = read_json(base / "config.json")
    if config.get("model_type") != "minillm":
        return ModelChoice(f"{name}: {base}, a {config.get('model_type')} model", None, base)
    known = {field: config[field] for field in DEFAULTS if field in config}
    return ModelChoice(f"{name}: {base}", Architecture(**{**known, **model_overrides(run)}), base)


def _initial_weights(run: RunConfig) -> Path:
    """The folder that `model.init_from` means: `newest` is the newest pretraining run's newest checkpoint."""
    if run.model.init_from == "newest":
        return newest_run_checkpoint(Path(run.run_root), stage="pretrain", check="sizes")
    return resolve_model_folder(run.model.init_from, run.run_root, check="sizes")


def name_builtin_data(run: RunConfig) -> None:
    """Where no data is named, the built-in corpus (this machine's Python documentation), in place."""
    if run.data.train is not None:
        return
    train, validation = BUILTIN_SHARDS[run.stage]
    run.data.train = str(BUILTIN_ROOT / "shards" / train)
    run.data.validation = str(BUILTIN_ROOT / "shards" / validation)
    if run.model.init_from is None:  # else the tokenizer of those weights
        run.data.tokenizer = run.data.tokenizer or str(BUILTIN_ROOT / "tokenizer")


def uses_builtin_data(run: RunConfig) -> bool:
    return isinstance(run.data.train, str) and Path(run.data.train).parent == BUILTIN_ROOT / "shards"


def check_places(run: RunConfig, reads: bool = True) -> None:
    """Whether what a run reads and calls is there, and what it writes can be, before seconds go into imports.

    Args:
        reads: False where its data is made at the start.

    Raises:
        UserError: every place that is wrong.
    """
    problems = _wrong_inputs(run) if reads else []
    parent = next(folder for folder in (run.run_dir, *run.run_dir.absolute().parents) if folder.exists())
    if not parent.is_dir():
        problems.append(f"run_root = {run.run_root!r}: {parent} is not a folder; name another")
    elif not os.access(parent, os.W_OK):
        problems.append(f"run_root = {run.run_root!r}: {parent} cannot be written; make it writable, or name another")
    if run.train.compile and not _has_compiler():
        fix = "install g++ (Debian, Ubuntu: apt install g++), set CXX=/path/to/one, or leave train.compile at false"
        problems.append(f"train.compile = true: torch.compile needs a C++ compiler, and there is none on PATH; {fix}")
    raise_problems(problems, f"of {run.run_name}")


def _has_compiler() -> bool:
    """What torch.compile calls: a C++ compiler, and beside a GPU Triton is content with one for C."""
    names = [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    if Path("/proc/driver/nvidia").exists():
        names += [os.environ.get("CC") or "gcc", "clang"]
    return any(shutil.which(name) for name in names)


def _wrong_inputs(run: RunConfig) -> list[str]:
    problems = []
    for key, sources in (("data.train", run.data.train), ("data.validation", run.data.validation)):
        for path in [sources] if isinstance(sources, str) else [source.path for source in sources or ()]:
            if problem := _missing(path):
                problems.append(f"{key} = {path!r}: {problem}")
    tokenizer = run.data.tokenizer
    if tokenizer is not None and not tokenizer.startswith("tiktoken:") and not Path(tokenizer).expanduser().exists():
        fix = "make a folder with `python -m data_tools.tokenizer train`"
        problems.append(f"data.tokenizer = {tokenizer!r}: it is not there; {fix}")
    return problems


def _missing(path: str) -> str | None:
    """What is wrong with an entry of data.train, as far as it can be told without opening it."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", path)
    if scheme is not None:
        allowed = scheme.group().lower() in ("http:", "https:")
        return None if allowed else f"{scheme.group()} is not supported, nothing is run; name a path or an http URL"
    if set(path) & set("*?[{") or Path(path).expanduser().exists():
        return None
    return "it is not there; name a folder of shards, a .tar, a pattern or a URL (`python -m data_tools.shards build`)"
