"""The API's description in OpenAPI's form, made from the tables that requests are read by."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import pellucid
from pellucid.serve import schemas
from pellucid.serve.fields import Json, list_of, schema_of

_TEXT, _NUMBER, _COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
_FLAG = {"type": "boolean"}


def _or_null(schema: Json) -> Json:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(**properties: Json) -> Json:
    """An object that has all of these."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _only(value: Any) -> Json:
    return {"const": value}


ERROR = _object(
    error=_object(message=_TEXT, type=_TEXT, param=_or_null(_TEXT), code={"type": "integer"})
)
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_TOP = _or_null({"type": "object", "additionalProperties": _NUMBER})
_LOGPROBS = _object(
    tokens=list_of(_TEXT),
    token_logprobs=list_of(_or_null(_NUMBER)),
    top_logprobs=_or_null(list_of(_TOP)),
    text_offset=list_of(_COUNT),
)
_NAMED = _object(token=_TEXT, logprob=_NUMBER, bytes=list_of(_COUNT))
_CHAT_LOGPROBS = _object(
    content=list_of(
        _object(token=_TEXT, logprob=_NUMBER, bytes=list_of(_COUNT), top_logprobs=list_of(_NAMED))
    ),
    refusal={"type": "null"},
)
_CALL = _object(id=_TEXT, type=_only("function"), function=_object(name=_TEXT, arguments=_TEXT))
_MESSAGE = {
    "type": "object",
    "properties": {
        "role": _only("assistant"),
        "content": _or_null(_TEXT),
        "tool_calls": list_of(_CALL, 1),
    },
    "required": ["role", "content"],
}


def _answer(kind: str, **choice: Json) -> Json:
    return _object(
        id=_TEXT, object=_only(kind), created=_COUNT, model=_TEXT,
        choices=list_of(_object(index=_COUNT, **choice), 1), usage=_USAGE,
    )  # fmt: skip


COMPLETION = _answer(
    "text_completion",
    text=_TEXT,
    logprobs=_or_null(_LOGPROBS),
    finish_reason={"enum": ["stop", "length"]},
)
CHAT = _answer(
    "chat.completion",
    message=_MESSAGE,
    logprobs=_or_null(_CHAT_LOGPROBS),
    finish_reason={"enum": ["stop", "length", "tool_calls"]},
)
RESPONSE = _object(
    id=_TEXT, object=_only("response"), created_at=_COUNT, model=_TEXT,
    status={"enum": ["completed", "incomplete"]}, output=list_of({"type": "object"}),
    usage=_object(input_tokens=_COUNT, output_tokens=_COUNT, total_tokens=_COUNT),
)  # fmt: skip
_VECTOR = {"anyOf": [list_of(_NUMBER, 1), _TEXT]}
EMBEDDINGS = _object(
    object=_only("list"),
    model=_TEXT,
    data=list_of(_object(object=_only("embedding"), index=_COUNT, embedding=_VECTOR), 1),
    usage=_object(prompt_tokens=_COUNT, total_tokens=_COUNT),
)
TOKENS = _object(
    count=_COUNT, max_model_len=_COUNT, tokens=list_of(_COUNT), token_strs=_or_null(list_of(_TEXT))
)
MODELS = _object(
    object=_only("list"),
    data=list_of(
        _object(id=_TEXT, object=_only("model"), created=_COUNT, owned_by=_TEXT,
                max_model_len=_COUNT), 1
    ),
)  # fmt: skip
INFO = _object(
    tokenizer_class=_TEXT, model_max_length=_COUNT, add_bos_token=_FLAG,
    chat_template=_or_null(_TEXT), bos_token=_or_null(_TEXT), eos_token=_or_null(_TEXT),
)  # fmt: skip

# path -> (what it does, the fields of its request or None, its answer, whether it can stream)
POSTS: dict[str, tuple[str, dict[str, Any], Json, bool]] = {
    "/v1/completions": ("Texts continued", schemas.COMPLETION, COMPLETION, True),
    "/v1/chat/completions": ("A conversation's next message", schemas.CHAT, CHAT, True),
    "/v1/responses": ("The same in OpenAI's newer form", schemas.RESPONSE, RESPONSE, True),
    "/v1/embeddings": ("Texts as vectors", schemas.EMBEDDING, EMBEDDINGS, False),
    "/tokenize": ("A text's token ids", schemas.TOKENIZE, TOKENS, False),
    "/detokenize": ("The text of token ids", schemas.DETOKENIZE, _object(prompt=_TEXT), False),
}
GETS: dict[str, tuple[str, Json]] = {
    "/v1/models": ("The models served", MODELS),
    "/tokenizer_info": ("Special tokens and the chat template", INFO),
    "/health": ("Whether the server answers", _object(status=_only("ok"))),
}
_STATUSES = {
    "400": "a field that is not served, or a prompt that the model cannot take; `param` names it",
    "401": "no key, or another",
    "403": "Host or Origin of another site",
    "404": "a model that is not served here",
    "408": "the body did not come in time",
    "413": "the body is too large",
    "415": "a compressed body",
    "429": "too many requests wait; Retry-After says when to try again",
    "500": "a mistake of the server",
    "503": "the server is stopping",
}


def _content(kind: str, schema: Json) -> Json:
    return {"content": {kind: {"schema": schema}}}


def _errors(*statuses: str) -> Json:
    reference = {"$ref": "#/components/schemas/Error"}
    return {
        status: {"description": _STATUSES[status], **_content("application/json", reference)}
        for status in statuses
    }


def _post(what: str, fields: dict[str, Any], answer: Json, streams: bool) -> Json:
    found = _content("application/json", answer)
    if streams:
        found["content"] |= _content("text/event-stream", _TEXT)["content"]
    return {
        "summary": what,
        "requestBody": {"required": True, **_content("application/json", schema_of(fields))},
        "responses": {"200": {"description": what, **found}, **_errors(*_STATUSES)},
    }


def _get(path: str, what: str, answer: Json) -> Json:
    query = {"name": "model", "in": "query", "required": False, "schema": _TEXT}
    return {
        "summary": what,
        **({"parameters": [query]} if path == "/tokenizer_info" else {}),
        **({"security": []} if path == "/health" else {}),
        "responses": {
            "200": {"description": what, **_content("application/json", answer)},
            **_errors("401", "403", "404", "500"),
        },
    }


def description(*, key: bool) -> Json:
    """The whole description; `key`: whether requests must carry one."""
    paths: dict[str, Json] = {path: {"get": _get(path, *row)} for path, row in GETS.items()}
    paths |= {path: {"post": _post(*row)} for path, row in POSTS.items()}
    numbers = {"description": "counters, as Prometheus reads", **_content("text/plain", _TEXT)}
    paths["/metrics"] = {"get": {"summary": "Counters", "responses": {"200": numbers}}}
    parts: Json = {"schemas": {"Error": ERROR}}
    if key:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Pellucid", "version": pellucid.__version__},
        "paths": paths,
        "components": parts,
        **({"security": [{"key": []}]} if key else {}),
    }


class Description:
    """The endpoint of the description."""

    def __init__(self, *, key: bool) -> None:
        self._made = description(key=key)

    async def answer(self, request: Request) -> Response:
        """GET /openapi.json."""
        return JSONResponse(self._made)
