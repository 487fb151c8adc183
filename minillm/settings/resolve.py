"""The configurations of a run, checked against each other: what the launch scripts and `minillm.plan` both need.

Contract: no torch; every problem is in one error, before anything is imported that takes seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.run_folder import newest_run_checkpoint, resolve_model_folder
from minillm.settings.architecture import DEFAULTS, Architecture
from minillm.settings.deepspeed_json import read_deepspeed_json, resolve_deepspeed_config
from minillm.settings.moe_backends import resolve_moe_backend
from minillm.settings.presets import preset
from minillm.settings.run import RunConfig, load_run_config, model_overrides, raise_problems
from minillm.utils.errors import UserError
from minillm.utils.files import read_json


def resolve_run(
    config: str,
    overrides: list[str],
    json_file: str,
    *,
    stage: str,
    world_size: int,
    configs_dir: Path,
    fill: Callable[[RunConfig, Architecture, dict, int], None] = lambda *_: None,
) -> tuple[RunConfig, dict[str, Any]]:
    """The run's configuration and DeepSpeed's.

    Args:
        fill: called with the run, its architecture, DeepSpeed's configuration and the ranks where the micro-batch is
            `auto`, to set it to what a GPU holds (minillm.planning.micro_batch.fill_gpu).

    Raises:
        UserError: all problems of both.
    """
    run, problems = load_run_config(config, overrides, stage=stage, configs_dir=configs_dir)
    values = read_deepspeed_json(json_file)
    owned = [values.get(key, "auto") for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    is_auto = [run.train.train_micro_batch_size_per_gpu, *owned] == ["auto"] * 3
    resolved, more = resolve_deepspeed_config(values, run, world_size, json_file)
    if not problems + more:
        arch, _ = architecture_of(run)
        if arch is not None:  # else the training process settles it, when the weights are there
            more += resolve_moe_backend(run, arch, resolved, world_size)
    raise_problems(problems + more, f"{config} with {json_file} on {world_size} rank(s)")
    if is_auto and arch is not None:
        fill(run, arch, resolved, world_size)
    return run, resolved


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
        problems.append(f"run_root = {run.run_root!r}: {parent} is no folder; name another")
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


def architecture_of(run: RunConfig) -> tuple[Architecture | None, str]:
    """The architecture, and what to call it: the preset's, or that of the weights the run starts with; None where it
    cannot be told without loading them."""
    if run.model.init_from is None:
        return preset(run.model.preset, **model_overrides(run)), run.model.preset
    name = f"that of {run.model.init_from}"
    try:
        base = newest_run_checkpoint(Path(run.run_root), "pretrain") if run.model.init_from == "newest" else (
            resolve_model_folder(run.model.init_from, run.run_root)
        )  # fmt: skip
    except UserError:
        return None, f"{name}, which is not there yet"
    config = read_json(base / "config.json")
    if config.get("model_type") != "minillm":
        return None, f"{name}: {base}, a {config.get('model_type')} model"
    known = {field: config[field] for field in DEFAULTS if field in config}
    return Architecture(**{**known, **model_overrides(run)}), f"{name}: {base}"
