"""Every number of a run that is not a weight, a moment or a generator.

Contract: the loop keeps no counter outside this class; a checkpoint stores `as_dict()` and nothing else of the kind.
The data position is `step`: batches are a function of (seed, step).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done
    optimizer_step: int = 0  # AdamW's own counter, which bias correction uses
    tokens: int = 0  # target tokens trained on
    bad_rows: int = 0  # unreadable sequences skipped so far
    train_seconds: float = 0.0  # wall time inside steps, over all starts
    first_val_loss: float | None = None  # before the first step
    val_loss: float | None = None  # the latest
    best_val_loss: float | None = None
    best_step: int | None = None

    def record_validation(self, val_loss: float) -> None:
        """Remember the latest and the best (the step as it stands)."""
        self.val_loss = val_loss
        if self.step == 0:
            self.first_val_loss = val_loss
        elif self.best_val_loss is None or val_loss < self.best_val_loss:
            self.best_val_loss, self.best_step = val_loss, self.step

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> TrainState:
        """Unknown keys are an error: a checkpoint of a newer version says so instead of losing a counter."""
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise ValueError(f"unknown counters {unknown}; this checkpoint was written by a newer minillm")
        return cls(**values)
