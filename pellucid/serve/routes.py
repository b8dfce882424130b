"""The endpoints: a request read, work for the model's engine, an answer written."""

from __future__ import annotations

import base64
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from pellucid.evaluate.harness import Answers
from pellucid.generate import Sampling
from pellucid.serve import schemas, wire
from pellucid.serve.chat import Chat
from pellucid.serve.completions import Completions
from pellucid.serve.fields import Field, RequestError, parse, read_json
from pellucid.serve.metrics import Metrics
from pellucid.serve.queue import ServedModel
from pellucid.serve.security import Rules, read_body
from pellucid.serve.streams import start, streaming, until_gone
from pellucid.serve.tools import check_tools
from pellucid.serve.writing import Choice, TextPiece, WritingRequest, check_rows, embed, write

Fields = Mapping[str, Field]
Handler = Callable[[Request], Awaitable[Response]]


class Routes:
    """The endpoints of a server with these engines, by the name of their model."""

    def __init__(self, engines: Mapping[str, ServedModel], rules: Rules, metrics: Metrics) -> None:
        self.engines, self.rules, self.metrics = engines, rules, metrics

    async def read(self, request: Request, fields: Fields) -> tuple[dict[str, Any], ServedModel]:
        """A request's fields and the engine of the model that it names, or of the first."""
        given = parse(read_json(await read_body(request, self.rules)), fields)
        name = given["model"]
        if name is None:
            return given, next(iter(self.engines.values()))
        if name not in self.engines:
            served = ", ".join(self.engines)
            raise RequestError(404, f"model {name!r} is not served here; served: {served}", "model")
        return given, self.engines[name]

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "pellucid",
             "max_model_len": engine.lm.config.context_length}
            for name, engine in self.engines.items()
        ]  # fmt: skip
        return JSONResponse({"object": "list", "data": rows})

    async def health(self, request: Request) -> Response:
        """GET /health."""
        return JSONResponse({"status": "ok"})

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics."""
        text = self.metrics.text(self.engines.values())
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        given, engine = await self.read(request, schemas.EMBEDDING)
        rows = prompt_rows(engine, given["input"], "input")
        vectors = await until_gone(request, engine.run(embed(engine.lm, rows)))
        packed = given["encoding_format"] == "base64"
        data = [
            {"object": "embedding", "index": i, "embedding": _packed(v) if packed else v}
            for i, v in enumerate(vectors)
        ]
        read = sum(map(len, rows))
        self.metrics.count(engine.name, read, 0)
        used = {"prompt_tokens": read, "total_tokens": read}
        return JSONResponse({"object": "list", "data": data, "model": engine.name, "usage": used})

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: the ids that lm-evaluation-harness's adapter makes of a text."""
        given, engine = await self.read(request, schemas.TOKENIZE)
        tokenizer, bos = engine.lm.tokenizer, None if given["add_special_tokens"] else False
        if given["parse_special"]:
            ids = Answers(engine.lm).encode(given["prompt"], bos)
        else:
            ids = tokenizer.encode(given["prompt"], bos=tokenizer.adds_bos and bos is None)
        names = [tokenizer.token_string(id) for id in ids] if given["return_token_strs"] else None
        length = engine.lm.config.context_length
        return JSONResponse(
            {"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": names}
        )

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        given, engine = await self.read(request, schemas.DETOKENIZE)
        try:
            return JSONResponse({"prompt": engine.lm.tokenizer.decode(given["tokens"])})
        except ValueError as error:
            raise RequestError(400, str(error), "tokens") from None

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info: special tokens by name and the chat template."""
        name = request.query_params.get("model", next(iter(self.engines)))
        if name not in self.engines:
            raise RequestError(404, f"model {name!r} is not served here", "model")
        tokenizer = self.engines[name].lm.tokenizer
        shown = {
            key: None if id is None else tokenizer.token_string(id)
            for key, id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))
        }
        return JSONResponse(
            {
                "tokenizer_class": tokenizer.kind,
                "model_max_length": self.engines[name].lm.config.context_length,
                "add_bos_token": tokenizer.adds_bos,
                "chat_template": getattr(tokenizer.chat, "template", None),
                **shown,
            }
        )

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        given, engine = await self.read(request, schemas.COMPLETION)
        check_stream_options(given)
        rows = prompt_rows(engine, given["prompt"], "prompt")
        order = self.order(engine, given, rows, given["max_tokens"], given["logprobs"])
        order.scores_stop = True  # a token for each that is counted
        job = Completions(self.used, engine, given, rows, order)
        if given["stream"]:
            return await streaming(request, job.stream())
        return JSONResponse(await job.whole(request))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        given, engine = await self.read(request, schemas.CHAT)
        check_stream_options(given)
        length = one_length(given)
        if given["top_logprobs"] is not None and not given["logprobs"]:
            raise RequestError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        top = (given["top_logprobs"] or 0) if given["logprobs"] else None
        form = check_tools(engine.lm.tokenizer.chat, given)
        told = given["tools"] if given["tool_choice"] != "none" else None
        row = chat_row(engine, given["messages"], "messages", told)
        order = self.order(engine, given, [row], length, top)
        job = Chat(self.used, engine, given, row, start(engine, order), form)
        if given["stream"]:
            return await streaming(request, job.stream())
        return JSONResponse(await job.whole(request))

    def order(
        self, engine: ServedModel, given: dict[str, Any], rows: list[list[int]], length: int | None,
        top: int | None,
    ) -> WritingRequest:  # fmt: skip
        """What a request wants written; each prompt stands `n` times in a row."""
        rows = [row for row in rows for _ in range(given["n"])]
        if len(rows) > schemas.MOST_ROWS:
            said = f"{len(rows)} choices: expected at most {schemas.MOST_ROWS} in one request"
            raise RequestError(400, said, "n")
        return WritingRequest(
            rows=rows, sampling=sampling(given), length=length, stop=given["stop"],
            seed=given["seed"], top=top,
        )  # fmt: skip

    async def written(
        self, request: Request, engine: ServedModel, choices: list[Choice]
    ) -> list[TextPiece]:
        """All pieces of all choices."""
        events = await until_gone(request, engine.run(write(choices)))
        return [piece for pieces in events for piece in pieces]

    def used(
        self, engine: ServedModel, prompts: list[list[int]], choices: list[Choice]
    ) -> dict[str, int]:
        """Tokens of an answer, which are counted; a prompt counts once however many choices."""
        read, written = sum(map(len, prompts)), sum(len(c.completion.tokens) for c in choices)
        self.metrics.count(engine.name, read, written)
        return wire.usage(read, written)


def sampling(given: Mapping[str, Any]) -> Sampling:
    """How the next token is chosen; RequestError where the numbers do not fit together."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    try:
        return Sampling(**{name: given[name] for name in names if name in given})
    except ValueError as error:
        raise RequestError(400, str(error), str(error).split(" ")[0]) from None


def check_stream_options(given: Mapping[str, Any]) -> None:
    """RequestError for options of a stream where there is none."""
    if given["stream_options"] is not None and not given["stream"]:
        raise RequestError(400, "stream_options needs stream: true", "stream_options")


def one_length(given: Mapping[str, Any]) -> int | None:
    """The limit of a chat answer, which has an older and a newer name."""
    old, new = given["max_tokens"], given["max_completion_tokens"]
    if None not in (old, new) and old != new:
        said = f"max_tokens is {old} and max_completion_tokens {new}: give one of them"
        raise RequestError(400, said, "max_completion_tokens")
    return old if new is None else new


def prompt_rows(engine: ServedModel, given: list[str | list[int]], param: str) -> list[list[int]]:
    """Prompts in token ids; RequestError for what the model cannot take."""
    if len(given) > schemas.MOST_ROWS:
        said = f"{len(given)} prompts: expected at most {schemas.MOST_ROWS} in one request"
        raise RequestError(400, said, param)
    try:
        rows = [engine.lm.encode(one) for one in given]
        check_rows(engine.lm, rows)
    except ValueError as error:
        raise RequestError(400, f"{param}: {error}", param) from None
    return rows


def chat_row(
    engine: ServedModel, messages: list[dict[str, Any]], param: str, tools: list[Any] | None = None
) -> list[int]:
    """A conversation in token ids; RequestError where the model has no format for it."""
    chat = engine.lm.tokenizer.chat
    if chat is None:
        said = f"{engine.name} has no chat format (it was not trained on conversations): use "
        raise RequestError(400, said + "/v1/completions", "model")
    try:
        row = chat.encode(messages, tools=tools)
        check_rows(engine.lm, [row])
    except ValueError as error:
        raise RequestError(400, f"{param}: {error}", param) from None
    return row


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
