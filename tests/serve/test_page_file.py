"""A run as one file: the page's own modules, recorded answers, no server."""

from __future__ import annotations

import json

import pytest
from browsing import Reader, browser, demo

import pellucid
from pellucid.serve.page_file import single_file

HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_what_is_recorded_cannot_end_its_element():
    html = single_file({"/api/models": ({"Content-Type": HOSTILE}, HOSTILE.encode())})
    assert HOSTILE not in html
    assert 'src="' not in html and "modulepreload" not in html
    assert "connect-src" not in html and "default-src 'none'" in html


@pytest.mark.browser
def test_the_file_replays_a_run_from_the_disk(tmp_path):
    lm = pellucid.load("demo")
    with browser() as chromium, demo(lm) as url:
        live = Reader(chromium, url)
        answers = {}

        def keep(answer) -> None:
            path = answer.url.removeprefix(url)
            if path.startswith("/api/") and answer.request.method == "GET" and answer.ok:
                answers[path] = (dict(answer.all_headers()), answer.body())

        live.tab.on("requestfinished", lambda request: keep(request.response()))
        live.open("#/demo//layers.1.attn.pattern[2,4,1]?view=walk")
        live.settle()
        run = live.tab.evaluate("import('/page/state.js').then(s => s.run.peek())")
        answers[f"/api/runs/{run['run']}"] = (
            {"Content-Type": "application/json"},
            json.dumps(run).encode(),
        )
        hash, value = live.tab.evaluate("location.hash"), live.tab.inner_text(".microscope .value")
        file = tmp_path / "run.html"
        file.write_text(single_file(answers))
        alone = Reader(chromium, file.as_uri())
        alone.tab.goto(file.as_uri() + hash)
        alone.tab.wait_for_selector(".microscope .value")
        assert alone.tab.inner_text(".microscope .value") == value
        pixels = """() => { const map = document.querySelector("main canvas.grid").heatmap;
            const [x, y] = map.pointOf(4, 1); return [map.plane.value(4, 1), map.plane.rows]; }"""
        assert alone.tab.evaluate(pixels) == live.tab.evaluate(pixels)
        assert alone.complaints == []
        assert all(asked.startswith(("file:", "data:")) for asked in alone.asked)
