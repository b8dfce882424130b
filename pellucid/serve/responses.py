"""``/v1/responses``: OpenAI's newer form of a chat, text only, nothing kept between requests."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pellucid.serve import schemas
from pellucid.serve.queue import ServedModel
from pellucid.serve.routes import Routes, chat_row
from pellucid.serve.streams import start, streaming
from pellucid.serve.wire import event
from pellucid.serve.writing import Choice, write


class Responses:
    """The endpoint, over the engines of `routes`."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    async def answer(self, request: Request) -> Response:
        """POST /v1/responses."""
        given, engine = await self._routes.read(request, schemas.RESPONSE)
        messages = given["input"]
        if given["instructions"] is not None:
            messages = [{"role": "system", "content": given["instructions"]}, *messages]
        row = chat_row(engine, messages, "input")
        whole = {**given, "n": 1, "stop": (), "seed": None}
        order = self._routes.order(engine, whole, [row], given["max_output_tokens"], None)
        (choice,) = start(engine, order)
        head = _head(engine, given)
        if given["stream"]:
            return await streaming(request, self._stream(engine, head, choice))
        await self._routes.written(request, engine, [choice])
        return JSONResponse(self._finished(engine, head, choice))

    async def _stream(
        self, engine: ServedModel, head: dict[str, Any], choice: Choice
    ) -> AsyncGenerator[str, None]:
        number = 0

        def told(kind: str, **fields: Any) -> str:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number - 1, **fields}, kind)

        place = {"item_id": head["id"].replace("resp", "msg"), "output_index": 0}
        within = {**place, "content_index": 0}
        async with aclosing(engine.run(write([choice]))) as events:
            async for pieces in events:
                if not number:
                    begun = {**head, "status": "in_progress", "output": [], "usage": None}
                    yield told("response.created", response=begun)
                    yield told("response.in_progress", response=begun)
                    item = {**_message(head, choice), "status": "in_progress", "content": []}
                    yield told("response.output_item.added", output_index=0, item=item)
                    yield told("response.content_part.added", **within, part=_part(""))
                for piece in pieces:
                    if piece.text:
                        yield told(
                            "response.output_text.delta", **within, delta=piece.text, logprobs=[]
                        )
        whole = self._finished(engine, head, choice)
        text = choice.completion.text
        yield told("response.output_text.done", **within, text=text, logprobs=[])
        yield told("response.content_part.done", **within, part=_part(text))
        yield told("response.output_item.done", output_index=0, item=whole["output"][0])
        yield told(f"response.{whole['status']}", response=whole)

    def _finished(
        self, engine: ServedModel, head: dict[str, Any], choice: Choice
    ) -> dict[str, Any]:
        used = self._routes.used(engine, [choice.completion.prompt], [choice])
        cut = choice.completion.finish_reason == "length"
        return {
            **head,
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [_message(head, choice)],
            "usage": {
                "input_tokens": used["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": used["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": used["total_tokens"],
            },
        }


def _head(engine: ServedModel, given: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": int(time.time()),
        "model": engine.name,
        "error": None,
        "incomplete_details": None,
        "instructions": given["instructions"],
        "max_output_tokens": given["max_output_tokens"],
        "metadata": {},
        "parallel_tool_calls": False,
        "temperature": given["temperature"],
        "tool_choice": "none",
        "tools": [],
        "top_p": given["top_p"],
        "store": False,
    }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(head: dict[str, Any], choice: Choice) -> dict[str, Any]:
    status = "incomplete" if choice.completion.finish_reason == "length" else "completed"
    return {
        "id": head["id"].replace("resp", "msg"),
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_part(choice.completion.text)],
    }
