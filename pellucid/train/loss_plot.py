"""The losses of a run as a picture."""

from __future__ import annotations

import csv
import math
from pathlib import Path


def draw(log: str | Path, picture: str | Path, title: str = "") -> None:
    """Draw the training and the validation loss of a run's log.csv over its steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with Path(log).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    judged = [(int(r["step"]), float(r["held_out_loss"])) for r in rows if r["held_out_loss"]]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9ab8d4", linewidth=0.8, label="training, each step")
    curve = smoothed(losses, max(0.0, 1 - 50 / max(len(losses), 1)))  # over a fiftieth of the run
    axes.plot(steps, curve, color="#1f5f99", linewidth=1.6, label="training, smoothed")
    if judged:
        at, held_out = zip(*judged, strict=True)
        axes.plot(at, held_out, color="#c2410c", marker="o", markersize=3, label="validation")
        best_step, best = min(judged, key=lambda pair: pair[1])
        axes.annotate(
            f"best {best:.3f} at step {best_step}",
            (best_step, best),
            xytext=(0, 18),
            textcoords="offset points",
            ha="right",
            color="#c2410c",
            arrowprops={"arrowstyle": "-", "color": "#c2410c", "linewidth": 0.6},
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss, nats per token")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(str(picture))


def smoothed(values: list[float], memory: float = 0.95) -> list[float]:
    """An exponential moving average; `memory` is the weight of the old mean, the start unbiased."""
    mean, weight, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            mean, weight = memory * mean + (1 - memory) * value, memory * weight + 1 - memory
        means.append(mean / weight if weight else value)
    return means
