"""The configurations of a run, checked against each other: what the launch scripts and `minillm.plan` both need.

Contract: no torch; every problem is in one error, before anything is imported that takes seconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minillm.architecture import DEFAULTS
from minillm.config import RunConfig, load_run_config, model_overrides, raise_problems
from minillm.interop.load import newest_run_checkpoint, resolve_model_folder
from minillm.presets import PRESETS
from minillm.training.deepspeed_config import read_deepspeed_json, resolve_deepspeed_config
from minillm.training.moe_backends import resolve_moe_backend
from minillm.utils.errors import UserError
from minillm.utils.files import read_json


def resolve_run(
    config: str, overrides: list[str], json_file: str, *, stage: str, world_size: int, configs_dir: Path
) -> tuple[RunConfig, dict[str, Any]]:
    """The run's configuration and DeepSpeed's.

    Raises:
        UserError: all problems of both.
    """
    run, problems = load_run_config(config, overrides, stage=stage, configs_dir=configs_dir)
    values = read_deepspeed_json(json_file)
    resolved, more = resolve_deepspeed_config(values, run, world_size, json_file)
    if not problems + more:
        fields, _ = model_fields(run)
        if fields is not None:  # else the training process settles it, when the weights are there
            more += resolve_moe_backend(run, fields, resolved, world_size)
    raise_problems(problems + more, f"{config} with {json_file} on {world_size} rank(s)")
    return run, resolved


def model_fields(run: RunConfig) -> tuple[dict[str, object] | None, str]:
    """The architecture, and what to call it: the preset's, or that of the weights the run starts with; None where it
    cannot be told without loading them."""
    if run.model.init_from is None:
        return {**PRESETS[run.model.preset], **model_overrides(run)}, run.model.preset
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
    return {**DEFAULTS, **known, **model_overrides(run)}, f"{name}: {base}"
