"""The explorer as a widget of a notebook: the page in the cell's output, the model in this kernel.

    from pellucid.serve.widget import explorer
    explorer(pellucid.load("demo"), prompt="The cat")

The page's requests are messages of the widget (anywidget), so that it works wherever widgets do:
no port is opened, no network, no proxy. Needs ``pip install 'pellucid[notebooks]'``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from pellucid.explore.runs import BUDGET
from pellucid.language_model import LanguageModel
from pellucid.serve.app import build_app
from pellucid.serve.in_process import ask
from pellucid.serve.page_file import bridged_page
from pellucid.serve.queue import ServedModel

Send = Callable[[dict[str, Any], list[bytes]], None]


class Bridge:
    """Answers the page's messages with the application of these models, in this process."""

    def __init__(self, models: Sequence[LanguageModel], send: Send, memory: int = BUDGET) -> None:
        named = {lm.name: lm for lm in models}
        if not models or len(named) < len(models):
            raise ValueError(
                f"models {', '.join(lm.name for lm in models) or 'none'}: expected one or several "
                "with different names, such as pellucid.load('demo')"
            )
        self.engines = [ServedModel(lm, name) for name, lm in named.items()]
        for engine in self.engines:
            engine.start()
        self._app, self._send = build_app(self.engines, memory=memory), send
        self._asked: dict[tuple[int, int], asyncio.Task[None]] = {}

    def hear(self, _: Any, said: dict[str, Any], buffers: Any = ()) -> None:
        """A message of the page: a request, or that an answer is no longer wanted."""
        key = said["frame"], said["id"]
        if said["pellucid"] == "stop" and key in self._asked:
            self._asked.pop(key).cancel()
        elif said["pellucid"] == "ask":
            task = asyncio.get_running_loop().create_task(self._answer(said))
            self._asked[key] = task
            task.add_done_callback(lambda _: self._asked.pop(key, None))

    async def _answer(self, said: dict[str, Any]) -> None:
        found = await ask(self._app, said["method"], said["path"], said["body"].encode())
        told = {"frame": said["frame"], "id": said["id"], "status": found.status}
        self._send(told | {"headers": found.headers}, [found.body])


def explorer(
    *models: LanguageModel, prompt: str | None = None, height: int = 720, memory: int = BUDGET
) -> Any:
    """A widget with the explorer's page over these models.

    prompt  to begin with; None: the model's own
    height  of the page, in pixels
    memory  bytes that its runs may hold together

    Its `place` is where the page is, as in a URL after #. ValueError for models of one name,
    ImportError without anywidget.
    """
    try:
        anywidget, traitlets = import_module("anywidget"), import_module("traitlets")
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'pellucid[notebooks]'") from None
    place = ""
    if prompt is not None and models:
        place = f"#/{quote(models[0].name, safe='')}//?view=walk&prompt={quote(prompt)}"
    synced = {
        name: kind().tag(sync=True)
        for name, kind in (
            ("page", traitlets.Unicode), ("place", traitlets.Unicode), ("height", traitlets.Int)
        )
    }  # fmt: skip
    script = (files("pellucid.serve") / "widget.js").read_text("utf-8")
    kind = type("Explorer", (anywidget.AnyWidget,), {"_esm": script, **synced})
    widget = kind(page=bridged_page(place), place=place, height=height)
    widget.on_msg(Bridge(models, widget.send, memory).hear)
    return widget
