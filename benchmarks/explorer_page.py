"""First view and frame times of the explorer's page, in Chromium, against a running server.

    pellucid serve demo smollm2 &
    python benchmarks/explorer_page.py http://127.0.0.1:8000 [--model smollm2 --tokens 2048]
    python benchmarks/explorer_page.py --shape gpt2 --tokens 100
    python benchmarks/explorer_page.py --shape llama-3.2-1b --dtype bfloat16

With --shape nothing is served: what the page asks first is asked of a model of that shape with
random weights, in this process; seconds and memory are told. --save FILE keeps the answer with the
machine. The first two need playwright (`pip install 'pellucid[dev]'`) and Chromium.
Cold: a new profile each time.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

import pellucid
from pellucid.bench.machine import describe
from pellucid.explore import Runs, attribution
from pellucid.explore.manifest import describe_run
from pellucid.explore.packing import packed, without_batch
from pellucid.explore.predictions import likeliest
from pellucid.families.shapes import SHAPES
from pellucid.language_model import LanguageModel
from pellucid.models.decoder import Decoder

SHOWN = """async () => {
  while (!document.querySelector("main canvas.grid")?.heatmap.plane.overview)
    await new Promise(requestAnimationFrame);
}"""
FRAMES = """async what => {
  const map = document.querySelector("main canvas.grid").heatmap, times = [];
  if (what !== "all") for (let i = 0; i < 40; i++) map.zoom(1.1, 300, 300);
  let before = await new Promise(requestAnimationFrame);
  for (let i = 0; i < 180; i++) {
    if (what === "pan") map.pan(i % 60 < 30 ? -7 : 7, i % 90 < 45 ? -5 : 5);
    if (what === "zoom") map.zoom(i % 60 < 30 ? 1 / 1.05 : 1.05, 320, 300);
    if (what === "all") { map.painted.clear(); map.draw(); }
    const now = await new Promise(requestAnimationFrame);
    times.push(now - before);
    before = now;
  }
  map.hand.fit();
  return times.sort((a, b) => a - b);
}"""


def first_views(browser: Any, url: str, rounds: int) -> list[dict[str, float]]:
    """Milliseconds from the request of the page: first paint, the page usable."""
    found = []
    for _ in range(rounds):
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        tab = context.new_page()
        tab.goto(url)
        tab.wait_for_selector("body[data-ready]")
        found.append(
            tab.evaluate("""() => ({ ready: performance.now(),
            paint: performance.getEntriesByName("first-contentful-paint")[0]?.startTime })""")
        )
        context.close()
    return found


def frames(browser: Any, url: str, model: str, tokens: int) -> dict[str, Any]:
    """Quantiles of the time between frames over a pattern of `tokens` squared cells."""
    tab = browser.new_page(viewport={"width": 1280, "height": 800})
    tab.goto(url)
    chance = random.Random(1)
    body = {"model": model, "ids": [chance.randrange(300, 40000) for _ in range(tokens)]}
    made = tab.evaluate(
        """body => fetch("/api/runs", { method: "POST", body: JSON.stringify(body) })
        .then(answer => answer.json())""",
        body,
    )  # fmt: skip
    tab.goto("about:blank")
    tab.goto(f"{url}/#/{model}/{made['run']}/layers.1.attn.pattern[2]?view=walk")
    tab.evaluate(SHOWN)
    said = {}
    for what in ("all", "pan", "zoom", "pan", "zoom"):  # the first round fetches the tiles
        times = tab.evaluate(FRAMES, what)
        said[what] = {"median": times[90], "p95": times[171], "largest": times[-1]}
    return said


def random_model(shape: str, dtype: str) -> Any:
    """A language model of a published shape with random weights; demo's tokenizer stands in."""
    config = SHAPES[shape].config
    with torch.device("meta"):
        model = Decoder(config).to(getattr(torch, dtype))
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    return LanguageModel(model, pellucid.load("demo").tokenizer)


def of_shape(shape: str, dtype: str, tokens: int) -> dict[str, Any]:
    """Seconds of what the page asks of a run, and what is held within which budget."""
    lm = random_model(shape, dtype)
    runs, chance = Runs({shape: lm}), random.Random(1)
    ids = [chance.randrange(lm.config.vocab_size) for _ in range(tokens)]
    seconds: dict[str, float] = {}

    def timed(what: str, work: Any) -> Any:
        began = time.perf_counter()
        found = work()
        seconds[what] = time.perf_counter() - began
        return found

    run = timed("run", lambda: runs.run(shape, ids))
    timed("manifest", lambda: describe_run(run))
    timed("norms", lambda: attribution.norms(run))
    timed("next token", lambda: likeliest(lm, run.logits(tokens - 1), 10))
    top = attribution.lens_below(run, len(run.stream))
    timed("lens, its first row", lambda: list(attribution.lens(run, 8, at=top)))
    timed("lens", lambda: list(attribution.lens(run, 8)))
    held = []
    for layer in range(lm.config.n_layers):
        name = f"layers.{layer}.attn.pattern[0]"
        timed("a pattern in tiles", lambda name=name: packed(without_batch(run, name), "absmax"))
        held.append(runs.bytes)
    weights = sum(parameter.nbytes for parameter in lm.model.parameters())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "shape": shape, "dtype": dtype, "tokens": tokens, "seconds": seconds,
        "bytes": {"weights": weights, "most held": max(held), "budget": runs.budget, "peak": peak},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", nargs="?", help="of a server; or --shape")
    parser.add_argument("--shape", help="a published shape, such as gpt2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--save", type=Path, help="file for the answer and the machine")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    if given.shape:
        said = of_shape(given.shape, given.dtype, given.tokens)
    elif given.url:
        said = in_browser(given)
    else:
        parser.error("give the URL of a server, or --shape")
    told = json.dumps({"machine": describe(), **said}, indent=1) + "\n"
    if given.save:
        given.save.write_text(told)
    sys.stdout.write(told)


def in_browser(given: argparse.Namespace) -> dict[str, Any]:
    """First views and frames of a server's page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        said: dict[str, Any] = {"first view, ms": first_views(chromium, given.url, given.rounds)}
        said["frames, ms"] = frames(chromium, given.url, given.model, given.tokens)
    return said


if __name__ == "__main__":
    main()
