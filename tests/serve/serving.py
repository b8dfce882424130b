"""A server on a real socket, over a random Llama with a chat template, and a way to call it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
from tiny import LLAMA, random_model

from pellucid import tokenizers
from pellucid.language_model import LanguageModel
from pellucid.serve import Rules, ServedModel, build_app
from pellucid.serve.server import http_server
from pellucid.tokenizers.chat import chat_for

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def language_model(folder, context: int = 64) -> LanguageModel:
    """A random Llama of about 300 tokens."""
    text = ["the cat sat on the mat and the cat ran … naïve 日本"] * 9
    tokenizer = tokenizers.train_bpe(text, 300, folder)
    tokenizer.chat = chat_for(tokenizer, TEMPLATE, {})
    config = replace(LLAMA, vocab_size=tokenizer.vocab_size, context_length=context)
    return LanguageModel(random_model(config), tokenizer)


@contextmanager
def served(*engines: ServedModel, rules: Rules | None = None) -> Iterator[httpx.Client]:
    """A client of a server with these engines, which runs in a thread meanwhile."""
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    server = http_server(build_app(engines, rules))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        eventually(lambda: server.started)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


def eventually(holds, seconds: float = 30) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.005)


def call(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    """The answer to a request that is to succeed."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: httpx.Client, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, which must end as a stream does."""
    answer = client.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("\n\n")
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
