"""The process: a socket, the models, and a protocol that does not wait for ever."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from pellucid.explore.runs import BUDGET
from pellucid.serve.app import build_app, open_engines
from pellucid.serve.page_files import PageFiles
from pellucid.serve.queue import ServedModel
from pellucid.serve.security import OPEN, Rules, check_binding
from pellucid.source.step_lines import StepLines

PATIENCE = 20.0  # seconds for the head of a request, and again for its body
MOST_HEAD = 32 << 10  # bytes


class PatientProtocol(H11Protocol):
    """HTTP/1.1 that ends a connection whose request head does not arrive in time.

    Uvicorn has a limit for idle connections only: one that sends half a head stays.
    """

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client came: its head is due."""
        super().connection_made(transport)
        self._expect_head()

    def handle_events(self) -> None:
        """After bytes came: wait on while a head is due, not while a request is answered."""
        super().handle_events()
        self._expect_head()

    def on_response_complete(self) -> None:
        """The next head is due; an idle connection is uvicorn's to close."""
        super().on_response_complete()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more is due."""
        super().connection_lost(exc)
        self._stop_timer()

    def _expect_head(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(PATIENCE, self._give_up)

    def _give_up(self) -> None:
        self._timer = None
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def serve_models(
    sources: Sequence[str] = ("demo",),
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    insecure: bool = False,
    origins: Sequence[str] = (),
    fast: bool | None = None,
    show: bool = False,
    memory: int = BUDGET,
    report: Callable[[str], None] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    dialect: str | None = None,
    stream: bool = False,
    adapter: str | Path | None = None,
    draft: str | None = None,
) -> None:
    """Serve models through OpenAI's API until Ctrl-C; one process, no network, no account.

    sources   as for `pellucid.load`; only these models are ever opened
    host      another than this machine's own needs `key`, or `insecure` to let everyone in
    origins   pages elsewhere that may call, such as https://example.org
    show      open the explorer in this machine's browser
    memory    bytes that the explorer's runs may hold together
    report    called with what happens, a line each
    dtype, device, dialect, stream, adapter  as for `pellucid.load`
    draft     a model that runs ahead of a text that is written alone

    Raises ValueError or OSError, at once, for a host without a key, a port that is taken, and for
    models that cannot be loaded.
    """
    check_binding(host, key, insecure)
    PageFiles()  # complete, before a model is loaded
    bound = _bound(host, port)
    try:
        engines = open_engines(
            sources, fast, report, dtype=dtype, device=device, dialect=dialect, stream=stream,
            adapter=adapter, draft=draft,
        )  # fmt: skip
        threading.Thread(target=_resolve, args=(engines,), daemon=True).start()
        rules = Rules(
            host=host, key=key, origins=tuple(origins), patience=PATIENCE, open_paths=OPEN
        )
        url = f"http://{f'[{host}]' if ':' in host else host}:{bound.getsockname()[1]}/"
        if report:
            names = ", ".join(engine.name for engine in engines)
            report(f"{names} at {url} (API: /v1); Ctrl-C stops")
        server = http_server(build_app(engines, rules, memory))
        if show:
            threading.Thread(target=_show, args=(server, url), daemon=True).start()
        server.run(sockets=[bound])
    finally:
        bound.close()


def _show(server: uvicorn.Server, url: str) -> None:
    """Open the page as soon as the server answers."""
    while not server.started:
        if server.should_exit:
            return
        time.sleep(0.05)
    webbrowser.open(url)


def _resolve(engines: Sequence[ServedModel]) -> None:
    """Resolve each model's code once: the first time costs seconds of imports, cards then none."""
    for engine in engines:
        StepLines(engine.lm.config, engine.lm.model.dialect.name).lines("logits")


def http_server(app: Any) -> uvicorn.Server:
    """A server of `app` that is yet to run: quiet, patient within limits, without websockets."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=PatientProtocol,
            h11_max_incomplete_event_size=MOST_HEAD,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=5,
            access_log=False,
            log_level="error",
            server_header=False,
            proxy_headers=False,
            ws="none",
        )
    )


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound before any model is loaded, so that a port that is taken is told at once."""
    if not 0 <= port < 1 << 16:
        raise ValueError(f"--port {port}: expected 0 (any that is free) to 65535")
    try:
        family, kind, *_, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind)
    except OSError as error:
        raise ValueError(f"--host {host}: no such address ({error.strerror})") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"port {port} of {host} cannot be bound ({error.strerror}): choose another with --port"
        ) from None
    return bound
