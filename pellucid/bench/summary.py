"""From turns to figures: medians with their range, ratios taken in turns, percent of the limits."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from pellucid.bench.limits import percent_of_bandwidth, percent_of_peak

Turn = Mapping[str, Any]
_SAME_TYPE = {"f32": "float32", "bf16": "bfloat16"}


def summarise(record: Mapping[str, Any], flops: int, baseline: str | None) -> dict[str, Any]:
    """Engine -> measure -> figures, of a record of `Rounds`.

    flops     of the prefill that was timed
    baseline  the engine the others are divided by; None: the first one

    decode, prefill and batched have "median", "min", "max" (tokens/s), "ratio" and "percent"; load
    has "median" and so on in seconds and "to_reading", its ratio to reading the files once; then
    "peak_bytes" after load and decoding, "peak_to_files", what of it came after the imports over
    the size of the weight files, "idle_share" and "agrees": how many greedy tokens of the first
    decoding are those of Pellucid's plain passes in the same number type, before they part
    (None: not known; weights are random, so a nearly equal pair of logits comes soon).
    """
    engines = {name: _turns(record, name) for name in record["engines"]}
    baseline = baseline or next(iter(engines), None)
    table = {}
    for name, turns in engines.items():
        facts = record["engines"][name]
        figures: dict[str, Any] = {}
        for measure in ("decode", "prefill", "batched"):
            if turns.get(measure):
                reference = engines.get(baseline or "", {}).get(measure, [])
                figures[measure] = {
                    **spread([turn["per_second"] for turn in turns[measure]]),
                    "ratio": ratio_in_turns(turns[measure], reference),
                    "percent": _percent(turns[measure], measure, facts, record, flops),
                }
        if facts["loads"] and turns.get("load"):
            figures["load"] = {
                **spread([turn["seconds"] for turn in turns["load"]]),
                "to_reading": statistics.median(
                    turn["seconds"] / turn["read_seconds"] for turn in turns["load"]
                ),
                "start_seconds": statistics.median(turn["start_seconds"] for turn in turns["load"]),
            }
        if turns.get("decode"):
            figures["peak_bytes"] = min(turn["peak_bytes"] for turn in turns["decode"])
            imports = max(turn["imports_bytes"] for turn in turns["load"])
            figures["peak_to_files"] = (figures["peak_bytes"] - imports) / facts["file_bytes"]
            figures["idle_share"] = max(turn["idle_share"] for turn in turns["decode"])
        figures["agrees"] = _agrees(record["engines"], name)
        table[name] = figures
    return {"baseline": baseline, "engines": table}


def _turns(record: Mapping[str, Any], name: str) -> dict[str, list[Turn]]:
    grouped: dict[str, list[Turn]] = {}
    for turn in record["turns"]:
        if turn["engine"] == name:
            grouped.setdefault(turn["measure"], []).append(turn)
    return grouped


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio_in_turns(turns: Sequence[Turn], reference: Sequence[Turn]) -> float | None:
    """Median over the rounds of this engine's speed over the reference's in the same round."""
    theirs = {turn["round"]: turn["per_second"] for turn in reference}
    ratios = [
        turn["per_second"] / theirs[turn["round"]] for turn in turns if turn["round"] in theirs
    ]
    return statistics.median(ratios) if ratios else None


def _percent(
    turns: Sequence[Turn],
    measure: str,
    facts: Mapping[str, Any],
    record: Mapping[str, Any],
    flops: int,
) -> float:
    """Median over the turns of the share of the limit read around each, in percent."""
    settings = record["settings"]
    if measure == "prefill":
        return statistics.median(
            percent_of_peak(turn["per_second"] / settings["prefill"], flops, max(turn["limits"]))
            for turn in turns
        )
    rows = settings["batch"] if measure == "batched" else 1
    return statistics.median(
        percent_of_bandwidth(turn["per_second"] / rows, facts["decode_bytes"], max(turn["limits"]))
        for turn in turns
    )


def _agrees(engines: Mapping[str, Any], name: str) -> int | None:
    """Decoded tokens before this engine parts from the plain passes in its own number type."""
    dtype = name.rpartition("/")[2]
    plain = f"pellucid/eager/{_SAME_TYPE.get(dtype, dtype)}"
    if plain == name or plain not in engines:
        return None
    mine, theirs = (engines[each].get("tokens", {}).get("decode") for each in (name, plain))
    if mine is None or theirs is None:
        return None
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=True))
    )
