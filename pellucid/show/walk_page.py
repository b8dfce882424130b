"""The walk as one self-contained page: words and numbers for everybody, pictures drawn from data.

The page is complete without JavaScript: titles, formulas, source, statistics, a corner of the
numbers. With it every tensor is a picture to point at. Nothing is loaded from anywhere.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from itertools import count
from typing import Any

import numpy as np

from pellucid.show import glossary
from pellucid.show.colours import DARK, LIGHT, scale_of
from pellucid.show.digest import Digest, hidden_cells, shape_text, visible
from pellucid.walk.chapters import Chapters

ELEMENTS = 6_144  # values of one picture; the page of a small model stays below 3 MB
_LABELLED = ("heatmap", "attention", "rays", "bars")


def page(told: Mapping[str, Any], steps: Sequence[Digest]) -> str:
    """The HTML of a walk.

    told   model, prompt, tokens, token_strings, next_token, next_text, top, as in the JSON
    steps  what is shown of each step, in order
    """
    pictures: dict[str, dict[str, Any]] = {}
    shown = {step.address for step in steps}
    anchors = count(1)
    contents: list[str] = []
    body: list[str] = []
    chapters = Chapters()
    for step in steps:
        chapter = chapters.begins(step)
        if chapter is not None:
            anchor = f"chapter-{next(anchors)}"
            contents.append(f'</ul><h2><a href="#{anchor}">{escape(chapter)}</a></h2><ul>')
            body.append(f'<h2 id="{anchor}">{escape(chapter)}</h2>')
        title = escape(step.title)
        link = f'<a href="#{escape(step.address)}" title="{title}">{title}</a>'
        contents.append(f"<li>{link}</li>")
        body.append(_step(step, shown, pictures))
    data = {
        "tokens": [visible(text, 16) for text in told["token_strings"]],
        "pictures": pictures,
        "light": LIGHT,
        "dark": DARK,
    }
    static = files("pellucid.show") / "static"
    return _PAGE.format(
        title=escape(f"{visible(told['prompt'], 60)} · {told['model']} · Pellucid"),
        css=(static / "walk.css").read_text("utf-8"),
        js=(static / "walk.js").read_text("utf-8"),
        model=escape(str(told["model"])),
        prompt=escape(visible(told["prompt"])),
        count=len(steps),
        tokens=_tokens(told),
        contents="".join(contents).removeprefix("</ul>") + "</ul>",
        body="\n".join(body),
        end=_end(told),
        words=glossary.entries(),
        data=json.dumps(data, ensure_ascii=False).replace("</", "<\\/"),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#text">To the text</a>
<nav aria-label="Contents">
<p class="brand">Pellucid · the walk</p>
<details id="contents" open><summary>Contents<span id="where"></span></summary>
{contents}
<h2><a href="#words">Words</a></h2>
</details>
</nav>
<main id="text">
<header>
<h1><span class="prompt">{prompt}</span></h1>
<p>From this text to its next token through <code>{model}</code>, one named tensor at a time:
{count} steps. Blue is below zero, ochre above; hatched is what a token may not look at. Point at a
picture, tap it, or tab to it and use the arrow keys, to read single values. A dotted word says
what it means.</p>
{tokens}
</header>
{body}
{end}
{words}
</main>
<p id="reading" role="status" aria-live="polite" hidden></p>
<script type="application/json" id="data">{data}</script>
<script>
{js}</script>
</body>
</html>
"""


def _tokens(told: Mapping[str, Any]) -> str:
    cells = "".join(
        f'<li><span class="string">{escape(visible(text))}</span> '
        f'<span class="id">{token}</span></li>'
        for token, text in zip(told["tokens"], told["token_strings"], strict=True)
    )
    return f'<ol class="tokens" start="0" aria-label="Tokens and their ids">{cells}</ol>'


def _step(step: Digest, shown: set[str], pictures: dict[str, dict[str, Any]]) -> str:
    used: set[str] = set()
    parts = [
        f'<article id="{escape(step.address)}">',
        f"<h3>{glossary.linked(step.title, used)} "
        f'<a class="address" href="#{escape(step.address)}">{escape(step.address)}</a></h3>',
    ]
    if step.sentence and step.sentence.rstrip(".") not in step.title:
        parts.append(f'<p class="sentence">{glossary.linked(step.sentence, used)}</p>')
    parts.append(f'<p class="formula">{escape(step.formula)}</p>')
    if step.inputs:
        parts.append(f'<p class="inputs">from {", ".join(_inputs(step, shown))}</p>')
    parts.append(f'<p class="facts">{escape(_facts(step))}</p>')
    if step.strings:
        parts.append(_strings(step.strings))
    picture = _picture(step)
    if picture is not None:
        pictures[step.address] = picture
        label = f"Picture of {step.address}, shape {shape_text(step.shape)}"
        parts.append(
            f'<figure data-of="{escape(step.address)}"><canvas tabindex="0" role="img" '
            f'aria-label="{escape(label)}"></canvas><figcaption>{_caption(step)}</figcaption></figure>'
        )
    if step.corner:
        parts.append(_folded("values", step.corner))
    if step.source:
        short = step.source.count("\n") < 3
        parts.append(_folded("source", step.source, unfolded=short and step.inputs != ()))
    return "\n".join([*parts, "</article>"])


def _inputs(step: Digest, shown: set[str]) -> Iterator[str]:
    for address in step.inputs:
        name = f"<code>{escape(address)}</code>"
        yield f'<a href="#{escape(address)}">{name}</a>' if address in shown else name


def _facts(step: Digest) -> str:
    facts = f"{shape_text(step.shape)} {step.dtype}"
    numbers = [(key, value) for key, value in step.stats.items() if value is not None]
    if numbers and not step.dtype.startswith(("int", "bool", "text")):
        facts += " · " + " · ".join(f"{key} {value:.4g}" for key, value in numbers)
    return facts


def _folded(title: str, text: str, *, unfolded: bool = False) -> str:
    state = " open" if unfolded else ""
    return f"<details{state}><summary>{title}</summary><pre>{escape(text)}</pre></details>"


def _strings(strings: Sequence[str]) -> str:
    cells = "".join(f"<li>{escape(visible(text))}</li>" for text in strings)
    return (
        f'<details><summary>all {len(strings)}</summary><ul class="strings">{cells}</ul></details>'
    )


def _picture(step: Digest) -> dict[str, Any] | None:
    """Shape, values and scale of what is drawn, the values as base64 of little-endian float16."""
    if step.part is None or step.picture not in _LABELLED or not step.part.size:
        return None
    if step.picture == "rays":
        drawn = _two_numbers(_small(step))  # (T, D/2, 2)
    elif np.iscomplexobj(step.part):
        return None  # shown as rays, or in pairs by the step that follows
    else:
        drawn = _one_table(step)
    scale = scale_of(drawn)
    rows = step.picture == "attention" or (len(step.dims) > 1 and step.dims[-2] == "T")
    return {
        "kind": step.picture,
        "shape": list(drawn.shape),
        "limit": scale.limit,
        "rows": rows,
        "columns": step.picture == "attention",
        "data": _packed(drawn, scale.limit),
    }


def _small(step: Digest) -> np.ndarray:
    small = step.cut_to(ELEMENTS).part
    assert small is not None, "a digest with a part has one after cutting"
    return small


def _two_numbers(pairs: np.ndarray) -> np.ndarray:
    """Real and imaginary part side by side, (T, pairs, 2)."""
    pairs = np.atleast_2d(pairs)
    return np.stack((np.real(pairs), np.imag(pairs)), axis=-1).astype(np.float32)


def _one_table(step: Digest) -> np.ndarray:
    """Rows and columns: the first of any leading axes; infinity where no token may look."""
    drawn = _small(step).astype(np.float32)
    while drawn.ndim > 2:
        drawn = drawn[0]
    drawn = np.atleast_2d(drawn)
    hidden = np.broadcast_to(hidden_cells(step.name, drawn), drawn.shape)
    return np.where(hidden, np.float32(np.inf), drawn)


def _packed(values: np.ndarray, limit: float) -> str:
    """Values in units of the limit, so that float16 has room for them; beyond 60000 they clip."""
    units = np.where(np.isposinf(values), np.inf, np.clip(values / limit, -6e4, 6e4))
    return base64.b64encode(units.astype("<f2").tobytes()).decode("ascii")


def _caption(step: Digest) -> str:
    small = _small(step)
    if step.picture == "rays":
        return "how far each pair is turned at one position; ← and → or a click: another position"
    text = f"colours {scale_of(_one_table(step))}"  # of what is drawn: without masked cells
    if small.shape != step.shape:
        text += f"; the first {shape_text(small.shape)} of {shape_text(step.shape)}"
    return escape(text)


def _end(told: Mapping[str, Any]) -> str:
    if "next_text" not in told:
        return ""
    best = max((entry["probability"] for entry in told["top"]), default=1.0) or 1.0
    rows = "".join(
        f'<tr><td class="string">{escape(visible(entry["text"]))}</td>'
        f'<td class="id">{entry["token"]}</td>'
        f'<td><span class="bar" style="width:{entry["probability"] / best:.1%}"></span></td>'
        f'<td class="share">{entry["probability"]:.2%}</td></tr>'
        for entry in told["top"]
    )
    return (
        '<article id="next-token" class="end"><h2>The next token is '
        f'<span class="string">{escape(visible(told["next_text"]))}</span></h2>'
        "<table><thead><tr><th>text</th><th>id</th><th></th><th>probability</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></article>"
    )
