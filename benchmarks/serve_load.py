"""Many clients at once against `pellucid serve`: errors, growth of memory, every answer checked.

    python benchmarks/serve_load.py demo --clients 100 --seconds 300
    python benchmarks/serve_load.py demo --clients 1 4 8 --seconds 20     tokens/s at each
    python benchmarks/serve_load.py FOLDER --peer http://127.0.0.1:8081 --clients 8 --rounds 3

With --peer, another server of the same weights (llama.cpp's, of what `convert --to gguf` wrote) is
asked the same in turns with ours; all requests are whole and greedy then, and of the peer's text
only its length counts, since both must write as many tokens. Each answer is `--tokens` long where
the model does not stop: random weights hardly ever do.

The server is a process of its own. Each client sends one request after another, drawn from a list
of completions: short and long prompts, equal beginnings, greedy and seeded, whole and streamed.
What each must answer is computed first, by `generate` on the same model in this process. Prints
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

import pellucid
from pellucid.language_model import LanguageModel

SNIPPET = "def area(width, height):\n    return width * height\n\n\n"


Asked = list[tuple[dict[str, Any], str | None]]  # a body, and the text that must come back


def peer_requests(lm: LanguageModel, tokens: int) -> Asked:
    """Greedy requests for so many tokens after prompts of 16 to 256 tokens, none like another."""
    draw, most = random.Random(0), lm.config.context_length - tokens - 1
    ids = lm.encode(SNIPPET * 40)
    found: Asked = []
    for length in (16, 32, 64, 128, 200, 256):
        prompt = [draw.choice(ids) for _ in range(min(length, most))]
        body = {"prompt": lm.tokenizer.decode(prompt), "max_tokens": tokens, "temperature": 0.0}
        found.append(({**body, "stream": False}, None))
    return found


def requests_of(lm: LanguageModel, tokens: int) -> Asked:
    """Bodies of requests, each with the text that must come back."""
    ids = lm.encode(SNIPPET * 40)
    most = max(min(lm.config.context_length - tokens - 1, 300), 8)
    prompts: list[str | list[int]] = ["import os\n", "def parse(text):", "class Tree:\n    "]
    prompts += [ids[:most], [*ids[: most - 3], *lm.encode("x")], ids[: most // 2]]
    found: Asked = []
    for number, prompt in enumerate(prompts):
        for seed in (None, number):
            how = {"temperature": 0.0} if seed is None else {"temperature": 0.8, "seed": seed}
            text = lm.generate(prompt, max_new_tokens=tokens, **how)
            for stream in (False, True):
                usage = {"stream_options": {"include_usage": True}} if stream else {}
                body = {"prompt": prompt, "max_tokens": tokens, "stream": stream, **usage, **how}
                found.append((body, text))
    return found


class Tally:
    """What came back."""

    def __init__(self) -> None:
        self.answers = self.tokens = 0
        self.wrong: list[str] = []
        self.seconds: list[float] = []

    def figures(self, elapsed: float) -> dict[str, Any]:
        """In numbers."""
        ordered = sorted(self.seconds) or [0.0]
        return {
            "answers": self.answers,
            "wrong": len(self.wrong),
            "first_wrong": self.wrong[:3],
            "tokens_per_second": round(self.tokens / elapsed, 1),
            "seconds_median": round(ordered[len(ordered) // 2], 3),
            "seconds_p95": round(ordered[int(len(ordered) * 0.95)], 3),
        }


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, int]:
    """The text of one answer, whole or streamed, and how many tokens it has."""
    answer = await client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise ValueError(f"status {answer.status_code}: {answer.text[:200]}")
    if not body["stream"]:
        found = answer.json()
        return found["choices"][0]["text"], found["usage"]["completion_tokens"]
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        raise ValueError(f"a stream ends with {events[-1][:200]}")
    *chunks, last = (json.loads(event) for event in events[:-1])
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    return text, last["usage"]["completion_tokens"]


async def one_client(client, number: int, requests, until: float, tally: Tally) -> None:
    """Requests one after another, in this client's own seeded order."""
    order = random.Random(number)
    while time.monotonic() < until:
        body, expected = order.choice(requests)
        begin = time.monotonic()
        try:
            text, written = await ask(client, body)
        except Exception as error:
            tally.wrong.append(f"{type(error).__name__}: {error}")
            continue
        tally.seconds.append(time.monotonic() - begin)
        tally.answers += 1
        tally.tokens += written
        if expected is not None and text != expected:
            tally.wrong.append(f"{body}: {text!r}, expected {expected!r}"[:500])


async def load(
    url: str, clients: int, seconds: float, requests: Asked, pid: int | None
) -> dict[str, Any]:
    """So many clients for so long; the server's memory after each tenth of the time."""
    tally, begin = Tally(), time.monotonic()
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as c:
        running = [
            asyncio.create_task(one_client(c, number, requests, begin + seconds, tally))
            for number in range(clients)
        ]
        memory = []
        while time.monotonic() < begin + seconds:
            await asyncio.sleep(seconds / 10)
            memory.append(resident(pid) if pid else None)
        await asyncio.gather(*running)
    elapsed = time.monotonic() - begin
    figures = tally.figures(elapsed)
    return {"clients": clients, "seconds": round(elapsed, 1), **figures, "resident_mib": memory}


def resident(pid: int) -> int:
    """MiB of a process in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    return int(found[1]) >> 10 if found else 0


def main() -> None:
    """Start the server, load it, print what came back."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--clients", type=int, nargs="+", default=[100])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--tokens", type=int, default=32, help="written by each request")
    parser.add_argument("--peer", help="URL of another server of the same weights")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each, with --peer")
    parser.add_argument("--dtype", help="of our server")
    arguments = parser.parse_args()
    make = peer_requests if arguments.peer else requests_of
    requests = make(pellucid.load(arguments.model), arguments.tokens)
    command = [sys.executable, "-m", "pellucid", "serve", arguments.model, "--port", "0"]
    command += ["--dtype", arguments.dtype] if arguments.dtype else []
    server = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = address(server)
        servers = [("ours", url, server.pid)]
        servers += [("peer", arguments.peer, None)] if arguments.peer else []
        for clients in arguments.clients:
            for who, where, pid in servers * arguments.rounds:
                found = asyncio.run(load(where, clients, arguments.seconds, requests, pid))
                tell({"server": who, **found})
    finally:
        server.terminate()
        said = server.communicate()[1]
        tell({"tracebacks": said.count("Traceback")})


def tell(figures: dict[str, Any]) -> None:
    """A line of JSON."""
    sys.stdout.write(json.dumps(figures) + "\n")
    sys.stdout.flush()


def address(server: subprocess.Popen[str]) -> str:
    """Where the server says that it listens."""
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"http://[^/]+/", line):
            return found[0]
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
