"""Server-sent events whose errors stay inside the stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pellucid.serve.fields import RequestError
from pellucid.serve.queue import ServedModel
from pellucid.serve.wire import event
from pellucid.serve.writing import Choice, WritingRequest

LOG = logging.getLogger("pellucid.serve")


class EventStream(StreamingResponse):
    """Text chunks as ``text/event-stream``, which no cache keeps."""

    def __init__(self, chunks: AsyncGenerator[str, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type="text/event-stream", headers=headers)


async def first_of(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """`chunks`, the first of which is there; it raises here, a later one is told in the stream."""
    first = await anext(chunks)

    async def all_of() -> AsyncGenerator[str, None]:
        try:
            yield first
            async for chunk in chunks:
                yield chunk
        except Exception as error:
            yield event(as_request_error(error).body)
        finally:
            await chunks.aclose()

    return all_of()


def as_request_error(error: Exception) -> RequestError:
    """What went wrong, for the client: a ValueError is its request's, anything else is ours."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, ValueError):
        return RequestError(400, str(error))
    LOG.error("a request failed", exc_info=error)
    return RequestError(500, f"{type(error).__name__}: {error}")


def start(engine: ServedModel, order: WritingRequest) -> list[Choice]:
    """The choices of an order; RequestError for what the model cannot take."""
    try:
        return [
            Choice(engine.lm, engine.together, order, index) for index in range(len(order.rows))
        ]
    except ValueError as error:
        raise RequestError(400, str(error)) from None


async def until_gone(request: Request, events: AsyncGenerator[Any, None]) -> list[Any]:
    """All events, unless the client goes away before: then the work is cancelled."""

    async def collect() -> list[Any]:
        async with aclosing(events) as some:
            return [event async for event in some]

    return await unless_gone(request, collect())


async def unless_gone(request: Request, wanted: Coroutine[Any, Any, Any]) -> Any:
    """What `wanted` gives; cancelled, and RequestError, where the client goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    work, watch = asyncio.create_task(wanted), asyncio.create_task(gone())
    try:
        await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        raise RequestError(499, "the client went away")
    finally:
        for task in (work, watch):
            task.cancel()
        await asyncio.gather(work, watch, return_exceptions=True)


async def streaming(request: Request, chunks: AsyncGenerator[str, None]) -> Response:
    """A stream whose first chunk is there already: what fails before is an ordinary error."""
    return EventStream(await unless_gone(request, first_of(chunks)))
