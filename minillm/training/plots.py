"""Pictures of a run, drawn from metrics.jsonl: plots/loss.png."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402 (the backend has to be chosen first)
from matplotlib.ticker import MaxNLocator  # noqa: E402


def draw_loss(run_dir: Path, first_val_loss: float | None) -> Path | None:
    """Training and validation loss over steps, the learning rate below them.

    Args:
        first_val_loss: validation loss before the first step, which metrics.jsonl does not hold.

    Returns:
        The picture's path, or None where nothing was logged.
    """
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training = [(r["step"], r["loss"], r["lr"]) for r in records if "loss" in r]
    validation = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if first_val_loss is not None:
        validation.insert(0, (0, first_val_loss))
    if not training:
        return None
    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(7, 4.6), height_ratios=(4, 1))
    steps, losses, rates = zip(*training)
    top.plot(steps, losses, linewidth=1, color="tab:blue", label="training")
    if validation:
        top.plot(*zip(*validation), "o-", markersize=4, linewidth=1.5, color="tab:orange", label="validation")
        step, loss = validation[-1]
        top.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=9)
    top.set_ylabel("loss (nats a token)")
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    top.set_title(run_dir.name)
    bottom.plot(steps, rates, linewidth=1, color="tab:gray")
    bottom.set_ylabel("learning rate", fontsize=8)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.grid(alpha=0.3)
    path = run_dir / "plots" / "loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
