"""A diff as one self-contained page: the story, the strip, every tensor by a click.

Everything but the pictures of the tensors is there without JavaScript. Nothing is loaded from
anywhere, and everything that comes from a model, a file or a prompt is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pellucid import graph
from pellucid.show import colours
from pellucid.show.diff_maps import FEW_CELLS, MapPair, smaller
from pellucid.show.diff_story import StoryLine, by_cause, factor, facts, meaning, story
from pellucid.show.diff_strip import WORDS, diverged_steps, strips
from pellucid.show.folding import fold

Json = Mapping[str, Any]
MAPS_BYTES = 2_200_000  # of pictures in a page; what rounding explains best is left out first
_STATIC = Path(__file__).parent / "static"
_SIGNS = {"good": "✓", "declared": "≈", "bad": "✗", "none": "–", "": ""}
# Errors, from none to ten times the tensor's own size.
_ERRORS = {
    "light": (
        "#f7f5ef",
        "#e9e3d3",
        "#dccba7",
        "#dba868",
        "#d27a3a",
        "#b84a2b",
        "#8c1f35",
        "#4d0b33",
    ),
    "dark": (
        "#1d1f24",
        "#2b2a2e",
        "#463829",
        "#74492a",
        "#ab5f2c",
        "#dd7f3f",
        "#f7a87c",
        "#ffe0d6",
    ),
}


def page(report: Json, pairs: Mapping[str, MapPair]) -> str:
    """The page of a report's JSON and of the tensors kept for it (`Maps.pairs`)."""
    title = f"{report['a']} against {report['b']}: {_words(report['verdict'])}"
    body = "\n".join(
        (
            _header(report),
            _story(report),
            _strips(report),
            '<section id="detail" aria-live="polite" hidden></section>',
            _faults(report),
            _findings(report),
            _tensors(report),
            _not_observed(report),
            _legend(),
        )
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_file('diff.css')}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n"
        f'<script type="application/json" id="data">{_data(report, pairs)}</script>\n'
        f"<script>\n{_file('diff.js')}</script>\n</body>\n</html>\n"
    )


def _file(name: str) -> str:
    return (_STATIC / name).read_text(encoding="utf-8")


def _words(verdict: str) -> str:
    return WORDS.get(verdict, verdict)


def _header(report: Json) -> str:
    verdict = report["verdict"]
    first = report["first"]
    headline = _words(verdict).capitalize()
    at = f" at <code>{escape(first['name'])}</code>" if first else ""
    rows = "".join(
        f"<tr><th>{letter}</th>{_cells(facts(side))}</tr>"
        for letter, side in zip("AB", report["sides"], strict=True)
    )
    return (
        f'<header><p class="brand">pellucid diff</p>'
        f'<h1><span class="verdict {verdict}">{headline}</span>{at}</h1>'
        f"<p>{escape(meaning(report))}.</p>"
        f'<table class="sides"><tbody>{rows}</tbody></table></header>'
    )


def _cells(texts: Iterable[str]) -> str:
    return "".join(f"<td>{escape(text)}</td>" for text in texts)


def _story(report: Json) -> str:
    rows = "".join(_story_html(line) for line in story(report))
    return f'<section><h2>In short</h2><dl class="story">{rows}</dl></section>'


def _story_html(line: StoryLine) -> str:
    more = "".join(f"<p>{escape(part)}</p>" for part in line.more)
    sign = f'<span class="sign {line.mark or "plain"}">{_SIGNS[line.mark]}</span>'
    strong = ' class="first"' if line.label == "FIRST" else ""
    return f"<dt>{line.label}</dt><dd{strong}>{sign}<p>{escape(line.text)}</p>{more}</dd>"


def _strips(report: Json) -> str:
    bad = diverged_steps(report["tensors"])
    figures = []
    for step, drawn in strips(report):
        scroll = f'<div class="scroll">{drawn}</div>'
        opened = " open" if step in bad else ""
        figures.append(
            f"<details{opened}><summary>Decoding step {step}</summary>{scroll}</details>"
            if step
            else scroll
        )
    return (
        "<section><h2>Every tensor of B</h2>"
        '<p class="hint">Its error against what rounding explains: in the band it is rounding, '
        'above it is not. <span class="js">Choose one to look into it; ← → go through them.</span>'
        "</p>"
        f"{_key()}{''.join(figures)}</section>"
    )


def _key() -> str:
    marks = (
        ("identical", "identical"),
        ("within-rounding", "within rounding"),
        ("explained", "explained by what B declares"),
        ("diverged", "diverged (▲ beyond 1,000 ×)"),
    )
    items = "".join(f'<li class="{kind}">{told}</li>' for kind, told in marks)
    return f'<ul class="key">{items}<li class="absent">not observed</li></ul>'


def _faults(report: Json) -> str:
    """Faults of one cause together: a wrong eps is one mistake, made in every layer."""
    groups = by_cause(report["faults"])
    if not groups:
        return ""
    told = "".join(_group(side, cause, group) for (side, cause, _), group in groups.items())
    return f"<section><h2>Faults and the replays tried</h2>{told}</section>"


def _group(side: str, cause: str | None, faults: Sequence[Json]) -> str:
    found = "No known cause reproduces it" if faults[0]["tried"] else "No cause was searched for"
    title = escape(cause or found)
    where = "" if side == "b" else " <small>on side A</small>"
    return f'<article class="fault"><h3>{title}{where}</h3>{"".join(map(_fault, faults))}</article>'


def _fault(fault: Json) -> str:
    name = escape(fault["name"])
    said = [fault["where"], fault["note"]]
    said.append(fault["cause"]["evidence"] if fault["cause"] else "")
    told = " · ".join(escape(words) for words in said if words)
    return (
        f'<div><p><a href="#{name}" data-name="{name}"><code>{name}</code></a> '
        f"<small>{told}</small></p>{_tried(fault)}</div>"
    )


def _tried(fault: Json) -> str:
    """The replays, best first; a fit is a cause."""
    if not fault["tried"]:
        return ""

    def badness(trial: Json) -> tuple[bool, float]:
        error = trial["error"]
        return not trial["fits"], float("inf") if error is None else error

    rows = "".join(
        f'<tr class="{"fits" if trial["fits"] else ""}">'
        f'<td class="number">{_error(trial["error"])}</td><td>{escape(trial["cause"])}</td>'
        f"<td>{escape(trial['evidence'])}</td></tr>"
        for trial in sorted(fault["tried"], key=badness)
    )
    count = len(fault["tried"])
    name = escape(fault["name"])
    return (
        f'<details class="tried" data-of="{name}"><summary>{count} replay{"s" * (count > 1)} '
        "tried</summary>"
        '<div class="scroll"><table><thead><tr><th class="number">error left</th>'
        f"<th>hypothesis</th><th>which means</th></tr></thead><tbody>{rows}</tbody></table></div>"
        "</details>"
    )


def _error(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}" if error else "0"


def _findings(report: Json) -> str:
    if not report["static"]:
        return ""
    rows = "".join(map(_finding, report["static"]))
    return (
        "<section><h2>Before anything ran</h2>"
        '<div class="scroll"><table><thead><tr><th>stage</th><th>name</th><th>what it is</th>'
        f"<th>what was found</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _finding(finding: Json) -> str:
    return (
        f'<tr class="{finding["kind"]}"><td>{finding["stage"]}</td>'
        f"<td><code>{escape(finding['name'])}</code></td>"
        f"{_cells((finding['cause'], finding['finding']))}</tr>"
    )


def _tensors(report: Json) -> str:
    rows = "".join(map(_tensor, report["tensors"]))
    return (
        f"<section><details><summary><h2>All {len(report['tensors']):,} tensors</h2></summary>"
        '<div class="scroll"><table class="tensors"><thead><tr><th>tensor of B</th><th>verdict</th>'
        '<th class="number">error of A</th><th class="number">error of B</th>'
        '<th class="number">of the allowed</th><th>where, why</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details></section>"
    )


def _tensor(row: Json) -> str:
    name = escape(row["name"])
    where = ", ".join(word for word in (row["where"], row["note"]) if word)
    return (
        f'<tr id="{name}" class="{row["verdict"]}"><td><a href="#{name}" data-name="{name}">'
        f"<code>{name}</code></a></td><td>{_words(row['verdict'])}</td>"
        f"{_numbers(row)}<td>{escape(where)}</td></tr>"
    )


def _numbers(row: Json) -> str:
    """Three cells; without numbers where nothing differs, because R is not computed there."""
    texts = ["–"] * 3
    if row["verdict"] not in ("identical", "not-judged"):
        errors = (row["error_a"], row["error_b"])
        texts = ["∞" if error is None else _error(error) for error in errors]
        texts.append(factor(row["ratio"]))
    return "".join(f'<td class="number">{text}</td>' for text in texts)


def _not_observed(report: Json) -> str:
    missing = report["not_observed"]
    if not missing:
        return ""
    folded = fold(missing, [*(row["name"] for row in report["tensors"]), *missing])
    items = "".join(f"<li><code>{escape(name)}</code></li>" for name in folded)
    return (
        "<section><h2>Not observed</h2><p>B did not show these; what follows from them was judged "
        f'from the nearest tensors before.</p><ul class="names">{items}</ul></section>'
    )


def _legend() -> str:
    return (
        "<footer><p><b>R</b> is A's arithmetic at higher precision on B's own inputs, so an error "
        "does not pile up from tensor to tensor and one fault does not hide the next; where B has "
        "what A's arithmetic gives, bit for bit, nothing more is asked. The "
        "<b>error</b> of a tensor is its RMS distance from R over the RMS of R. Rounding explains "
        "3 times A's own error over a tensor and 8 times over a token, head or channel, and at "
        "least what any order of summation may cost in the coarser dtype. A <b>cause</b> is "
        "replayed: it has to give B's values within rounding.</p></footer>"
    )


# Data for the script ------------------------------------------------------------------------------


def _data(report: Json, pairs: Mapping[str, MapPair]) -> str:
    drawn = _within_budget(report, pairs)
    tensors = {row["name"]: _entry(row, pairs.get(row["name"]), drawn) for row in report["tensors"]}
    first = report["first"]
    held = {
        "tensors": tensors,
        "first": first["name"] if first and first["name"] in tensors else None,
        "tokens": report["tokens"],
        "values": {"light": colours.LIGHT, "dark": colours.DARK},
        "errors": _ERRORS,
        "not_finite": colours.NOT_A_NUMBER,
    }
    text = json.dumps(held, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _within_budget(report: Json, pairs: Mapping[str, MapPair]) -> dict[str, Json]:
    """The pictures that fit into the page, those that differ most first."""
    drawn, size = {}, 0
    for row in sorted(report["tensors"], key=_urgency):
        pair = pairs.get(row["name"])
        if pair is None:
            continue
        few = row["verdict"] != "diverged"
        picture = (smaller(pair, FEW_CELLS) if few else pair).to_json()
        if picture["reference"] == picture["seen"]:
            del picture["reference"]
        size += sum(
            len(picture[part]) for part in ("reference", "seen", "error") if part in picture
        )
        if size > MAPS_BYTES:
            break
        drawn[row["name"]] = picture
    return drawn


def _urgency(row: Json) -> tuple[bool, float]:
    ratio = float("inf") if row["ratio"] is None else row["ratio"]
    return row["verdict"] != "diverged", -ratio


def _entry(row: Json, pair: MapPair | None, drawn: Mapping[str, Json]) -> dict[str, Any]:
    entry = {key: row[key] for key in ("verdict", "error_a", "error_b", "ratio", "where", "note")}
    entry["factor"] = factor(row["ratio"])
    entry["sentence"] = graph.row(row["name"]).sentence if graph.known(row["name"]) else ""
    if pair is not None:
        entry.update(dims=pair.dims, shape=pair.shape, stats=_finite(pair.stats))
        entry["picture"] = drawn.get(row["name"])
    return entry


def _finite(stats: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, str]]:
    return {
        side: {key: f"{value:,.4g}" for key, value in numbers.items()}
        for side, numbers in stats.items()
    }
