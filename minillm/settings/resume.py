"""What a run that is resumed may not change.

Contract: no torch. The curve under one run name is of one model, one seed and one order of the data.
"""

from __future__ import annotations

from typing import Any

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
    now = run.model_dump()
    if _get(recorded, "optim.name") is None:  # of a run that was started before there was a choice
        recorded = {**recorded, "optim": {**(recorded.get("optim") or {}), "name": "adamw"}}
    fixed = [*FIXED_KEYS, *(f"model.{name}" for name in {*(run.model.model_extra or {}), *_extra(recorded)})]
    changed = [
        f"{key}: was {old!r}, now {new!r}" for key in fixed if (old := _get(recorded, key)) != (new := _get(now, key))
    ]
    if changed:
        listed = "\n".join(f"  - {line}" for line in changed)
        raise UserError(
            f"{run.run_dir} was started with other settings that define the run:\n{listed}\n"
            f"Put them back to resume it, or choose another run_name"
        )


def _extra(recorded: dict[str, Any]) -> set[str]:
    return set(recorded["model"]) - set(ModelSection.model_fields)


def _get(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
