"""The page in a notebook: its requests are messages, answered in the same process."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from typing import Any

import httpx
import pytest
from browsing import PATIENCE, PROMPT, QUIET

from pellucid.serve.page_file import bridged_page
from pellucid.serve.page_files import files
from pellucid.serve.widget import Bridge, explorer


def asked(lm, *messages: dict[str, Any]) -> list[tuple[dict[str, Any], bytes]]:
    """What a bridge over a model sends for these messages."""
    sent: list[tuple[dict[str, Any], bytes]] = []

    async def talk() -> None:
        bridge = Bridge([lm], lambda said, buffers: sent.append((said, buffers[0])))
        for number, message in enumerate(messages):
            told = {"pellucid": "ask", "frame": 1, "id": number, "method": "GET", "body": ""}
            bridge.hear(None, told | message)
            while len(sent) <= number:
                await asyncio.sleep(0.001)
        for engine in bridge.engines:
            engine.stop()

    thread = threading.Thread(target=lambda: asyncio.run(talk()))  # the browser's loop is in this
    thread.start()
    thread.join()
    return sent


def test_messages_are_answered_as_requests_are(demo_lm):
    body = json.dumps({"model": "demo", "prompt": PROMPT})
    models, run, none = asked(
        demo_lm,
        {"path": "/api/models"},
        {"path": "/api/runs", "method": "POST", "body": body},
        {"path": "/api/runs/none"},
    )
    assert json.loads(models[1])["models"][0]["name"] == "demo"
    assert run[0]["status"] == 200 and run[0]["id"] == 1 and json.loads(run[1])["prompt"] == PROMPT
    assert none[0]["status"] == 404


def test_what_cannot_be_shown_is_said(demo_lm, monkeypatch):
    with pytest.raises(ValueError, match="different names"):
        Bridge([demo_lm, demo_lm], print)
    monkeypatch.setitem(sys.modules, "anywidget", None)
    with pytest.raises(ImportError, match="pellucid\\[notebooks\\]"):
        explorer(demo_lm)


WIDGET = """async ([source, page]) => {
  const { default: { render } } = await import(URL.createObjectURL(new Blob([source],
    { type: "text/javascript" })));
  const heard = [];
  window.place = "";
  render({ el: document.body, model: {
    get: name => ({ page, height: 700 })[name],
    set: (name, value) => { window.place = value; },
    save_changes() {},
    on: (name, listener) => heard.push(listener),
    off() {},
    send: async said => {
      const [told, bytes] = await window.toKernel(said) ?? [];
      const view = bytes && new DataView(Uint8Array.from(bytes).buffer);
      if (told) for (const listener of heard) listener(told, [view]);
    } } });
}"""


@pytest.mark.browser
def test_the_page_works_in_a_frame_by_messages_alone(chromium, url, demo_lm):
    complaints: list[str] = []
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        tab = chromium.new_page()
        try:
            check_frame(tab, client, complaints, demo_lm)
        finally:
            tab.close()
    assert complaints == []


def check_frame(tab: Any, client: httpx.Client, complaints: list[str], demo_lm: Any) -> None:
    tab.set_default_timeout(PATIENCE)
    tab.on("pageerror", lambda error: complaints.append(error.message))

    def to_kernel(said: dict[str, Any]) -> Any:  # the application behind a socket stands for it
        if said["pellucid"] != "ask":
            return None
        found = client.request(said["method"], said["path"], content=said["body"])
        told = {"frame": said["frame"], "id": said["id"], "status": found.status_code}
        return [told | {"headers": dict(found.headers)}, list(found.content)]

    tab.expose_function("toKernel", to_kernel)
    tab.route("**/*", lambda route: route.fulfill(body="<body></body>", content_type="text/html"))
    tab.goto("http://notebook.test/")
    source = (files("pellucid.serve") / "widget.js").read_text()
    place = f"#/demo//layers.1.attn.pattern[2]?view=walk&prompt={PROMPT}"
    tab.evaluate(WIDGET, [source, bridged_page(place)])
    tab.wait_for_selector("iframe")
    frame = tab.frames[-1]
    frame.wait_for_selector("body[data-ready]", timeout=PATIENCE)
    frame.evaluate(QUIET)
    seen = demo_lm.trace(PROMPT)["layers.1.attn.pattern[2]"]
    value = """() => document.querySelector("main canvas.grid").heatmap.plane.value(4, 0)"""
    assert frame.evaluate(value) == float(seen[4, 0])
    tab.wait_for_function("window.place.includes('attn.pattern')", polling=200)
    frame.locator("main canvas.grid").press("j")
    tab.wait_for_function("window.place.includes('attn.z')", polling=200)
