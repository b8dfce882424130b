"""What ``pellucid bench`` prints: the limits, one table, and what each column says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from rich.console import Console

_WIDE = 112  # characters that the whole table takes
_WIDE_ONLY = (2, 9)
_SPIN = 0.05  # of a core: an idle worker that takes more disturbs the others' turns


def report(out: Console, result: dict[str, Any]) -> None:
    """Print a run."""
    machine, settings, limits = result["machine"], result["settings"], result["limits"]
    out.print(
        f"[bold]{escape(result['shape']['name'])}[/]  random weights; "
        f"{settings['threads']} threads on {escape(machine['cpu'])} "
        f"({', '.join(machine['flags'])}), {machine['memory_bytes'] / 2**30:.0f} GiB"
    )
    _print_limits(out, limits, result["turns"])
    out.print(_table(result, wide=out.width >= _WIDE), crop=False)
    baseline, turns = result["summary"]["baseline"], settings.get("slices", 1)
    out.print(
        f"tokens/s, median of {settings['rounds']} rounds, decoding in {turns} "
        f"turns each (least … largest); × is the ratio to {escape(str(baseline))} in the same "
        "turn\n"
        f"decode: 1 row, {settings['prompt']} tokens before, {settings['new']} new; % of the "
        "bandwidth read around the turn\n"
        f"prefill: {settings['prefill']} tokens; % of a matrix product's FLOP/s in the same type\n"
        f"{settings['batch']} rows: decoding together. load: seconds to a first token, files in "
        "the cache (× reading them once); without imports\n"
        "GiB: largest resident set after load and decoding, mapped files included (× the weight "
        "files, imports taken off)",
        style="dim",
    )
    for name, why in result["skipped"].items():
        out.print(f"left out: {escape(name)}: {escape(why)}", style="dim")
    for name, figures in result["summary"]["engines"].items():
        if figures.get("idle_share", 0) > _SPIN:
            share = figures["idle_share"]
            out.print(f"warning: {name} takes {share:.0%} of a core while it waits for its turn")


def _print_limits(out: Console, limits: dict[str, Any], turns: list[dict[str, Any]]) -> None:
    if not limits:
        return
    read = [rate for turn in turns if turn["measure"] == "decode" for rate in turn["limits"]]
    between = f", {min(read) / 1e9:.1f} to {max(read) / 1e9:.1f} between the turns" if read else ""
    peaks = ", ".join(
        f"{peak['best'] / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in limits["gemm"].items()
    )
    out.print(
        f"limits: reading {limits['bandwidth']['best'] / 1e9:.1f} GB/s{between}; "
        f"matrix product {peaks}"
    )


def _table(result: dict[str, Any], wide: bool) -> Table:
    """A row per engine; without the ranges and the least ratio where the screen is narrow."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="dim")
    rows = f"{result['settings']['batch']} rows"
    headings = [
        "engine", "decode", "", "×", "%", "prefill", "×", "%", rows, "×", "load", "GiB",
    ]  # fmt: skip
    kept = [place for place in range(len(headings)) if wide or place not in _WIDE_ONLY]
    for place in kept:
        table.add_column(headings[place], justify="right" if place else "left", no_wrap=True)
    family = None
    for name, figures in result["summary"]["engines"].items():
        if family not in (None, name.partition("/")[0]):
            table.add_section()
        family = name.partition("/")[0]
        cells = _cells(name, figures)
        table.add_row(*(cells[place] for place in kept))
    return table


def _cells(name: str, figures: dict[str, Any]) -> list[str]:
    decode, prefill, batched = (figures.get(key) for key in ("decode", "prefill", "batched"))
    return [
        escape(name),
        _speed(decode),
        f"{_short(decode['min'])}…{_short(decode['max'])}" if decode else "",
        _ratio(decode),
        f"{decode['percent']:.0f}" if decode else "–",
        _speed(prefill),
        _ratio(prefill),
        f"{prefill['percent']:.0f}" if prefill else "–",
        _speed(batched),
        _ratio(batched),
        _load(figures.get("load")),
        _peak(figures),
    ]


def _short(speed: float) -> str:
    """Three digits, as many as a measurement deserves."""
    return f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}"


def _speed(figures: dict[str, Any] | None) -> str:
    return f"[bold]{_short(figures['median'])}[/]" if figures else "–"


def _ratio(figures: dict[str, Any] | None) -> str:
    return f"{figures['ratio']:.2f}" if figures and figures["ratio"] is not None else "–"


def _load(figures: dict[str, Any] | None) -> str:
    return f"{figures['median']:.2f} ({figures['to_reading']:.0f}×)" if figures else "–"


def _peak(figures: dict[str, Any]) -> str:
    if "peak_bytes" not in figures:
        return "–"
    return f"{figures['peak_bytes'] / 2**30:.2f} ({figures['peak_to_files']:.1f}×)"
