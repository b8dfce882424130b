"""Ask a server that speaks OpenAI's API for tokens with log-probabilities.

A URL may be that of the server (``http://host:8000``), of its API (``…/v1``) or of one endpoint
(``…/v1/chat/completions``); the name of one of several models goes behind ``#``. The key of a
server that wants one stands in the environment variable PELLUCID_API_KEY.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from pellucid.diff.served.answers import read_choice
from pellucid.diff.served.said import Messages, Said, well_formed
from pellucid.files import parse_json
from pellucid.tokenizers import Tokenizer

KEY = "PELLUCID_API_KEY"
PATIENCE = 120.0  # seconds without a byte
MOST_BYTES = 64 << 20  # of an answer
LENGTH = 32  # tokens to sample, where nothing is said
TOP = 5  # likeliest tokens of each place; OpenAI gives no more
Encode = Callable[[Any, bool], list[int]]
_CHAT, _COMPLETIONS = "/chat/completions", "/completions"
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Refused(ValueError):
    """A request that the server answered with an error."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(kw_only=True)
class Server:
    """A server's API, and which of its models is meant."""

    base: str  # ends in /v1, or wherever its endpoints stand
    chat: bool
    model: str | None
    maker: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """As the report calls it."""
        return f"{self.base}, model {self.model}" if self.model else self.base


def ask(
    url: str,
    prompt: str | Sequence[int] | Messages,
    encode: Encode,
    tokenizer: Tokenizer | None,
    length: int,
) -> tuple[Server, Said, list[int]]:
    """What the server makes of `prompt`, text, token ids or a conversation, and `length` tokens on.

    encode  (prompt, whether it is a conversation) -> token ids as A has them, returned last

    ValueError, in one line, where the server cannot be reached, refuses, answers with something
    else, or gives no log-probabilities.
    """
    server = find(url)
    spoken = not isinstance(prompt, str) and any(isinstance(one, Mapping) for one in prompt)
    server.chat = server.chat or spoken
    if server.chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    ids = encode(prompt, server.chat)
    said = (_chat if server.chat else _completion)(server, prompt, ids, tokenizer, length)
    if said is None:
        raise ValueError(
            f"{server.label} answered without log-probabilities: let it serve them (logprobs), or "
            "give a file of tokens with log-probabilities instead"
        )
    return server, said, ids


def find(url: str) -> Server:
    """The API behind a URL and its model; ValueError where several are served and none is named."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
        parts = urlsplit("")
    if not host or parts.scheme not in ("http", "https"):
        raise ValueError(f"{url}: no URL of a server; expected one like http://127.0.0.1:8000/v1")
    path, chat = parts.path.rstrip("/"), False
    if path.endswith(_CHAT):
        path, chat = path.removesuffix(_CHAT), True
    path = path.removesuffix(_COMPLETIONS) or "/v1"
    server = Server(base=f"{parts.scheme}://{parts.netloc}{path}", chat=chat,
                    model=parts.fragment or None)  # fmt: skip
    try:
        listed = call(f"{server.base}/models").get("data")
    except Refused as refused:
        if refused.status not in (404, 405):
            raise
        listed = None
    rows = [row for row in listed or [] if isinstance(row, Mapping) and "id" in row]
    names = [str(row["id"]) for row in rows]
    if server.model is None and len(names) > 1:
        raise ValueError(
            f"{server.base} serves {', '.join(names[:6])}: name one of them, {url}#{names[0]}"
        )
    server.model = server.model or next(iter(names), None)
    server.maker = next((str(row.get("owned_by", "")) for row in rows), "")
    return server


def _completion(
    server: Server,
    prompt: Any,
    ids: list[int],
    tokenizer: Tokenizer | None,
    length: int,
) -> Said | None:
    """The prompt's own log-probabilities too, where the server echoes it."""
    given = prompt if isinstance(prompt, str) else [int(id) for id in prompt]
    body = {"prompt": given, "max_tokens": length, "logprobs": TOP, **_asked(server)}
    url = server.base + _COMPLETIONS
    echo = True
    try:
        answer = call(url, {**body, "echo": True})
    except Refused as refused:
        if refused.status in (401, 403, 404, 429):
            raise
        answer, echo = call(url, body), False
        server.notes.append("the server does not echo: only sampled tokens are compared")
    return _read(answer, ids, tokenizer, server.label, echo=echo)


def _chat(
    server: Server, prompt: Any, ids: list[int], tokenizer: Tokenizer | None, length: int
) -> Said | None:
    messages = list(prompt)
    if not all(isinstance(message, Mapping) for message in messages):
        raise ValueError("a chat takes text or messages: for token ids give …/v1/completions")
    body = {"messages": messages, "max_tokens": length, "logprobs": True, "top_logprobs": TOP}
    body |= _asked(server) | ({"prompt_logprobs": 0} if server.maker == "vllm" else {})
    answer = call(server.base + _CHAT, body)
    return _read(answer, ids, tokenizer, server.label, echo=False, messages=messages)


def _asked(server: Server) -> dict[str, Any]:
    """Drawn from the model's own distribution; token ids where the server knows how to say them."""
    asked: dict[str, Any] = {"temperature": 1.0, "seed": 0}
    if server.model is not None:
        asked["model"] = server.model
    if server.maker == "vllm":
        asked |= {"return_tokens_as_token_ids": True, "return_token_ids": True}
    return asked


def _read(
    answer: Mapping[str, Any],
    ids: list[int],
    tokenizer: Tokenizer | None,
    where: str,
    *,
    echo: bool,
    messages: Messages | None = None,
) -> Said | None:
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], Mapping):
        raise ValueError(f"{where}: the answer has no choices: is this OpenAI's API?")
    used = answer.get("usage")
    counted = used.get("prompt_tokens") if isinstance(used, Mapping) else None
    with well_formed(where):
        return read_choice(
            choices[0],
            ids,
            tokenizer,
            where=where,
            counted=counted if type(counted) is int else None,
            echo=echo,
            messages=messages,
        )


class _Still(HTTPRedirectHandler):
    """No redirects: a key must not travel to another host."""

    def redirect_request(self, *given: Any, **named: Any) -> None:
        """None: the answer stands as it is, an error."""


def call(url: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object that a request is answered with; ValueError, in one line, for all else."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    data = None if body is None else json.dumps(body).encode()
    local = [ProxyHandler({})] if urlsplit(url).hostname in _LOCAL else []
    try:
        request = Request(url, data=data, headers=headers)
        with build_opener(_Still, *local).open(request, timeout=PATIENCE) as answer:
            text = answer.read(MOST_BYTES + 1)
    except HTTPError as error:
        raise Refused(f"{url}: {_refusal(error)}", error.code) from None
    except TimeoutError:
        raise ValueError(f"{url}: no answer within {PATIENCE:g} seconds") from None
    except URLError as error:
        late = isinstance(error.reason, TimeoutError)
        said = f"no answer within {PATIENCE:g} seconds" if late else error.reason
        raise ValueError(f"{url}: cannot be reached ({said}): is the server running?") from None
    except (OSError, ValueError) as error:  # a connection that ends early, a header that is none
        raise ValueError(f"{url}: {_line(str(error)) or type(error).__name__}") from None
    except Exception as error:  # http.client has exceptions of its own
        raise ValueError(f"{url}: the answer is no HTTP ({type(error).__name__})") from None
    if len(text) > MOST_BYTES:
        raise ValueError(f"{url}: the answer is longer than {MOST_BYTES >> 20} MiB")
    try:
        read: Any = parse_json(text.decode("utf-8"), url)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise ValueError(
            f"{url}: the answer is no JSON object: {_line(text[:80].decode('latin1'))!r}"
        )
    return read


def _refusal(error: HTTPError) -> str:
    """What the server says, and what to do where that is known."""
    try:
        said = json.loads(error.read(1 << 16))
        said = said.get("error", said.get("detail", said.get("message", said)))
        said = said.get("message", said) if isinstance(said, Mapping) else said
    except Exception:  # whatever the body is, the status says enough
        said = ""
    told = f"status {error.code}" + (f", {_line(str(said))}" if said else "")
    if error.code in (401, 403):
        return f"{told}; the server wants a key: put it into {KEY}"
    if 300 <= error.code < 400:
        return f"{told}; it points elsewhere: give the address that it points to"
    return told


def _line(text: str) -> str:
    shown = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in shown)[:200]
