"""The walk's page: whole without scripts, safe for any prompt, and drawn in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import CONFIGS, random_model

from pellucid.numerics import dialect
from pellucid.show.digest import Digest, digest
from pellucid.show.walk_page import page
from pellucid.walk import walk

STRINGS = ["def", " <b>&\"'", "\n", "</script>", "\u202eאב", "🦙"]


def told_and_steps(kind: str) -> tuple[dict[str, Any], list[Digest]]:
    config = CONFIGS[kind]
    model = random_model(config)
    tokens = [5, 1, 7, 9, 2, 3]
    steps = walk(
        config, dict(model.state_dict()), tokens, token_strings=STRINGS,
        dialect=dialect("hf", config.rounding), layer=1, head=1,
    )  # fmt: skip
    told = {
        "model": "a <model>",
        "prompt": "".join(STRINGS),
        "tokens": tokens,
        "token_strings": STRINGS,
        "next_token": 4,
        "next_text": "</td>",
        "top": [{"token": 4, "text": "</td>", "probability": 0.75}],
    }
    return told, [digest(step) for step in steps]


class Reader(HTMLParser):
    """Ids, links and open tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if values.get("id") else []
        self.links += [values["href"]] if values.get("href") else []
        assert tag not in ("b", "img", "iframe"), f"<{tag}> came from the prompt"
        assert not values.get("src"), "the page loads something"


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_every_step_has_its_place_and_every_link_leads_there(kind: str):
    told, steps = told_and_steps(kind)
    html = page(told, steps)
    reader = Reader()
    reader.feed(html)
    assert len(set(reader.ids)) == len(reader.ids)
    assert {step.address for step in steps} <= set(reader.ids)
    assert {link[1:] for link in reader.links} <= set(reader.ids)
    assert all(link.startswith("#") for link in reader.links)
    assert len(html) < 3e6
    assert html.count("<article") == len(steps) + 1


def test_nothing_of_the_prompt_is_code():
    html = page(*told_and_steps("gpt2"))
    assert html.count("</script>") == 2  # the data and the code end; the prompt's does not
    assert "<b>" not in re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert "\u202e" not in html  # nothing turns the text around
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))  # type: ignore
    assert data["tokens"][3] == "</script>"


def test_pictures_hold_the_values():
    told, steps = told_and_steps("llama-gqa")
    html = page(told, steps)
    data = json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))  # type: ignore
    by_address = {step.address: step for step in steps}
    for address in ("embed", "layers.1.attn.q[1]", "layers.1.attn.pattern[1]"):
        picture = data["pictures"][address]
        units = np.frombuffer(base64.b64decode(picture["data"]), "<f2").reshape(picture["shape"])
        part = by_address[address].part
        assert part is not None
        seen = np.isfinite(units)
        drawn = units.astype(np.float64) * picture["limit"]
        np.testing.assert_allclose(drawn[seen], part[seen], rtol=2e-3, atol=2e-3)
    hidden = data["pictures"]["layers.1.attn.masked_scores[1]"]
    units = np.frombuffer(base64.b64decode(hidden["data"]), "<f2").reshape(6, 6)
    np.testing.assert_array_equal(np.isinf(units), np.triu(np.ones((6, 6), bool), 1))
    assert data["pictures"]["rope.cis"]["shape"] == [6, 5, 2]


def test_without_scripts_words_and_numbers_are_there():
    told, steps = told_and_steps("gpt2")
    text = re.sub(r"<script.*?</script>", "", page(told, steps), flags=re.S)
    for words in ("75.00%", "layers.1.attn.scores[1]", "return", "float64", "std "):
        assert words in text


@pytest.mark.browser
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_in_a_browser(tmp_path: Path):
    told, steps = told_and_steps("llama-gqa")
    path = tmp_path / "walk.html"
    # Figures are drawn as they come into view, which headless Chromium may never show under load;
    # before printing all are drawn at once. Then the page writes down how many have ink.
    count = (
        "<script>addEventListener('load', () => { dispatchEvent(new Event('beforeprint'));"
        "const inked = (c) => c.width && c.getContext('2d').getImageData(0, 0, c.width, c.height)"
        ".data.some((v) => v);"
        "const all = [...document.querySelectorAll('canvas')];"
        "document.body.dataset.inked = all.filter(inked).length;"
        "});</script></body>"
    )
    path.write_text(page(told, steps).replace("</body>", count), "utf-8")
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,30000",
         "--virtual-time-budget=6000", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    inked = re.search(r'data-inked="(\d+)"', done.stdout)
    assert inked and int(inked[1]) == done.stdout.count("<canvas")
