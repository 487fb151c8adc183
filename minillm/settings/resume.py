"""What a run that is resumed may not change.

Contract: no torch. The curve under one run name is of one model, one seed and one order of the data. Settings are
compared by what they mean, not by how they are spelled: null and the default it stands for are the same, and so are two
ways to write one path. Which texts a path leads to is for the data's fingerprint to say (minillm/training/start.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm.settings.presets import PRESETS, preset
from minillm.settings.run import ModelSection, RunConfig
from minillm.utils.errors import UserError

FIXED_KEYS = (
    "seed", "stage", "model.preset", "model.init_from", "data.train", "data.validation", "data.tokenizer",
    "data.seq_len", "data.packing", "data.stride", "train.train_batch_size", "optim.name",
)  # fmt: skip


def check_resumable(run: RunConfig, recorded: dict[str, Any]) -> None:
    """What defines the curve may not change under one run name; ranks, ZeRO, micro-batch, steps and cadences may.

    Raises:
        UserError: every changed key with both values.
    """
    before, now = _meaning(recorded), _meaning(run.model_dump())
    keys = [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]
    if {"model.preset", "model.init_from"} & set(keys):  # the fields of two models differ, which says no more
        keys = [key for key in keys if key in FIXED_KEYS]
    if keys:
        listed = "\n".join(f"  - {key}: was {before.get(key)!r}, now {now.get(key)!r}" for key in keys)
        raise UserError(
            f"{run.run_dir} was started with other settings that define the run:\n{listed}\n"
            f"Put them back to resume it, or choose another run_name"
        )


def _meaning(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that define a run, with what null stands for, by key."""
    found = {key: _get(values, key) for key in FIXED_KEYS}
    found["optim.name"] = found["optim.name"] or "adamw"  # of a run that was started before there was a choice
    found["data.packing"] = found["data.packing"] or ("none" if found["stage"] == "sft" else "concat")
    if found["data.packing"] == "concat":
        found["data.stride"] = found["data.stride"] or found["data.seq_len"]
    for key in ("data.train", "data.validation", "data.tokenizer"):
        found[key] = _place(found[key])
    model = values["model"]
    given = {name: value for name, value in model.items() if name not in ModelSection.model_fields}
    if found["model.init_from"] is None and found["model.preset"] in PRESETS:
        given = dict(preset(found["model.preset"], **given))
    return {**found, **{f"model.{name}": value for name, value in given.items()}}


def _place(stated: Any) -> Any:
    """A path, or the paths of a list of sources, as absolute ones."""
    if isinstance(stated, list):
        return [{**source, "path": _place(source["path"])} for source in stated]
    if not isinstance(stated, str) or "://" in stated or stated.startswith("tiktoken:"):
        return stated
    return str(Path(stated).expanduser().absolute())


def _get(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
