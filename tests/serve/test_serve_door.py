"""Who may enter, what a bad client can do, and that neither stops the others."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
from serving import call, eventually, language_model, served, stream

from pellucid import cli
from pellucid.language_model import LanguageModel
from pellucid.serve import Rules, ServedModel, server
from pellucid.serve.security import check_binding, is_known_host

PAGE = "https://example.org"


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return language_model(tmp_path_factory.mktemp("bpe"), context=4096)


@pytest.fixture
def engine(lm) -> ServedModel:
    return ServedModel(lm, "tiny", live=2, waiting=2, fast=False)


@pytest.fixture
def client(engine):
    rules = Rules(key="secret", origins=(PAGE,), most_bytes=20_000, patience=1.0)
    with served(engine, rules=rules) as client:
        client.headers["Authorization"] = "Bearer secret"
        yield client


def raw(client, data: bytes, *, wait: float = 20) -> bytes:
    """What comes back for bytes as they are, until the server closes."""
    with socket.create_connection((client.base_url.host, client.base_url.port)) as line:
        line.settimeout(wait)
        line.sendall(data)
        found = b""
        while part := line.recv(65536):
            found += part
        return found


def head(client, path: str, length: int, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {client.base_url.host}", "Connection: close"]
    lines += [f"Content-Length: {length}", "Authorization: Bearer secret", *more, "", ""]
    return "\r\n".join(lines).encode()


LONG = {"prompt": "the cat", "max_tokens": 4000, "temperature": 0, "stop": ["\0\0"]}


def test_a_key_is_asked_of_everything_but_health(client):
    for path in ("/v1/models", "/metrics", "/tokenizer_info", "/nothing", "/health/", "/HEALTH"):
        for given in ("", "Bearer secre", "Bearer secret2", "secret", "Bearer sécret"):
            headers = [(b"authorization", given.encode("latin-1"))]
            assert client.get(path, headers=headers).status_code == 401
    assert client.get("/health", headers={"Authorization": ""}).status_code == 200
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize(
    ("host", "known"),
    [
        ("127.0.0.1:8000", True), ("localhost", True), ("[::1]:8000", True), ("10.0.0.3", True),
        ("evil.example:8000", False), ("127.0.0.1.evil.example", False), ("", False),
        ("evil.example@127.0.0.1", False), ("localhost:x", False), ("127.0.0.1/evil", False),
        ("box.lan", True), ("BOX.lan", True),
    ],
)  # fmt: skip
def test_a_host_that_another_site_can_have_is_refused(host, known):
    assert is_known_host(host, "box.lan") is known


def test_pages_elsewhere(client):
    assert client.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    answer = client.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    assert client.get("/v1/models", headers={"Origin": "null"}).status_code == 403
    own = f"http://{client.base_url.host}:{client.base_url.port}"
    assert client.get("/v1/models", headers={"Origin": own}).status_code == 200
    allowed = client.get("/v1/models", headers={"Origin": PAGE})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == PAGE
    del client.headers["Authorization"]  # a browser sends none with a preflight
    preflight = client.options("/v1/models", headers={"Origin": PAGE})
    assert preflight.status_code == 204
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    refused = client.options("/v1/models", headers={"Origin": "http://evil.example"})
    assert refused.status_code == 403
    without = client.get("/v1/models", headers={"Origin": PAGE})
    assert without.status_code == 401
    assert without.headers["access-control-allow-origin"] == PAGE  # so that the page can read why


BODIES = [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"\xff\xfe", 400), (b'{"prompt": NaN}', 400),
    (b'{"prompt": "a", "prompt": "b"}', 400), (b"[" * 19_000, 400), (b'{"a":' * 3_900, 400),
    (b'{"seed": ' + b"9" * 9_000 + b', "prompt": "a"}', 400), (b'{"prompt": "\\ud800"}', 200),
    (b'{"prompt": "' + b"a" * 30_000 + b'"}', 413), (b'{"prompt": 1e999}', 400),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(BODIES)))
def test_bad_bodies(client, number, caplog):
    body, status = BODIES[number]
    with caplog.at_level(logging.WARNING):
        answer = client.post("/v1/completions", content=body)
    assert answer.status_code == status, answer.text
    assert "Traceback" not in answer.text
    assert not caplog.records
    if status != 200:
        assert "\n" not in answer.json()["error"]["message"]


def test_bodies_of_unknown_length_and_compressed_ones(client):
    parts = (b"a" * 1000 for _ in range(40))
    assert client.post("/v1/completions", content=parts).status_code == 413
    answer = client.post("/v1/completions", content=b"x", headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


def test_half_requests_and_huge_heads(client, monkeypatch, caplog):
    monkeypatch.setattr("pellucid.serve.server.PATIENCE", 0.5)
    with caplog.at_level(logging.INFO):
        assert raw(client, b"GET /health HTTP/1.1\r\nHost: ") == b""  # no head in time
        assert b" 408 " in raw(client, head(client, "/v1/completions", 100) + b'{"pro')
        huge = b"GET /health HTTP/1.1\r\nX: " + b"a" * 200_000
        with contextlib.suppress(ConnectionError):  # closed before all was sent
            assert b" 400 " in raw(client, huge)
        assert b" 400 " in raw(client, b"\x16\x03\x01 no http\r\n\r\n")
        assert b" 400 " in raw(client, head(client, "/v1/completions", -1))
        assert call(client, "/v1/completions", prompt="a", max_tokens=2)
    assert not [record for record in caplog.records if record.exc_info]


def test_no_path_leads_to_files(client):
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static/..%2f..%2fapp.py",
                 "//etc/passwd", "/v1/../../app.py", "/\\..\\app.py"):  # fmt: skip
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
        found = raw(client, f"{request}Connection: close\r\n\r\n".encode())
        assert b" 404 " in found.split(b"\r\n")[0], path


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_away_frees_its_place(client, engine, streamed):
    data = json.dumps({**LONG, "stream": streamed}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as line:
        line.sendall(head(client, "/v1/completions", len(data)) + data)
        eventually(lambda: engine.turns > 5)
        assert engine.live == 1
    eventually(lambda: engine.live == 0, seconds=10)
    after = engine.turns
    assert after < 3000, "it was written to the end"
    time.sleep(0.2)
    assert engine.turns - after <= 2  # the turn that was under way, and the one that ends it


def test_live_requests_take_turns_and_too_many_are_refused(client, engine):
    data = json.dumps({**LONG, "stream": True}).encode()
    lines = []
    for expected in ((1, 0), (2, 0), (2, 1), (2, 2)):
        line = socket.create_connection((client.base_url.host, client.base_url.port))
        line.sendall(head(client, "/v1/completions", len(data)) + data)
        lines.append(line)
        eventually(lambda wanted=expected: (engine.live, engine.waiting) == wanted)
    refused = client.post("/v1/completions", json={"prompt": "a"})
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "1"
    lines.pop().close()  # a request that waits leaves while others go on
    eventually(lambda: (engine.live, engine.waiting) == (2, 1), seconds=10)
    for line in lines:
        line.close()
    eventually(lambda: (engine.live, engine.waiting) == (0, 0))
    assert call(client, "/v1/completions", prompt="a", max_tokens=2)


def test_a_short_answer_does_not_wait_for_a_long_one(client, engine, lm):
    data = json.dumps({**LONG, "stream": True}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as line:
        line.sendall(head(client, "/v1/completions", len(data)) + data)
        eventually(lambda: engine.live == 1)
        before = engine.turns
        chunks = stream(client, "/v1/completions", prompt="on", max_tokens=8, temperature=0)
        assert engine.turns - before < 100
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert text == lm.generate("on", max_new_tokens=8, temperature=0.0, fast=False)


def test_a_host_of_the_network_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.7", "box.lan"):
        with pytest.raises(ValueError, match="--api-key KEY, or --insecure"):
            check_binding(host, None, False)
        check_binding(host, "key", False)
        check_binding(host, None, True)
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        check_binding(host, None, False)
    with pytest.raises(ValueError, match="printable"):
        check_binding("127.0.0.1", "kéy", False)


def test_the_verb_refuses_in_one_line(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, said in (
            (["--host", "0.0.0.0"], "--api-key"),
            (["--port", port], "cannot be bound"),
            (["--port", "0", "/no/such/model"], "/no/such/model"),
            (["--port", "0", "demo", "demo"], "two models are called 'demo'"),
            (["--port", "99999"], "--port"),
        ):
            assert cli.main(["serve", *words]) == 2
            error = capsys.readouterr().err.splitlines()
            assert said in error[-1]
            assert error[-1].startswith("pellucid serve: ")


def test_the_page_opens_once_the_server_answers(monkeypatch):
    opened = []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(server.time, "sleep", lambda _: setattr(waiting, "started", True))
    waiting: Any = SimpleNamespace(started=False, should_exit=False)
    server._show(waiting, "http://127.0.0.1:1/")
    assert opened == ["http://127.0.0.1:1/"]
    leaving: Any = SimpleNamespace(started=False, should_exit=True)
    server._show(leaving, "never")
    assert len(opened) == 1
