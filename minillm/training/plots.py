"""Pictures of a run: plots/loss.png from metrics.jsonl, plots/experts.png from experts.jsonl."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot  # the backend has to be chosen first
from matplotlib.ticker import FixedLocator, MaxNLocator, PercentFormatter

from minillm.run_folder import RunFolder
from minillm.utils.logging import say, warn

LOADS = {-2: "1/4", -1: "1/2", 0: "even", 1: "2x", 2: "4x"}  # log2(share * E) -> its name on the colour bar
MAX_COLUMNS = 200  # of the heat map, over time


def draw(folder: RunFolder, first_val_loss: float | None) -> None:
    """plots/loss.png, and plots/experts.png where there are experts, of what has been logged; a line for each.

    A picture that cannot be written is a warning: the run itself is whole, and saved.
    """
    try:
        pictures = draw_loss(folder, first_val_loss), draw_experts(folder)
    except (OSError, ValueError) as error:
        warn(f"no picture could be written to {folder.loss_picture.parent}: {error}")
        return
    for picture in filter(None, pictures):
        say(f"drew {picture}")


def draw_loss(folder: RunFolder, first_val_loss: float | None) -> Path | None:
    """Training and validation loss over steps, the learning rate below them.

    Args:
        first_val_loss: validation loss before the first step, which metrics.jsonl does not hold.

    Returns:
        The picture's path, or None where nothing was logged.
    """
    records = read_records(folder.metrics)
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
    top.set_title(folder.path.name)
    bottom.plot(steps, rates, linewidth=1, color="tab:gray")
    bottom.set_ylabel("learning rate", fontsize=8)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.grid(alpha=0.3)
    return _save(figure, folder.loss_picture)


def read_records(path: Path) -> list[dict]:
    """A JSONL file's objects; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _save(figure, path: Path, dpi: int = 120) -> Path:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    pyplot.close(figure)
    return path


def draw_experts(folder: RunFolder) -> Path | None:
    """Heat map of each expert's load over steps, black where it got nothing; the worst load and the drops below it.

    Returns:
        The picture's path, or None where no experts were logged.
    """
    records = read_records(folder.experts)
    if not records:
        return None
    layers, shares = records[-1]["layers"], np.array([record["share"] for record in records])  # [N, L, E]
    edges, columns = _columns([record["step"] for record in records])
    loads = np.stack([shares[column].mean(0) for column in columns], -1) * shares.shape[-1]  # [L, E, columns]
    experts = loads.shape[1]
    rows = len(layers) * experts
    height = min(max(0.13 * rows, 2.4), 9.6)
    figure, (top, bottom) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, height + 1.9), height_ratios=(height, 1.1), layout="constrained"
    )

    with np.errstate(divide="ignore"):
        values = np.log2(loads).clip(min(LOADS), max(LOADS))
    colours = pyplot.get_cmap("coolwarm").with_extremes(bad="black")  # light grey in the middle: white lines show
    masked = np.ma.masked_where(loads == 0, values).reshape(rows, -1)
    image = top.pcolormesh(edges, np.arange(rows + 1), masked, cmap=colours, vmin=min(LOADS), vmax=max(LOADS))
    top.invert_yaxis()
    for row in range(1, len(layers)):
        top.axhline(row * experts, color="white", linewidth=1.2 if height * 72 / len(layers) > 12 else 0.6)
    names = [f"layer {layer}" if isinstance(layer, int) else layer for layer in layers]
    size = 9 if height / len(layers) > 0.2 else 7
    top.set_yticks([(row + 0.5) * experts for row in range(len(layers))], names, fontsize=size)
    top.tick_params(axis="y", length=0)
    top.tick_params(axis="x", labelbottom=False)
    if height / rows > 0.11:  # room for the experts' own numbers
        top.set_yticks(np.arange(rows) + 0.5, [str(row % experts) for row in range(rows)], minor=True, fontsize=6)
        top.tick_params(axis="y", which="major", pad=16)
    title = f"{folder.path.name}: {experts} experts a layer, load over an even share (black: no token)"
    top.set_title(title, fontsize=11)
    bar = top.inset_axes((1.015, 1 - min(1, 3 / height), 0.02, min(1, 3 / height)))  # never longer than 3 inches
    figure.colorbar(image, cax=bar, ticks=list(LOADS), extend="both").ax.set_yticklabels(LOADS.values())

    steps = [record["step"] for record in records]
    mark = {"linewidth": 1, "marker": "." if len(steps) == 1 else None}
    worst = [max((v for v in record["max_over_mean"] if v is not None), default=np.nan) for record in records]
    dropped = [sum(record["dropped"]) / len(layers) for record in records]
    bottom.plot(steps, worst, **mark, color="tab:red")
    bottom.set_ylabel("worst\nmax / mean", fontsize=8, color="tab:red")
    bottom.set_ylim(bottom=1)
    right = bottom.twinx()
    right.plot(steps, dropped, **mark, color="tab:gray")
    right.set_ylabel("dropped", fontsize=8, color="tab:gray")
    right.set_ylim(0, max(0.01, 1.1 * max(dropped)))
    right.yaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]) if any(dropped) else FixedLocator([0]))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None if any(dropped) else 0))
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.grid(alpha=0.3)
    return _save(figure, folder.experts_picture, dpi=120 if rows < 600 else 200)


def _columns(steps: list[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """At most MAX_COLUMNS groups of neighbouring records: the steps between which they stand, and their places."""
    groups = np.array_split(np.arange(len(steps)), min(MAX_COLUMNS, len(steps)))
    ends = [steps[group[-1]] for group in groups]
    first = steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1)
    return np.array([first, *ends]), groups
