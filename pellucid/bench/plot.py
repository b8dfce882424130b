"""A run of the bench as one figure: a bar per engine and measure, with the limit of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "pellucid": "#3b6ea8", "transformers": "#c98a2b", "litgpt": "#7d6ba0", "llama.cpp": "#6b8e5a",
}  # fmt: skip
_MEASURES = {"decode": "decode", "prefill": "prefill", "batched": "decode, {batch} rows"}


def draw(result: dict[str, Any]) -> Figure:
    """Three panels of tokens/s side by side; lines show least to largest, marks the limit.

    The limit of an engine is its median figure over its percent: what it would reach if it read
    memory (or multiplied) as fast as the machine did around its turns.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    engines = result["summary"]["engines"]
    figure = Figure(figsize=(13, 1.4 + 0.32 * len(engines)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_MEASURES), sharey=True)
    for panel, (measure, title) in zip(panels, _MEASURES.items(), strict=True):
        _panel(panel, engines, measure)
        panel.set_title(title.format(**result["settings"]), fontsize=10)
        panel.set_xlabel("tokens/s")
    machine = result["machine"]
    figure.suptitle(
        f"{result['shape']['name']}, random weights, {result['settings']['threads']} threads, "
        f"{machine['cpu']}, {machine['date'][:10]}",
        fontsize=11,
    )
    return figure


def _panel(panel: Axes, engines: dict[str, Any], measure: str) -> None:
    names = list(engines)
    for place, name in enumerate(names):
        figures = engines[name].get(measure)
        if figures is None:
            continue
        median = figures["median"]
        colour = _COLOURS.get(name.partition("/")[0], "#888888")
        panel.barh(place, median, color=colour, height=0.7)
        panel.plot([figures["min"], figures["max"]], [place, place], color="black", linewidth=1)
        if figures["percent"] > 0:
            panel.plot(100 * median / figures["percent"], place, marker="|", color="#b03030", ms=11)
        panel.annotate(
            f" {median:,.3g}  {figures['percent']:.0f}%",
            (max(median, figures["max"]), place),
            va="center",
            fontsize=8,
        )
    panel.set_yticks(range(len(names)), names, fontsize=9)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.margins(x=0.15)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
