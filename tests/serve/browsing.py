"""A browser for the tests of the page: tabs, and how to wait for what they show."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import pellucid
from pellucid.language_model import LanguageModel

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
PROMPT = "def add(a, b):\n    return a"

# Nothing is asked for, and the frame after the last answer was drawn.
QUIET = """async () => {
  const frame = () => new Promise(requestAnimationFrame);
  for (let still = 0; still < 2; ) {
    await frame();
    still = document.body.dataset.asking === "0" ? still + 1 : 0;
  }
}"""
# As the page does when somebody edits its address; ends when the place is there.
GO = """async hash => {
  const { open } = await import("/page/state.js");
  document.activeElement?.blur();
  history.replaceState(null, "", hash || location.pathname);
  await open(location.hash);
}"""
PATIENCE = 90_000  # milliseconds: a test waits for a state, and a busy machine takes its time


@contextmanager
def launch() -> Iterator[Any]:
    """Chromium without a window; skips where it or playwright is missing."""
    api = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM:
        pytest.skip("no Chromium")
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Reader:
    """One tab: what it asked for, what it complained about, and shorthands for its state."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.url, self.complaints, self.asked = url, [], []
        size = {"width": 1280, "height": 800}
        self.context = browser.new_context(**{"viewport": size, **options})
        self.context.set_default_timeout(PATIENCE)
        self.tab = self.context.new_page()
        self.tab.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(error.message))
        self.tab.on("request", lambda request: self.asked.append(request.url))

    def open(self, hash: str = "") -> None:
        """Load the page at a place and wait until it stands."""
        self.tab.goto("about:blank")
        self.tab.goto(f"{self.url}/{hash}")
        self.tab.wait_for_selector("body[data-ready]")

    def go(self, hash: str) -> None:
        """Go to a place of the page that is open, and wait until it is drawn."""
        self.tab.evaluate(GO, hash)
        self.settle()

    def state(self, name: str) -> Any:
        """The value of a signal of state.js."""
        return self.tab.evaluate("name => import('/page/state.js').then(s => s[name].peek())", name)

    def settle(self) -> None:
        """Wait until no request is under way and a frame was drawn."""
        self.tab.evaluate(QUIET)


def changed_demo() -> LanguageModel:
    """demo with one number of one weight changed."""
    lm = pellucid.load("demo")
    with torch.no_grad():
        weight = lm.model.layers[2].attn.v_proj.weight.clone()  # the file's own stays as it is
        weight[3, 5] += 0.5
        lm.model.layers[2].attn.v_proj.weight = torch.nn.Parameter(weight)
    return lm
