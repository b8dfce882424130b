"""Medians, ratios in turns and percentages, worked out by hand; the table and the figure."""

from __future__ import annotations

import copy

import pytest
from rich.console import Console

from pellucid.bench.plot import draw
from pellucid.bench.summary import ratio_in_turns, spread, summarise
from pellucid.show.bench_terminal import report

SETTINGS = {"threads": 2, "rounds": 2, "prompt": 4, "new": 2, "prefill": 10, "batch": 8}
MACHINE = {"cpu": "a chip", "flags": ["avx2"], "memory_bytes": 1 << 34, "date": "2026-01-02T03"}


def turn(engine, measure, number, per_second, limits=(1e9, 2e9), **more):
    return {
        "engine": engine,
        "measure": measure,
        "round": number,
        "per_second": per_second,
        "seconds": 1.0,
        "limits": list(limits),
        "peak_bytes": 1 << 30,
        "idle_share": 0.0,
        **more,
    }


def load(engine, number, seconds, read):
    return turn(
        engine,
        "load",
        number,
        0,
        seconds=seconds,
        read_seconds=read,
        start_seconds=2.0,
        imports_bytes=1 << 29,
    )


def record():
    plain, peer = "pellucid/eager/float32", "llama.cpp/f32"
    turns = [load(plain, 0, 0.5, 0.25), load(peer, 0, 0.2, 0.25)]
    for number, (ours, theirs) in enumerate([(10, 20), (5, 30)]):
        turns += [turn(plain, "decode", number, ours), turn(peer, "decode", number, theirs)]
        turns += [turn(plain, "prefill", number, 100, (4e9, 5e9))]
        turns += [turn(peer, "batched", number, 80, peak_bytes=1 << 31)]
    facts = {
        "decode_bytes": 50_000_000,
        "settings": "",
        "loads": True,
        "dtype": "float32",
        "file_bytes": 1 << 28,
    }
    tokens = {"decode": [[1], [2], [3]]}
    return {
        "settings": SETTINGS,
        "limits": {"bandwidth": {"best": 2e9}, "gemm": {"float32": {"best": 5e9}}},
        "engines": {
            plain: {**facts, "tokens": tokens},
            peer: {**facts, "tokens": {"decode": [[1], [2], [9]]}},
        },
        "skipped": {"litgpt/float32": "not here [at all]"},
        "turns": turns,
    }


def result():
    summary = summarise(record(), flops=100_000_000, baseline=None)
    shape = {"name": "a shape"}
    return {"shape": shape, "machine": MACHINE, **record(), "summary": summary}


def test_figures_by_hand():
    summary = summarise(record(), flops=100_000_000, baseline=None)
    ours, theirs = summary["engines"].values()
    assert summary["baseline"] == "pellucid/eager/float32"
    assert ours["decode"]["median"] == 7.5
    assert (ours["decode"]["min"], ours["decode"]["max"], ours["decode"]["ratio"]) == (5, 10, 1)
    assert theirs["decode"]["ratio"] == 4  # 20/10 and 30/5: the median of 2 and 6
    # 10 and 5 steps of 50 MB against the larger reading of 2 GB/s: 25 % and 12.5 %
    assert ours["decode"]["percent"] == pytest.approx(18.75)
    # 100 tokens/s are 10 passes of 0.1 GFLOP, against 5 GFLOP/s
    assert ours["prefill"]["percent"] == pytest.approx(20)
    # 80 tokens/s in 8 rows are 10 steps
    assert theirs["batched"]["percent"] == pytest.approx(25)
    assert theirs["batched"]["ratio"] is None  # the baseline has no such turn
    assert ours["load"]["to_reading"] == 2
    assert theirs["peak_bytes"] == 1 << 30  # of decoding, not of eight rows
    assert theirs["peak_to_files"] == 2  # half a GiB beyond the imports for a quarter of weights
    assert (ours["agrees"], theirs["agrees"]) == (None, 2)


def test_the_baseline_can_be_chosen():
    summary = summarise(record(), 1, "llama.cpp/f32")
    ours = summary["engines"]["pellucid/eager/float32"]
    assert ours["decode"]["ratio"] == pytest.approx((10 / 20 + 5 / 30) / 2)


def test_a_ratio_compares_the_same_round_only():
    ours = [{"round": 0, "per_second": 6.0}, {"round": 1, "per_second": 100.0}]
    theirs = [{"round": 0, "per_second": 3.0}]
    assert ratio_in_turns(ours, theirs) == 2
    assert ratio_in_turns(ours, []) is None


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def printed(width, shown):
    out = Console(width=width, color_system=None, force_terminal=False)
    with out.capture() as capture:
        report(out, shown)
    return capture.get()


def test_the_table_has_every_engine_and_says_what_was_left_out():
    text = printed(140, result())
    assert "pellucid/eager/float32" in text
    assert "5.0…10.0" in text
    assert "4.00" in text
    assert "left out: litgpt/float32: not here [at all]" in text
    assert "warning" not in text
    assert "5.0…10.0" not in printed(90, result())  # ranges need room


def test_an_idle_worker_that_spins_is_told():
    shown = copy.deepcopy(result())
    shown["summary"]["engines"]["llama.cpp/f32"]["idle_share"] = 0.5
    assert "warning: llama.cpp/f32 takes 50% of a core" in printed(140, shown)


def test_the_figure_has_the_figures():
    figure = draw(result())
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [7.5, 25]
    assert [panel.get_title() for panel in figure.axes][2] == "decode, 8 rows"
