"""One thread per model, in which requests take turns.

What a request wants done is an iterator: each `next` is one turn. The thread gives each live
request a turn, round after round, so that a long answer does not hold up the others. Before each
round, one step of `Together` computes the next tokens of all that is written, which turns then hand
out. Further requests wait; too many are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncGenerator, Generator
from typing import Any

from pellucid.generate import Together
from pellucid.language_model import LanguageModel
from pellucid.serve.fields import RequestError

LOG = logging.getLogger("pellucid.serve")
Work = Generator[Any, None, None]
_END = object()


class _Task:
    """One request's work, and the queue in which the event loop waits for what it yields."""

    def __init__(self, work: Work) -> None:
        self.work, self.cancelled = work, False
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def turn(self) -> bool:
        """One step; whether there is more to do."""
        if self.cancelled:
            self.work.close()
            return False
        try:
            self._post(next(self.work))
        except StopIteration:
            self._post(_END)
        except Exception as error:
            self._post(error)
        else:
            return True
        return False

    def _post(self, event: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, and with it the request
            self._loop.call_soon_threadsafe(self.events.put_nowait, event)


class ServedModel:
    """A model and the one thread that runs it.

    live      requests that take turns; waiting  requests that wait for a place among them
    fast      decode in C, as for `generate_tokens`
    draft     runs ahead of a text that is written alone (`Together`), as for `LanguageModel`
    together  what is written, in shared steps
    """

    def __init__(
        self,
        lm: LanguageModel,
        name: str,
        *,
        live: int = 16,
        waiting: int = 128,
        fast: bool | None = None,
        draft: str | LanguageModel | None = None,
    ) -> None:
        """ValueError for a draft with other tokens, or where C cannot decode either model."""
        self.lm, self.name, self.fast = lm, name, fast
        drafts = None if draft is None else lm.draft_model(draft)
        self.together = Together(lm.model, fast=fast, draft=drafts)
        self._most_live, self._most_waiting = live, waiting
        self._waiting: deque[_Task] = deque()
        self._live: deque[_Task] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self.turns = 0
        self._thread = threading.Thread(target=self._work, name=f"engine {name}", daemon=True)

    def start(self) -> None:
        """Begin to take requests."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; requests that are not answered yet are cancelled."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    @property
    def live(self) -> int:
        """Requests that take turns now."""
        return sum(not task.cancelled for task in tuple(self._live))

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    async def run(self, work: Work) -> AsyncGenerator[Any, None]:
        """What `work` yields, as it comes. An abandoned iterator frees its place within a turn.

        Raises RequestError 429 where too many requests wait, and what `work` raises.
        """
        task = _Task(work)
        with self._changed:
            if len(self._waiting) >= self._most_waiting:
                said = f"{self.name} is busy: {self._most_waiting} requests wait; try again"
                raise RequestError(429, said, Retry_After="1")
            self._waiting.append(task)
            self._changed.notify()
        try:
            while (event := await task.events.get()) is not _END:
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            task.cancelled = True
            with self._changed, contextlib.suppress(ValueError):
                self._waiting.remove(task)

    def _work(self) -> None:
        while self._admit():
            self.together.step()
            for _ in range(len(self._live)):
                task = self._live[0]
                more = task.turn()
                self.turns += 1
                self._live.rotate(-1) if more else self._live.popleft()

    def _admit(self) -> bool:
        """Move waiting requests to free places; sleep without any. False: stopped."""
        with self._changed:
            while not (self._stopped or self._waiting or self._live):
                self._changed.wait()
            if self._stopped:
                for task in (*self._live, *self._waiting):
                    task._post(RequestError(503, "the server is stopping"))
                return False
            while self._waiting and len(self._live) < self._most_live:
                self._live.append(self._waiting.popleft())
            return True
