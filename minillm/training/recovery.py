"""Going past what would spoil a run: what speaks against an update, what the policies make of it, and the record of it.

Contract: a Guard is asked before an update (`judge`) and after the step (`decide`); nothing else knows the policies of
`faults`. `skipped.json` in the run folder says which batches a run leaves out; with it a batch is a function of (seed,
step) as before, so that a resumed run leaves out the same ones. `events.jsonl` is a log: appended, synced, never cut
back. Rank 0 writes both; every rank decides alike, because every rank sees the same global loss.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from datetime import datetime, timezone
from enum import Enum

from minillm.data.loader import BatchLoader
from minillm.run_folder import RunFolder
from minillm.settings.run import RunConfig
from minillm.training.checkpoint import CheckpointWriter
from minillm.training.step import Fault, NonFiniteError, StepResult, not_finite
from minillm.utils import distributed
from minillm.utils.errors import UserError
from minillm.utils.files import read_json, write_json
from minillm.utils.logging import warn
from minillm.utils.seeding import capture_rng, restore_rng


class SkippedBatches:
    """The batches of the stream that a run leaves out; every rank holds the same.

    Raises:
        UserError: skipped.json is not what this wrote.
    """

    def __init__(self, folder: RunFolder):
        self._path = folder.skipped_batches
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


def warn_once(message: str) -> None:
    """One warning for all ranks, which know the same."""
    if distributed.rank() == 0:
        warn(message)


class Verdict(Enum):
    """What becomes of a step."""

    KEEP = "the update counts"
    LEAVE_OUT = "nothing was updated; the run goes on with the next batch"
    ROLL_BACK = "the run goes on from its last checkpoint, past the batches since"


class Guard:
    """The fault policies of a run. Every rank decides alike, because every rank sees the same global loss.

    Attributes:
        saved_step: of the newest checkpoint, None before the first; the loop sets it.
        may_leave_out: only an update that may be skipped has to be judged before it (see step.Judge).
    """

    def __init__(self, run: RunConfig, loader: BatchLoader, writer: CheckpointWriter):
        self._folder, self._faults, self._loader, self._writer = run.folder, run.faults, loader, writer
        self.skipped = SkippedBatches(run.folder)
        self.saved_step: int | None = None
        self.may_leave_out = "skip" in (run.faults.on_non_finite, run.faults.on_loss_spike)
        self._limit: float | None = None
        self._generators: dict | None = None
        loader.extend(self.skipped.num_batches)

    def begin_step(self, recent_losses: Sequence[float]) -> None:
        """Look at the losses so far, and remember the generators of a step that may be left out."""
        self._limit = spike_threshold(recent_losses, self._faults.spike_window, self._faults.spike_deviations)
        self._generators = capture_rng() if self.may_leave_out else None

    def judge(self, losses: dict[str, float]) -> Fault | None:
        """What speaks against an update, before it (see step.Judge)."""
        return not_finite(losses) or (
            self._spike(losses["cross_entropy"]) if self._faults.on_loss_spike == "skip" else None
        )

    def _spike(self, loss: float) -> Fault | None:
        if self._limit is None or loss <= self._limit or self._faults.on_loss_spike == "ignore":
            return None
        return Fault("loss_spike", f"the loss is {loss:.4f}, above {self._limit:.4f}", loss)

    def decide(self, result: StepResult | Fault, step: int) -> Verdict:
        """What the policies say of step `step` (from 1), once it was taken or refused.

        Raises:
            NonFiniteError, UserError: the run stops here, with its last checkpoint.
        """
        fault = result if isinstance(result, Fault) else self._spike(result.loss)
        if fault is None:
            return Verdict.KEEP
        if isinstance(result, Fault) and self._generators is not None:
            restore_rng(self._generators)  # a start that knows of this batch does not draw for it
        policy = self._faults.on_non_finite if fault.kind == "non_finite" else self._faults.on_loss_spike
        batch, last = self.skipped.batch_of(step - 1), self._last_checkpoint
        measured = {} if fault.kind == "non_finite" else {"loss": fault.loss, "limit": self._limit}
        self.event(fault.kind, step=step, batch=batch, problem=fault.problem, policy=policy, **measured,
                   documents=self._loader.places_of(batch))  # fmt: skip
        if policy == "log":
            warn_once(f"step {step}: {fault.problem}; see events.jsonl")
            return Verdict.KEEP
        if policy == "stop":
            kind = NonFiniteError if fault.kind == "non_finite" else UserError
            raise kind(
                f"step {step}: {fault.problem}. Nothing was updated; the last checkpoint is {last}. Lower "
                f"optim.learning_rate or optim.gradient_clipping, or set faults.on_{fault.kind}"
            )
        if self.skipped.occasions >= self._faults.max_recoveries:
            raise UserError(
                f"step {step}: {fault.problem}, and all {self._faults.max_recoveries} recoveries of "
                f"faults.max_recoveries are used up. The last checkpoint is {last}"
            )
        if policy == "skip":
            self.skipped.add(batch, batch)
            self._loader.extend(1)
            warn_once(f"step {step}: {fault.problem}; batch {batch} is left out")
            return Verdict.LEAVE_OUT
        self._writer.wait()  # the checkpoint to go back to is whole before anything relies on it
        first = self.skipped.batch_of(self.saved_step or 0)
        self.skipped.add(first, batch)
        warn_once(f"step {step}: {fault.problem}; back to {last}, past batches {first} to {batch}")
        return Verdict.ROLL_BACK

    @property
    def _last_checkpoint(self) -> str:
        return "none" if self.saved_step is None else f"step {self.saved_step}"

    def event(self, event: str, **details: object) -> None:
        """A line of events.jsonl."""
        distributed.on_rank_zero(lambda: record_event(self._folder, event, **details))


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


def record_event(folder: RunFolder, event: str, **details: object) -> None:
    """Append one line to events.jsonl, synced; called on rank 0 of a folder that is locked.

    What a kill left half-written keeps a line of its own.
    """
    line = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds"), "event": event, **details}
    with open(folder.events, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
