"""The explorer's endpoints under /api: requests read, work for the model's engine, answers written.

Numbers that JSON does not know are text: "NaN", "Infinity", "-Infinity".
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from contextlib import aclosing
from typing import Any, get_args

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pellucid.explore import ExploredRun, Gone, Runs, attribution, cell
from pellucid.explore.against import against, difference
from pellucid.explore.cards import card
from pellucid.explore.edits import parse_edit
from pellucid.explore.generation import generation
from pellucid.explore.manifest import describe_model, describe_run
from pellucid.explore.packing import packed, plain, without_batch
from pellucid.explore.predictions import entropy, likeliest, text_of
from pellucid.explore.recording import record
from pellucid.explore.reduce import statistics
from pellucid.explore.sweeps import Over, Sweep, What, sweep
from pellucid.generate import Sampling
from pellucid.serve.fields import RequestError, read_json, refuse
from pellucid.serve.queue import ServedModel
from pellucid.serve.security import Rules, read_body
from pellucid.serve.streams import streaming, until_gone
from pellucid.serve.wire import event

Work = Generator[Any, None, None]
KEPT = "private, max-age=31536000, immutable"  # the same run id always means the same numbers


class Explorer:
    """The endpoints of these engines' models; their runs share one budget of memory."""

    def __init__(self, engines: Mapping[str, ServedModel], rules: Rules, runs: Runs) -> None:
        self.engines, self.rules, self.runs = engines, rules, runs

    async def models(self, request: Request) -> Response:
        """GET /api/models."""
        return JSONResponse({"models": [describe_model(one) for one in self.runs.models.values()]})

    async def tokens(self, request: Request) -> Response:
        """POST /api/tokens."""
        given, engine = await self.read(request, {"prompt": str})
        ids = engine.lm.encode(given["prompt"])
        return JSONResponse({"ids": ids, "tokens": [text_of(engine.lm, id) for id in ids]})

    async def start(self, request: Request) -> Response:
        """POST /api/runs."""
        fields = {"prompt?": str, "ids?": list, "edits?": list, "like?": str}
        given, engine = await self.read(request, fields)
        edits = [parse_edit(stated) for stated in given.get("edits") or ()]
        with _lines_of_errors():
            run = self.runs.prepare(engine.name, _prompt(given), edits)

        def work() -> Work:
            yield from self.runs.making(run)
            yield describe_run(run, given.get("like"))

        return _plain((await self.turns(request, engine, work()))[-1])

    async def manifest(self, request: Request) -> Response:
        """GET /api/runs/{run}."""
        return _plain(describe_run(self.run(request)))

    async def tensor(self, request: Request) -> Response:
        """GET /api/runs/{run}/tensor: its bytes, little endian, or tiles of it; `minus` a run."""
        run, address = self.run(request), _wanted(request, "at")
        how, size = request.query_params.get("reduce"), request.query_params.get("to", "512,512")
        minus = request.query_params.get("minus")
        other = self.get(minus) if minus else None
        headers = {"Cache-Control": KEPT, "ETag": _etag(run.id, minus, address, how, size)}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)

        def read() -> tuple[bytes, dict[str, str]]:
            found = difference(other, run, address) if other else without_batch(run, address)
            return packed(found, how, _size(size))

        data, more = await self.once(request, run, read)
        return Response(data, media_type="application/octet-stream", headers=headers | more)

    async def statistics(self, request: Request) -> Response:
        """GET /api/runs/{run}/statistics."""
        run, name = self.run(request), _wanted(request, "name")
        return _plain(await self.once(request, run, lambda: statistics(run[name])))

    async def cell(self, request: Request) -> Response:
        """GET /api/runs/{run}/cell."""
        run, address = self.run(request), _wanted(request, "at")
        return _plain(await self.once(request, run, lambda: cell(run, address).to_json()))

    async def logits(self, request: Request) -> Response:
        """GET /api/runs/{run}/logits."""
        run = self.run(request)
        row, top = whole(request, "row", len(run.ids) - 1), whole(request, "top", 20)

        def read() -> dict[str, Any]:
            logits = run.logits(row_of(run, row))
            return {
                "row": row_of(run, row),
                "top": likeliest(run.loaded.lm, logits, top),
                "entropy": entropy(logits),
            }

        return _plain(await self.once(request, run, read))

    async def card(self, request: Request) -> Response:
        """GET /api/runs/{run}/card."""
        run, step, head = self.run(request), _wanted(request, "step"), whole(request, "head", 0)
        return _plain(await self.once(request, run, lambda: card(run, step, head)))

    async def lens(self, request: Request) -> Response:
        """GET /api/runs/{run}/lens."""
        run, top = self.run(request), whole(request, "top", 5)
        first, last = whole(request, "first", 0), whole(request, "last", len(run.ids))
        below = whole(request, "below", 0)
        at = attribution.lens_below(run, below) if "below" in request.query_params else None
        return await self.last_of(request, run, attribution.lens(run, top, first, last, at))

    async def contributions(self, request: Request) -> Response:
        """GET /api/runs/{run}/contributions."""
        run, token = self.run(request), whole(request, "id")
        with _lines_of_errors():
            row = row_of(run, whole(request, "row", -1))
        return await self.last_of(request, run, attribution.contributions(run, row, token))

    async def norms(self, request: Request) -> Response:
        """GET /api/runs/{run}/norms."""
        run = self.run(request)
        return _plain(await self.once(request, run, lambda: attribution.norms(run)))

    async def heads(self, request: Request) -> Response:
        """GET /api/runs/{run}/heads."""
        run, layer = self.run(request), whole(request, "layer")
        return _plain(await self.once(request, run, lambda: attribution.heads(run, layer)))

    async def rope(self, request: Request) -> Response:
        """GET /api/runs/{run}/rope."""
        run, of = self.run(request), request.query_params.get("of", "q")
        place = [whole(request, name, 0) for name in ("layer", "head", "token")]
        layer, head, token = place
        return _plain(
            await self.once(request, run, lambda: attribution.rope(run, layer, head, of, token))
        )

    async def against(self, request: Request) -> Response:
        """GET /api/runs/{run}/against/{other}."""
        run, other = self.run(request), self.get(request.path_params["other"])
        return await self.last_of(request, run, against(run, other, whole(request, "row", -1)))

    async def export(self, request: Request) -> Response:
        """GET /api/runs/{run}/export: the page with this run's answers in it, as one file."""
        from pellucid.serve.page_file import single_file

        run = self.run(request)
        answers = (await self.turns(request, self.engines[run.loaded.name], record(run)))[-1]
        name = f"pellucid-{run.id}.html"
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        return Response(single_file(answers), media_type="text/html", headers=headers)

    async def sweep(self, request: Request) -> Response:
        """POST /api/runs/{run}/sweep."""
        run = self.run(request)
        fields = {"what": str, "over": str, "of": str, "from?": str, "token": int, "row?": int}
        given, _ = await self.read(request, {**fields, "layers?": list, "places?": list})
        for name, known in (("what", get_args(What)), ("over", get_args(Over))):
            if given[name] not in known:
                raise refuse(name, given[name], " or ".join(known))
        source = self.get(given["from"]) if given.get("from") else None
        with _lines_of_errors():
            row = row_of(run, -1 if given.get("row") is None else given["row"])
            wanted = Sweep(
                what=given["what"], over=given["over"], of=given["of"], token=given["token"],
                row=row, source=source, layers=given.get("layers"), places=given.get("places"),
            )  # fmt: skip
            wanted.check(run)
        return await self.last_of(request, run, sweep(run, wanted))

    async def generate(self, request: Request) -> Response:
        """POST /api/generate: a stream of tokens, each with its alternatives."""
        whole_numbers = ("max_tokens", "top_k", "seed", "alternatives")
        numbers = ("temperature", "top_p", "min_p", "repetition_penalty")
        fields = {**{f"{name}?": int for name in whole_numbers}, "prompt?": str, "ids?": list}
        given, engine = await self.read(
            request, {**fields, **{f"{name}?": (float, int) for name in numbers}}
        )
        stated = {name: given[name] for name in (*numbers, "top_k") if given.get(name) is not None}
        length, others = given.get("max_tokens"), given.get("alternatives")
        steps = generation(
            engine.lm, _prompt(given), Sampling(**stated), length=32 if length is None else length,
            seed=given.get("seed"), alternatives=8 if others is None else others, fast=engine.fast,
        )  # fmt: skip

        async def events() -> AsyncGenerator[str, None]:
            async with aclosing(engine.run(steps)) as found:
                async for one in found:
                    yield event(plain(one))

        return await streaming(request, events())

    async def last_of(self, request: Request, run: ExploredRun, work: Work) -> Response:
        """The last thing that `work` yields."""
        return _plain((await self.turns(request, self.engines[run.loaded.name], work))[-1])

    async def read(
        self, request: Request, fields: Mapping[str, type | tuple[type, ...]]
    ) -> tuple[dict[str, Any], ServedModel]:
        """A body with these fields ("?" for one that may be absent) and the model that it names."""
        given = read_json(await read_body(request, self.rules))
        known = {name.removesuffix("?"): kind for name, kind in fields.items()} | {"model": str}
        for name, value in given.items():
            if name not in known:
                raise RequestError(400, f"unknown field {name!r}: expected {', '.join(known)}")
            if value is not None and (
                not isinstance(value, known[name]) or isinstance(value, bool)
            ):
                raise refuse(name, value, _kind(known[name]))
        for name in fields:
            if not name.endswith("?") and given.get(name) is None:
                raise RequestError(400, f"{name} is missing", name)
        return given, self.engine(given.get("model"))

    def engine(self, name: str | None) -> ServedModel:
        """The engine of a model, or of the first."""
        if name is None:
            return next(iter(self.engines.values()))
        if name not in self.engines:
            raise RequestError(
                404, f"model {name!r} is not here; there is {', '.join(self.engines)}"
            )
        return self.engines[name]

    def run(self, request: Request) -> ExploredRun:
        """The run that the path names."""
        return self.get(request.path_params["run"])

    def get(self, id: str) -> ExploredRun:
        """A run; RequestError 404, with what to do, where it is gone."""
        try:
            return self.runs.get(id)
        except Gone as error:
            raise RequestError(404, str(error)) from None

    async def turns(self, request: Request, engine: ServedModel, work: Work) -> list[Any]:
        """What `work` yields, in turns with other requests; cancelled when its client goes."""
        with _lines_of_errors():
            return await until_gone(request, engine.run(work))

    async def once(self, request: Request, run: ExploredRun, function: Callable[[], Any]) -> Any:
        """The answer of a function that needs one turn of the run's model."""

        def work() -> Work:
            yield function()

        return (await self.turns(request, self.engines[run.loaded.name], work()))[-1]


class _lines_of_errors:
    """Turns what runs raise for a wrong address or a dropped run into a status and one line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, where: Any) -> None:
        if isinstance(error, KeyError | IndexError):
            raise RequestError(404, str(error.args[0]) if error.args else str(error)) from None
        if isinstance(error, MemoryError):
            raise RequestError(
                413, "not enough memory: shorten the prompt, or look at less at once"
            )


def _plain(content: Any) -> JSONResponse:
    return JSONResponse(plain(content))


def _prompt(given: Mapping[str, Any]) -> str | list[int]:
    prompt, ids = given.get("prompt"), given.get("ids")
    given_one = prompt if ids is None else ids
    if given_one is None or (prompt is None) == (ids is None):
        raise RequestError(400, "give prompt (text) or ids (token ids), one of the two")
    if ids is not None and not all(isinstance(id, int) and not isinstance(id, bool) for id in ids):
        raise refuse("ids", ids, "whole numbers")
    return given_one


def _wanted(request: Request, name: str) -> str:
    value = request.query_params.get(name)
    if not value:
        raise RequestError(400, f"{name} is missing: give it as ?{name}=…", name)
    return value


def whole(request: Request, name: str, default: int | None = None) -> int:
    """A whole number of the query; RequestError for none."""
    text = request.query_params.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise RequestError(400, f"{name} is {text!r}: expected a whole number", name) from None


def row_of(run: ExploredRun, row: int) -> int:
    """A row of the run, counted from its end where it is negative; IndexError for none."""
    count = len(run.ids)
    if not -count <= row < count:
        raise IndexError(f"row {row}: this run has the tokens 0 to {count - 1}")
    return row % count


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition(",")
    if not (rows.isdecimal() and columns.isdecimal() and len(text) < 16):
        raise RequestError(400, f"to is {text!r}: expected two numbers such as 256,256", "to")
    return int(rows), int(columns)


def _etag(*parts: Any) -> str:
    return f'"{hashlib.sha256(repr(parts).encode()).hexdigest()[:20]}"'


def _kind(kind: type | tuple[type, ...]) -> str:
    one = kind[0] if isinstance(kind, tuple) else kind
    return {str: "text", list: "a list", int: "a whole number", float: "a number"}[one]
