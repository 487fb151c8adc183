"""Every number of a run that is not a weight, a moment or a generator.

Contract: the loop keeps no counter outside this class; a checkpoint stores `as_dict()` and nothing else of the kind.
The data position is `step`: batches are a function of (seed, step).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields

from minillm.utils.errors import UserError


@dataclass
class TrainState:
    step: int = 0  # optimizer steps done
    tokens: int = 0  # target tokens trained on
    bad_rows: int = 0  # unreadable sequences skipped so far
    train_seconds: float = 0.0  # wall time inside steps, over all starts
    first_val_loss: float | None = None  # before the first step
    val_loss: float | None = None  # the latest
    val_step: int | None = None  # when that was
    best_val_loss: float | None = None  # of the checkpoints
    best_step: int | None = None
    expert_idle_steps: list[list[int]] | None = None  # [sparse layers][E], since each expert last got a token

    recent_losses: list[float] = field(default_factory=list)  # of the last steps, that a spike is measured against

    def record_loss(self, loss: float, window: int) -> None:
        """Remember a step's loss, and as many before it as `window` asks for."""
        self.recent_losses = [*self.recent_losses, loss][-window:]

    def record_validation(self, val_loss: float) -> None:
        """Remember the latest (the step as it stands)."""
        self.val_loss, self.val_step = val_loss, self.step
        if self.step == 0:
            self.first_val_loss = val_loss

    def note_checkpoint(self) -> None:
        """Called as this step is saved: it is the best where it was validated and none that was saved is better."""
        if self.val_step == self.step and (self.best_val_loss is None or self.val_loss < self.best_val_loss):
            self.best_val_loss, self.best_step = self.val_loss, self.step

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> TrainState:
        """Unknown keys are an error: a checkpoint of a newer version says so instead of losing a counter.

        Raises:
            UserError: such a key.
            ValueError: a counter that does not count.
        """
        names = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise UserError(f"unknown counters {unknown}: this checkpoint was written by another minillm; use that one")
        state = cls(**values)
        for name in ("step", "tokens", "bad_rows"):
            value = getattr(state, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}")
        return state
