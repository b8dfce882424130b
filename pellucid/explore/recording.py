"""A run as answers that need no server: what a page would ask for, asked beforehand."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import Any
from urllib.parse import quote

from pellucid import names
from pellucid.explore import attribution
from pellucid.explore.cards import card
from pellucid.explore.manifest import describe_model, describe_run
from pellucid.explore.packing import packed, plain, without_batch
from pellucid.explore.predictions import entropy, likeliest
from pellucid.explore.reduce import statistics
from pellucid.explore.runs import ExploredRun

Answers = dict[str, tuple[dict[str, str], bytes]]  # path with query -> headers, body
ROOM = 24 << 20  # bytes of tensors in a recording
LENS_TOP = 8  # guesses of a cell of the lens, as the page asks for
CARDS = 250  # steps; of a longer run the first layer's stand for all


def encoded(text: str) -> str:
    """`text` in a query, as browsers write it (encodeURIComponent)."""
    return quote(text, safe="!'()*-._~")


def record(run: ExploredRun, room: int = ROOM) -> Generator[Any, None, None]:
    """The answers about a run, by path; yields None in between and the answers last.

    Whole tensors in the order of the pass while there is `room`, and what is asked about all of
    them: manifest, models, norms, lens, heads, parts of the likeliest token's logit, cards.
    """
    answers: Answers = {}
    path = f"/api/runs/{run.id}"

    def add(query: str, value: Any) -> None:
        body = json.dumps(plain(value), ensure_ascii=False).encode()
        answers[query] = {"Content-Type": "application/json"}, body

    add("/api/models", {"models": [describe_model(run.loaded)]})
    add(path, describe_run(run))
    add(f"{path}/norms", attribution.norms(run))
    below = len(run.stream)
    while below:
        at = attribution.lens_below(run, below)
        found = yield from _last_of(attribution.lens(run, LENS_TOP, at=at))
        add(f"{path}/lens?top={LENS_TOP}&below={below}", found)
        below = at.start
    last = len(run.ids) - 1
    for row in range(last + 1):
        logits = run.logits(row)
        told = {"row": row, "top": likeliest(run.loaded.lm, logits, 20), "entropy": entropy(logits)}
        add(f"{path}/logits?row={row}&top=20", told)
    token = int(run.logits(last).argmax())
    found = yield from _last_of(attribution.contributions(run, last, token))
    add(f"{path}/contributions?row={last}&id={token}", found)
    for layer in range(run.loaded.config.n_layers):
        add(f"{path}/heads?layer={layer}", attribution.heads(run, layer))
        yield None
    every = len(run) <= CARDS
    for name in run:
        if every or names.layer_of(name) in (None, 0):
            add(f"{path}/card?step={encoded(name)}", card(run, name))
            yield None
    for name in run:
        tensor = without_batch(run, name)
        room -= tensor.nbytes
        if room < 0:
            break
        body, headers = packed(tensor)
        kind = {"Content-Type": "application/octet-stream"}
        answers[f"{path}/tensor?at={encoded(name)}"] = {**kind, **headers}, body
        add(f"{path}/statistics?name={encoded(name)}", statistics(tensor))
        yield None
    yield answers


def _last_of(work: Generator[Any, None, None]) -> Generator[None, None, Any]:
    """Yields None for each step of `work` and returns the last thing that it yields."""
    answer = None
    for step in work:
        answer = step
        yield None
    return answer
