"""First view and frame times of the explorer's page, in Chromium, against a running server.

    pellucid serve demo smollm2 &
    python benchmarks/explorer_page.py http://127.0.0.1:8000 [--model smollm2 --tokens 2048]

Needs playwright (`pip install 'pellucid[dev]'`) and Chromium. Cold: a new profile each time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from typing import Any

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        said: dict[str, Any] = {"first view, ms": first_views(chromium, given.url, given.rounds)}
        said["frames, ms"] = frames(chromium, given.url, given.model, given.tokens)
        sys.stdout.write(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
