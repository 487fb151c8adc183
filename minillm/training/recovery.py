"""Going past what would spoil a run: which batches are left out, when a loss is a spike, and the record of it all.

Contract: `skipped.json` in the run folder says which batches a run leaves out; with it a batch is a function of (seed,
step) as before, so that a resumed run leaves out the same ones. `events.jsonl` is a log: appended, synced, never cut
back. Rank 0 writes both; every rank decides alike, because every rank sees the same global loss.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_json


class RollBack(Exception):
    """Train on from the newest checkpoint; raised on every rank, after the bad batches were written down."""


class SkippedBatches:
    """The batches of the stream that a run leaves out; every rank holds the same.

    Raises:
        UserError: skipped.json is not what this wrote.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / "skipped.json"
        entries = distributed.on_rank_zero(lambda: read_json(self._path) if self._path.exists() else [])
        entries = distributed.broadcast_object(entries)
        try:
            self._ranges = [(int(first), int(last)) for first, last in entries]
            if wrong := [entry for entry in self._ranges if not 0 <= entry[0] <= entry[1]]:
                raise ValueError(f"{list(wrong[0])}")
        except (TypeError, ValueError) as error:
            raise UserError(f"{self._path} is damaged ({error}): it must be a list of [first, last] batches") from error

    @property
    def occasions(self) -> int:
        """How often batches were left out."""
        return len(self._ranges)

    @property
    def num_batches(self) -> int:
        return sum(last - first + 1 for first, last in self._ranges)

    def batch_of(self, step: int) -> int:
        """The number of the stream's batch that optimizer step `step` (from 0) trains on: the step-th not left out."""
        number = step
        for first, last in sorted(self._ranges):
            if first <= number:
                number += last - first + 1
        return number

    def add(self, first: int, last: int) -> None:
        """Leave out batches first .. last from now on; on disk before this returns. Every rank calls it."""
        self._ranges.append((first, last))
        distributed.on_rank_zero(lambda: write_json(self._path, self._ranges))


def spike_threshold(losses: Sequence[float], window: int, deviations: float) -> float | None:
    """The loss above which the next one is a spike; None before `window` losses are known.

    Median + deviations x 1.4826 x the median absolute deviation (Rousseeuw and Croux 1993: consistent for the standard
    deviation, and blind to up to half of the window). A deviation below 0.1 % of the median counts as that much.
    """
    if len(losses) < window:
        return None
    recent = losses[-window:]
    middle = statistics.median(recent)
    deviation = 1.4826 * statistics.median(abs(loss - middle) for loss in recent)
    return middle + deviations * max(deviation, 0.001 * abs(middle))


def record_event(run_dir: Path, event: str, **details: object) -> None:
    """Append one line to events.jsonl, synced; called on rank 0 of a folder that is locked.

    What a kill left half-written keeps a line of its own.
    """
    line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **details}
    with open(run_dir / "events.jsonl", "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
