"""Server-sent events whose errors stay inside the stream."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator

from starlette.responses import StreamingResponse

from pellucid.serve.schemas import RequestError
from pellucid.serve.wire import event

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
