"""A run as one file: the page's own modules, recorded answers, no server."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from browsing import PROMPT, Reader

from pellucid.serve.page_file import single_file

HOSTILE = "</script><img src=x onerror=alert(1)>"


def test_what_is_recorded_cannot_end_its_element():
    html = single_file({"/api/models": ({"Content-Type": HOSTILE}, HOSTILE.encode())})
    assert HOSTILE not in html
    assert 'src="' not in html and "modulepreload" not in html
    assert "connect-src" not in html and "default-src 'none'" in html


@pytest.mark.browser
def test_the_file_replays_a_run_from_the_disk(reader, chromium, demo_lm, tmp_path):
    seen = demo_lm.trace(PROMPT)
    reader.go(f"#/demo//layers.1.attn.pattern[2]?view=walk&prompt={quote(PROMPT)}")
    run, hash = reader.state("run")["run"], reader.tab.evaluate("location.hash")
    file = tmp_path / "run.html"
    file.write_text(
        reader.tab.evaluate("url => fetch(url).then(r => r.text())", f"/api/runs/{run}/export")
    )
    alone = Reader(chromium, file.as_uri())
    alone.tab.goto(file.as_uri() + hash)
    alone.tab.wait_for_selector("body[data-ready]")
    alone.settle()
    values = """() => { const map = document.querySelector("main canvas.grid").heatmap;
        return [...Array(map.plane.rows).keys()].map(row => map.plane.value(row, 0)); }"""
    assert alone.tab.evaluate(values) == seen["layers.1.attn.pattern[2]"][:, 0].tolist()
    for room in range(4):  # map, walk, heads, lens
        alone.tab.click(f".rooms button >> nth={room}")
        alone.settle()
        assert not alone.tab.query_selector(".notice.bad"), alone.tab.inner_text(".notice.bad")
    assert alone.complaints == []
    assert all(asked.startswith(("file:", "data:")) for asked in alone.asked)
    alone.context.close()
