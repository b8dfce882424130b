"""A watched run as a picture: size, gradient and update of every tensor over the steps."""

from __future__ import annotations

import csv
import math
from pathlib import Path

PICTURE = "trace.png"
_PANELS = (
    ("rms", "RMS of the values"),
    ("gradient_norm", "norm of the gradient"),
    ("update_ratio", "RMS of the update / RMS of the parameter"),
)
_MOST_LABELS = 24  # more names have a line, but no place in the legend


def draw_watch(table: str | Path, picture: str | Path, title: str = "") -> None:
    """Draw a run's trace.csv as PNG: a line per name, steps to the right, logarithmic upwards.

    Activations are drawn through, parameters dashed; colours follow the order of the forward pass.
    Values of 0, and those that a column does not have, leave a gap.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with Path(table).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        lines.setdefault((row["name"], row["kind"]), []).append(row)
    figure = Figure(figsize=(15, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    shades = colormaps["viridis"]
    for axes, (column, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for place, ((name, kind), held) in enumerate(lines.items()):
            values = [_positive(row[column]) for row in held]
            if any(map(math.isfinite, values)):
                axes.set_yscale("log")
            axes.plot(
                [int(row["step"]) for row in held],
                values,
                color=shades(0.92 * place / max(len(lines) - 1, 1)),
                linestyle="-" if kind == "activation" else "--",
                linewidth=1.2,
                marker="o" if len(held) < 30 else "",
                markersize=2.5,
                label=name if place < _MOST_LABELS else None,
            )
        axes.set_xlabel("optimiser step")
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.25)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        more = len(lines) - len(labels)
        heading = f"the first {len(labels)} of {len(lines)} names" if more else None
        figure.legend(
            handles, labels, loc="outside right upper", frameon=False, fontsize=7, title=heading
        )
    figure.suptitle(title)
    figure.savefig(str(picture))


def _positive(text: str) -> float:
    value = float(text) if text else math.nan
    return value if 0 < value < math.inf else math.nan
