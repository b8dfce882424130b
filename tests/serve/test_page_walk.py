"""The walk's static page in a browser: reading by tap and by key, contents, words, captions."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from browsing import PHONE, PROMPT

from pellucid.prompt_walk import walk_prompt
from pellucid.show.walk_files import WalkFiles
from pellucid.source.step_lines import StepLines

pytestmark = pytest.mark.browser
PATTERN = "layers.0.attn.pattern[1]"


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """The file of a walk, and its pattern of head 1."""
    path = tmp_path_factory.mktemp("walk") / "walk.html"
    steps = walk_prompt("demo", PROMPT, head=1)
    lines = StepLines(steps.config, steps.dialect)
    files, pattern = WalkFiles(steps.token_strings, page=path, lines=lines.lines), torch.empty(0)
    for step in steps:
        files.add(step)
        pattern = step.value if step.address == PATTERN else pattern
    files.write(steps.to_json())
    return path, pattern


@pytest.fixture
def open_page(chromium, walked):
    """Opens the walk in a context with these options; the page may not complain."""
    contexts, complaints = [], []

    def opened(**options: Any) -> Any:
        context = chromium.new_context(**options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: complaints.append(error.message))
        tab.goto(walked[0].as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def figure(tab: Any, address: str) -> Any:
    """The canvas of a step, in view and drawn."""
    canvas = tab.locator(f"figure[data-of='{address}'] canvas")
    canvas.scroll_into_view_if_needed()
    tab.wait_for_function(
        "of => document.querySelector(`figure[data-of='${of}']`).redraw", arg=address
    )
    return canvas


def check_reading(text: str, pattern: torch.Tensor) -> None:
    """Query, key and number of what is read are the walk's."""
    found = re.search(r"query (\d+) “.*” → key (\d+) “.*”: (\S+)", text)
    assert found, text
    row, column = int(found[1]), int(found[2])
    if column > row:
        assert found[3] == "masked"
    else:
        assert float(found[3]) == pytest.approx(float(pattern[row, column]), rel=2e-3, abs=1e-6)


def test_a_tap_reads_a_cell_and_marks_it(open_page, walked):
    tab = open_page(**PHONE)
    canvas = figure(tab, PATTERN)
    before = canvas.evaluate("canvas => canvas.toDataURL()")
    box = canvas.bounding_box()
    canvas.tap(position={"x": box["width"] * 0.6, "y": box["height"] * 0.8})
    tab.wait_for_function("!document.getElementById('reading').hidden")
    check_reading(tab.inner_text("#reading"), walked[1])
    assert canvas.evaluate("canvas => canvas.toDataURL()") != before, "the cell is marked"


def test_keys_read_cells_and_leaving_ends_it(open_page, walked):
    tab = open_page()
    canvas = figure(tab, PATTERN)
    plain = canvas.evaluate("canvas => canvas.toDataURL()")
    canvas.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowRight"):
        tab.keyboard.press(key)
    said = tab.inner_text("#reading")
    assert "query 2" in said and "key 1" in said
    check_reading(said, walked[1])
    tab.keyboard.press("Tab")
    assert canvas.evaluate("canvas => canvas.toDataURL()") == plain


def test_contents_fold_on_a_phone_and_mark_the_step(open_page):
    phone = open_page(**PHONE)
    assert not phone.evaluate("document.getElementById('contents').open")
    for tab in (phone, open_page()):
        tab.evaluate("of => document.getElementById(of).scrollIntoView()", PATTERN)
        tab.wait_for_function(
            "of => document.querySelector('#contents [aria-current]')?.hash === '#' + of",
            arg=PATTERN,
        )
    title = phone.inner_text("#where")
    assert title and phone.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_word_leads_to_its_meaning_and_no_caption_counts_masked_cells(open_page):
    tab = open_page()
    word = tab.locator("a.word").first
    assert word.get_attribute("title")
    assert tab.locator(word.get_attribute("href")).count() == 1
    captions = tab.locator("figcaption").all_inner_texts()
    assert captions and not any("e+38" in text for text in captions)
