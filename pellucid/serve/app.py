"""The application: routes behind the guard, engines that start and stop with it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pellucid.explore import Runs
from pellucid.explore.runs import BUDGET
from pellucid.language_model import LanguageModel, load
from pellucid.serve.explorer import Explorer
from pellucid.serve.fields import RequestError
from pellucid.serve.metrics import Metrics
from pellucid.serve.openapi import Description
from pellucid.serve.page_files import PageFiles
from pellucid.serve.queue import ServedModel
from pellucid.serve.responses import Responses
from pellucid.serve.routes import Handler, Routes
from pellucid.serve.security import Guard, Rules
from pellucid.serve.streams import as_request_error

GET, POST = ["GET"], ["POST"]


def build_app(
    engines: Sequence[ServedModel], rules: Rules | None = None, memory: int = BUDGET
) -> Guard:
    """An ASGI application that serves these engines; it starts and stops their threads.

    memory  bytes that the explorer's runs may hold together

    ValueError where a file of the page is missing.
    """
    rules, metrics, page = rules or Rules(), Metrics(), PageFiles()
    runs = Runs({engine.name: engine.lm for engine in engines}, memory)
    routes = Routes({engine.name: engine for engine in engines}, rules, metrics)
    table: list[tuple[str, list[str], Handler]] = [
        ("/health", GET, routes.health),
        ("/metrics", GET, routes.prometheus),
        ("/v1/models", GET, routes.models),
        ("/v1/completions", POST, routes.completions),
        ("/v1/chat/completions", POST, routes.chat),
        ("/v1/responses", POST, Responses(routes).answer),
        ("/v1/embeddings", POST, routes.embeddings),
        ("/tokenize", POST, routes.tokenize),
        ("/detokenize", POST, routes.detokenize),
        ("/tokenizer_info", GET, routes.tokenizer_info),
        ("/openapi.json", GET, Description(key=rules.key is not None).answer),
        ("/", GET, page.index),
        ("/page/{path:path}", GET, page.file),
        *explorer_table(Explorer(routes.engines, rules, runs)),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        for engine in engines:
            engine.start()
        yield
        for engine in engines:
            engine.stop()

    app = Starlette(
        routes=[Route(path, _counted(path, metrics, run), methods=m) for path, m, run in table],
        exception_handlers={HTTPException: _not_found},
        lifespan=lifespan,
    )
    return Guard(app, rules)


def explorer_table(explorer: Explorer) -> list[tuple[str, list[str], Handler]]:
    """The explorer's endpoints."""
    run = "/api/runs/{run}"
    return [
        ("/api/models", GET, explorer.models),
        ("/api/tokens", POST, explorer.tokens),
        ("/api/runs", POST, explorer.start),
        (run, GET, explorer.manifest),
        (f"{run}/tensor", GET, explorer.tensor),
        (f"{run}/statistics", GET, explorer.statistics),
        (f"{run}/cell", GET, explorer.cell),
        (f"{run}/logits", GET, explorer.logits),
        (f"{run}/card", GET, explorer.card),
        (f"{run}/lens", GET, explorer.lens),
        (f"{run}/contributions", GET, explorer.contributions),
        (f"{run}/norms", GET, explorer.norms),
        (f"{run}/heads", GET, explorer.heads),
        (f"{run}/rope", GET, explorer.rope),
        (f"{run}/against/{{other}}", GET, explorer.against),
        (f"{run}/export", GET, explorer.export),
        (f"{run}/sweep", POST, explorer.sweep),
        ("/api/generate", POST, explorer.generate),
    ]


def _counted(path: str, metrics: Metrics, handler: Handler) -> Handler:
    """`handler`, with its errors as answers and its answers counted."""

    async def run(request: Request) -> Response:
        try:
            answer = await handler(request)
        except Exception as error:
            found = as_request_error(error)
            answer = JSONResponse(found.body, found.status, found.headers)
        metrics.requests[path, answer.status_code] += 1
        return answer

    return run


async def _not_found(request: Request, error: Any) -> Response:
    said = f"{request.method} {request.url.path}: {str(error.detail).lower()}"
    found = RequestError(error.status_code, said)
    return JSONResponse(found.body, error.status_code, error.headers)


def open_engines(
    sources: Sequence[str], fast: bool | None = None, report: Callable[[str], None] | None = None,
    *, draft: str | None = None, **options: Any,
) -> list[ServedModel]:  # fmt: skip
    """An engine for each model, called as its source, or as its folder is called.

    draft  as for `LanguageModel.generate`, of every model

    Raises ValueError for two of one name, and what `pellucid.load` raises.
    """
    engines: dict[str, ServedModel] = {}
    for source in sources:
        name = Path(source).resolve().name if Path(source).is_dir() else source
        if name in engines:
            raise ValueError(f"two models are called {name!r}: serve one of them, or rename it")
        if report:
            report(f"loading {source}")
        lm: LanguageModel = load(source, **options)
        engines[name] = ServedModel(lm, name, fast=fast, draft=draft)
    return list(engines.values())
