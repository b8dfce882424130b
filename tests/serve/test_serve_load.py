"""Many clients at once: each gets what the model answers alone, and nothing is left behind.

`benchmarks/serve_load.py` does the same for minutes, with a hundred clients.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import call, eventually, language_model, served, stream

from pellucid.generate.prefixes import PIECE
from pellucid.serve import ServedModel

CLIENTS = 30


@pytest.mark.parametrize("fast", [True, False])
def test_thirty_clients_at_once(tmp_path, fast):
    lm = language_model(tmp_path, context=1024)
    lm.model.float()  # as C decodes it
    engine = ServedModel(lm, "tiny", live=7, waiting=CLIENTS, fast=fast)
    long = lm.encode("the cat sat on the mat " * 200)[: PIECE + 30]
    prompts = ["the cat", long, "on", [*long[:-2], 5], long[:PIECE], "naïve 日本"]
    bodies = []
    for number in range(CLIENTS):
        how = {"temperature": 0.0} if number % 3 == 0 else {"seed": number // 9}
        bodies.append({"prompt": prompts[number % 6], "max_tokens": 3 + number % 4, **how})

    def answer(number: int) -> str:
        if number % 2:
            return call(client, "/v1/completions", **bodies[number])["choices"][0]["text"]
        chunks = stream(client, "/v1/completions", **bodies[number])
        return "".join(chunk["choices"][0]["text"] for chunk in chunks)

    with served(engine) as client, ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(answer, range(CLIENTS)))
        eventually(lambda: engine.live == engine.waiting == 0)
        assert len(engine.together) == 0
    for body, text in zip(bodies, found, strict=True):
        options = {name: value for name, value in body.items() if name != "prompt"}
        options["max_new_tokens"] = options.pop("max_tokens")
        assert text == lm.generate(body["prompt"], fast=fast, **options)
    assert engine.together.prefixes.reused > 0
    assert engine.together.prefixes.nbytes < 1 << 26
