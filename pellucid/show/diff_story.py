"""A diff told in lines: what an engineer reads in ten seconds, on the terminal and on the page.

The input is the JSON of a report, so that whatever is said here can be read there as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pellucid.show import served_story
from pellucid.show.folding import fold

Mark = Literal["good", "declared", "bad", "none", ""]
Json = Mapping[str, Any]
VERDICTS = ("identical", "within-rounding", "explained", "diverged", "not-judged")
_MEANING = {
    "identical": "every observed tensor is equal in every bit",
    "within-rounding": "B is as close to the exact result as A's own arithmetic is",
    "explained": "B differs, and what it declares (dtype, dialect, quantisation) accounts for it",
    "diverged": "B does not compute what A computes",
}


@dataclass(frozen=True, kw_only=True)
class StoryLine:
    """One row of the story: its label, a mark, the sentence and what stands below it."""

    label: str
    text: str
    mark: Mark = ""
    more: tuple[str, ...] = ()


def story(report: Json) -> list[StoryLine]:
    """tokens → weights → constants → forward → FIRST → cause → effect → also → not observed."""
    if "served" in report:
        return _served(report)
    return [
        _tokens(report),
        _weights(report),
        _constants(report),
        _forward(report),
        *_first(report),
        *_effect(report),
        *_also(report),
        *_not_observed(report),
        *([StoryLine(label="note", text=report["note"])] if report["note"] else []),
    ]


def _served(report: Json) -> list[StoryLine]:
    told = (served_story.tokens(report), served_story.logprobs(report),
            *served_story.first(report), served_story.effect(report))  # fmt: skip
    lines = [
        StoryLine(label=label, text=text, mark=mark, more=more) for label, text, mark, more in told
    ]
    return lines + ([StoryLine(label="note", text=report["note"])] if report["note"] else [])


def facts(side: Json) -> tuple[str, str, str]:
    """A side in three columns: what, which model, whose arithmetic."""
    model = f"{side['family']}, {side['n_layers']} layers, width {side['width']}"
    model = model if side["family"] else "trace file" if side["recorded"] else ""
    dialect = f", dialect {side['dialect']}" if side["dialect"] else ""
    explained = f", {side['explained']}" if side["explained"] else ""
    return side["label"], model, f"{side['dtype']}{dialect}{explained}"


def meaning(report: Json) -> str:
    """What the verdict says, in one sentence."""
    verdict = report["verdict"]
    if "served" in report and (verdict != "diverged" or report["faults"]):
        return served_story.MEANING[verdict]
    if verdict == "diverged" and not report["faults"]:
        return "the two were not given the same model: see the findings above"
    return _MEANING[verdict]


def factor(ratio: float | None) -> str:
    """``"5,412 ×"``; None stands for infinity."""
    if ratio is None:
        return "∞ ×"
    if ratio >= 1e6:
        return f"{ratio:.1e} ×".replace("e+0", "e").replace("e+", "e")
    return f"{ratio:,.0f} ×" if ratio >= 10 else f"{ratio:.2g} ×"


def _tokens(report: Json) -> StoryLine:
    rows = report["tokens"]
    lengths = sorted({len(row) for row in rows})
    size = "…".join(map(str, lengths[:: max(1, len(lengths) - 1)]))
    rows_said = "" if len(rows) == 1 else f"{len(rows)} rows of "
    ran = f"{rows_said}{size} tokens"
    if _of_stage(report, "tokens"):
        return _findings(report, "tokens", "")
    if report["encoded"]:
        return StoryLine(label="tokens", mark="good", text=f"{ran}, the same from both tokenizers")
    return StoryLine(label="tokens", mark="none", text=f"{ran}; encodings not compared")


def _weights(report: Json) -> StoryLine:
    absent = _without(report, "parameters")
    if absent:
        return StoryLine(label="weights", mark="none", text=f"not compared: no weights {absent}")
    count = report["sides"][0]["parameters"]
    return _findings(report, "weights", f"{count:,} tensors, equal in every bit")


def _constants(report: Json) -> StoryLine:
    absent = _without(report, "family")
    if absent:
        return StoryLine(label="constants", mark="none", text=f"not compared: no config {absent}")
    return _findings(report, "constants", "the two configs say the same")


def _without(report: Json, what: str) -> str:
    """Where something is not known: "", "in A", "in B" or "in A and B"."""
    absent = [side for side, facts in zip("AB", report["sides"], strict=True) if not facts[what]]
    return f"in {' and '.join(absent)}" if absent else ""


def _of_stage(report: Json, stage: str) -> list[Json]:
    return [finding for finding in report["static"] if finding["stage"] == stage]


def _findings(report: Json, stage: str, nothing: str) -> StoryLine:
    """What a static stage found, findings of one cause in one line."""
    found = _of_stage(report, stage)
    if not found:
        return StoryLine(label=stage, mark="good", text=nothing)
    groups: dict[tuple[str, str], list[Json]] = {}
    for finding in found:
        groups.setdefault((finding["cause"], finding["kind"]), []).append(finding)
    told = []
    for (cause, _), group in groups.items():
        where = ", ".join(fold(finding["name"] for finding in group))
        if stage == "weights" and len(group) == report["sides"][0]["parameters"]:
            where = f"all {len(group):,} tensors"
        example = group[0]["finding"]
        example = example if len(group) == 1 else f"the first of {len(group):,}: {example}"
        told.append(f"{cause} ({example})" if where == stage else f"{where}: {cause} ({example})")
    bad = any(finding["kind"] == "fault" for finding in found)
    mark: Mark = "bad" if bad else "declared"
    return StoryLine(label=stage, mark=mark, text=told[0], more=tuple(told[1:]))


def _forward(report: Json) -> StoryLine:
    tensors = report["tensors"]
    counts = dict.fromkeys(VERDICTS, 0)
    for row in tensors:
        counts[row["verdict"]] += 1
    shown = [f"{n:,} {verdict.replace('-', ' ')}" for verdict, n in counts.items() if n]
    faulty = [fault for fault in report["faults"] if fault["side"] == "a"]
    text = f"{len(tensors):,} tensors of B: {', '.join(shown)}"
    if faulty:
        text += f"; {len(faulty)} of A diverged"
    judged = [row for row in tensors if row["verdict"] in VERDICTS[1:4]]
    more = ()
    if judged:
        worst = max(judged, key=lambda row: float("inf") if row["ratio"] is None else row["ratio"])
        if worst["ratio"] != 0:
            more = (f"the worst, {worst['name']}: {_times_explained(worst)}",)
    bad = counts["diverged"] or faulty
    mark: Mark = "bad" if bad else "declared" if counts["explained"] else "good"
    return StoryLine(label="forward", mark=mark, text=text, more=more)


def _times_explained(row: Json) -> str:
    if row["ratio"] is None:
        return row["note"] or "beyond anything that rounding explains"
    return f"{factor(row['ratio'])} what rounding explains"


def _first(report: Json) -> Iterator[StoryLine]:
    first = report["first"]
    if first is None:
        faults = [finding for finding in report["static"] if finding["kind"] == "fault"]
        if faults:
            name, found = faults[0]["name"], faults[0]["finding"]
            yield StoryLine(label="FIRST", mark="bad", text=name, more=(found,))
            yield StoryLine(label="cause", mark="bad", text=faults[0]["cause"])
        return
    where = f", {first['where']}" if first["where"] else ""
    side = " on side A" if first["side"] == "a" else ""
    step = f", decoding step {first['step']}" if first["step"] else ""
    yield StoryLine(
        label="FIRST", mark="bad", text=f"{first['name']}{where}{step}{side}", more=_size(first)
    )
    yield _cause(report)


def _size(fault: Json) -> tuple[str, ...]:
    if fault["error_b"] is None or fault["ratio"] is None:
        return (fault["note"],) if fault["note"] else ("no number can say how far",)
    mine = "the arithmetic it declares" if fault["side"] == "a" else "A's own"
    errors = f"error {fault['error_b']:.2g} against {fault['error_a']:.2g} of {mine}"
    note = (fault["note"],) if fault["note"] else ()
    return (f"{errors}: {_times_explained(fault)}", *note)


def _cause(report: Json) -> StoryLine:
    cause, tried = report["cause"], len(report["first"]["tried"])
    if cause is not None:
        return StoryLine(label="cause", mark="bad", text=cause["name"], more=(cause["evidence"],))
    if not tried:
        return StoryLine(label="cause", mark="none", text="nothing known could be tried on it")
    return StoryLine(
        label="cause", mark="none", text=f"no known cause reproduces it; {tried} were tried"
    )


def _effect(report: Json) -> Iterator[StoryLine]:
    effect = report["effect"]
    if effect is None:
        yield StoryLine(label="effect", mark="none", text="unknown: the logits of both are needed")
        return
    mean, most = (
        "∞" if kl is None else f"{kl:.2g}" for kl in (effect["kl_mean"], effect["kl_max"])
    )
    kl = f"KL(A ‖ B) {mean} nats on average, {most} at most"
    top = effect["top1"]
    agree = (
        "everywhere" if top == 1 else f"after {100 * top:.3g} % of the tokens" if top else "nowhere"
    )
    yield StoryLine(label="effect", text=f"{kl}; the same likeliest next token {agree}")


def _also(report: Json) -> Iterator[StoryLine]:
    """The faults after the first, in groups of one cause."""
    faults, everything = report["faults"], [row["name"] for row in report["tensors"]]
    told = []
    for (side, cause, _), group in by_cause(faults[1:]).items():
        names = ", ".join(fold((fault["name"] for fault in group), everything))
        where = " on side A" if side == "a" else ""
        told.append(f"{names}{where}: {_reason(report, side, cause, group)}")
    if told:
        yield StoryLine(label="also", mark="bad", text=told[0], more=tuple(told[1:]))


def by_cause(faults: Sequence[Json]) -> dict[tuple[str, str | None, bool], list[Json]]:
    """Faults by side, cause and whether one was searched for, in the order they come up."""
    groups: dict[tuple[str, str | None, bool], list[Json]] = {}
    for fault in faults:
        cause = fault["cause"]["name"] if fault["cause"] else None
        groups.setdefault((fault["side"], cause, bool(fault["tried"])), []).append(fault)
    return groups


def _reason(report: Json, side: str, cause: str | None, group: Sequence[Json]) -> str:
    first = report["first"]
    if cause is None:
        them = "it" if len(group) == 1 else "them"
        return f"no known cause reproduces {them}" if group[0]["tried"] else "not searched for"
    same = first["cause"] is not None and (side, cause) == (first["side"], first["cause"]["name"])
    return "the same cause" if same else cause


def _not_observed(report: Json) -> Iterator[StoryLine]:
    missing = report["not_observed"]
    if missing:
        everything = [*(row["name"] for row in report["tensors"]), *missing]
        folded = fold(missing, everything)
        yield StoryLine(label="not observed", mark="none", text=folded[0], more=tuple(folded[1:]))
