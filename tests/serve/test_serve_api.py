"""The endpoints, against the model called in this process and against the wire's own rules."""

from __future__ import annotations

import base64
import struct

import httpx
import pytest
import torch
from serving import call, language_model, served, stream

import pellucid
from pellucid.evaluate.harness import Answers
from pellucid.generate import row_seed
from pellucid.language_model import LanguageModel
from pellucid.serve import ServedModel
from pellucid.serve.writing import Choice

PROMPTS = ["the cat", "on the mat", "naïve"]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return language_model(tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def client(lm):
    with served(ServedModel(lm, "tiny", fast=False)) as client:
        yield client


def texts(answer: dict) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("as_ids", [False, True])
def test_texts_are_those_of_the_model_alone(client, lm, as_ids):
    given = [lm.encode(prompt) for prompt in PROMPTS] if as_ids else PROMPTS
    greedy = call(client, "/v1/completions", prompt=given, max_tokens=9, temperature=0)
    alone = [lm.generate(p, max_new_tokens=9, temperature=0.0, fast=False) for p in PROMPTS]
    assert texts(greedy) == alone
    single = call(client, "/v1/completions", prompt=given[0], max_tokens=9, temperature=0)
    assert texts(single) == alone[:1]
    seeded = call(client, "/v1/completions", prompt=given, max_tokens=9, seed=5, n=2, top_k=40)
    expected = [
        lm.generate(PROMPTS[i // 2], max_new_tokens=9, seed=row_seed(5, i), top_k=40, fast=False)
        for i in range(6)
    ]
    assert texts(seeded) == expected
    read = sum(len(lm.encode(prompt)) for prompt in PROMPTS)
    assert seeded["usage"]["prompt_tokens"] == read
    assert seeded["usage"]["completion_tokens"] == 6 * 9


def test_a_stop_string_ends_a_text_and_never_shows(client, lm):
    whole = lm.generate("the cat", max_new_tokens=20, temperature=0.0, fast=False)
    stop = whole[7:10]
    body = {"prompt": "the cat", "max_tokens": 20, "temperature": 0, "stop": [stop, "zzz"]}
    (choice,) = call(client, "/v1/completions", **body)["choices"]
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    chunks = stream(client, "/v1/completions", **body)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == choice["text"]


def test_a_stream_of_texts_is_the_whole_answer_in_order(client):
    body = {"prompt": PROMPTS, "max_tokens": 12, "seed": 3, "n": 2}
    expected = call(client, "/v1/completions", **body)
    chunks = stream(client, "/v1/completions", **body, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert last["choices"] == []
    assert last["usage"] == expected["usage"]
    assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
    joined, reasons = [""] * 6, [None] * 6
    for chunk in chunks:
        assert chunk["usage"] is None
        (choice,) = chunk["choices"]
        assert reasons[choice["index"]] is None, "nothing follows the reason"
        joined[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert joined == texts(expected)
    assert reasons == [choice["finish_reason"] for choice in expected["choices"]]
    assert "usage" not in stream(client, "/v1/completions", **body)[0]


def test_a_chat_and_its_stream(client, lm):
    messages = [{"role": "user", "content": "the cat"}]
    body = {"messages": messages, "max_tokens": 9, "seed": 2, "n": 2, "logprobs": True}
    body |= {"top_logprobs": 3}
    whole = call(client, "/v1/chat/completions", **body)
    row = lm.tokenizer.chat.encode(messages)
    for index, choice in enumerate(whole["choices"]):
        alone = lm.generate(row, max_new_tokens=9, seed=row_seed(2, index), fast=False)
        assert choice["message"] == {"role": "assistant", "content": alone}
        assert len(choice["logprobs"]["content"]) == 9
    chunks = stream(client, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        own = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        first, *middle, last = own
        assert first["delta"] == {"role": "assistant", "content": None}
        assert last["delta"] == {}
        assert last["finish_reason"] == choice["finish_reason"] == "length"
        assert all(c["finish_reason"] is None for c in own[:-1])
        assert "".join(c["delta"]["content"] for c in middle) == choice["message"]["content"]
        scored = [token for c in middle for token in c["logprobs"]["content"]]
        assert scored == choice["logprobs"]["content"]
        data = b"".join(bytes(token["bytes"]) for token in scored)
        assert data.decode("utf-8", "replace") == choice["message"]["content"]


def test_log_probabilities_are_the_models(client, lm):
    ids = lm.encode("the cat sat on")
    body = {
        "prompt": "the cat sat on",
        "max_tokens": 5,
        "temperature": 0,
        "echo": True,
        "logprobs": 4,
    }
    (choice,) = call(client, "/v1/completions", **body)["choices"]
    found = choice["logprobs"]
    tokens = list(ids)
    with torch.no_grad():
        for _ in range(5):
            tokens.append(int(lm.model(torch.tensor([tokens]))[0, -1].argmax()))
        expected = lm.model(torch.tensor([tokens]))[0].log_softmax(-1)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    for place in range(1, len(tokens)):
        row = expected[place - 1]
        assert found["token_logprobs"][place] == pytest.approx(float(row[tokens[place]]), abs=1e-9)
        likeliest = sorted(found["top_logprobs"][place].values(), reverse=True)[:4]
        assert likeliest == pytest.approx(row.topk(4).values.tolist(), abs=1e-9)
    text, begins = choice["text"], found["text_offset"]
    assert text.startswith("the cat sat on")
    whole = [name for name in found["tokens"] if not name.startswith("bytes:")]
    assert whole
    for name, begin, end in zip(
        found["tokens"][1:], begins[1:], [*begins[2:], len(text)], strict=True
    ):
        assert name.startswith("bytes:") or text[begin:end].endswith(name)


def harness_scores(client, model: str, context: list[int], after: list[int]) -> tuple[float, bool]:
    """What lm-evaluation-harness's local-completions sends, and how it reads the answer."""
    answer = call(
        client, "/v1/completions", model=model, prompt=[context + after], echo=True, max_tokens=1,
        logprobs=1, temperature=0, seed=1234,
    )  # fmt: skip
    found = answer["choices"][0]["logprobs"]
    begin = len(context)
    scores, likeliest = found["token_logprobs"][begin:-1], found["top_logprobs"][begin:-1]
    total = sum(scores)
    greedy = all(one == max(top.values()) for one, top in zip(scores, likeliest, strict=True))
    return total, greedy


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_harness_reads_the_same_numbers_here_and_in_the_process(dtype):
    lm = pellucid.load("demo", dtype=dtype)
    answers = Answers(lm, batch=1)
    texts = [
        ("import os\nimport ", "sys"),
        ("def f(x):\n    return ", "x + 1\n\ndef"),
        ("if", " x"),
    ]
    pairs = [(lm.encode(a), lm.tokenizer.encode(b)) for a, b in texts]
    start = lm.encode("import os")
    pairs.append(
        (start, lm.tokenizer.encode(lm.generate(start, max_new_tokens=6, temperature=0.0)))
    )
    long = lm.tokenizer.encode((lm.tokenizer.decode(range(300)) * 2)[:600])[:240]
    pairs += [(long[:200], long[200:]), (long[:-1], long[-1:])]
    with served(ServedModel(lm, "demo")) as client:
        found = [harness_scores(client, "demo", *pair) for pair in pairs]
    assert found == answers.continuations(pairs)


def test_no_new_token_and_no_alternative(client, lm):
    body = {"prompt": "the cat", "echo": True, "logprobs": 0}
    (choice,) = call(client, "/v1/completions", **body, max_tokens=0)["choices"]
    assert choice["text"] == "the cat"
    assert choice["finish_reason"] == "length"
    assert len(choice["logprobs"]["token_logprobs"]) == len(lm.encode("the cat"))
    assert choice["logprobs"]["top_logprobs"] is None
    (choice,) = call(client, "/v1/completions", prompt="the", max_tokens=0)["choices"]
    assert (choice["text"], choice["logprobs"]) == ("", None)


def test_tokens_there_and_back(client, lm):
    text = "the naïve cat 日本"
    found = call(client, "/tokenize", prompt=text, return_token_strs=True)
    assert found["tokens"] == Answers(lm).encode(text)
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    plain = call(client, "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
    assert call(client, "/detokenize", tokens=plain)["prompt"] == text
    info = client.get("/tokenizer_info").json()
    eos = call(client, "/tokenize", prompt=info["eos_token"], add_special_tokens=False)["tokens"]
    assert eos == [lm.tokenizer.eos_id]


def test_a_text_is_a_vector_of_length_one(client, lm):
    found = call(client, "/v1/embeddings", input=["the cat", "on"])
    for text, row in zip(["the cat", "on"], found["data"], strict=True):
        seen = lm.trace(text)["final_norm"][0].double().mean(0)
        assert row["embedding"] == pytest.approx((seen / seen.norm()).tolist(), abs=1e-9)
    packed = call(client, "/v1/embeddings", input="the cat", encoding_format="base64")["data"][0]
    data = base64.b64decode(packed["embedding"])
    floats = struct.unpack(f"<{len(data) // 4}f", data)
    assert list(floats) == pytest.approx(found["data"][0]["embedding"], abs=1e-6)


def test_a_response_and_its_events(client, lm):
    body = {"input": "the cat", "instructions": "sit", "temperature": 0, "max_output_tokens": 7}
    whole = call(client, "/v1/responses", **body)
    said = [{"role": "system", "content": "sit"}, {"role": "user", "content": "the cat"}]
    alone = lm.generate(
        lm.tokenizer.chat.encode(said), max_new_tokens=7, temperature=0.0, fast=False
    )
    assert whole["output"][0]["content"][0]["text"] == alone
    assert (whole["status"], whole["usage"]["output_tokens"]) == ("incomplete", 7)
    answer = client.post("/v1/responses", json={**body, "stream": True}).text
    kinds = [line[7:] for line in answer.splitlines() if line.startswith("event: ")]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    events = [httpx.Response(200, text=line[6:]).json() for line in answer.splitlines()
              if line.startswith("data: ")]  # fmt: skip
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert "".join(event.get("delta", "") for event in events) == alone


WRONG = [
    ("completions", {"prompt": "a", "max_token": 3}, "max_token", "did you mean max_tokens"),
    ("completions", {"prompt": "a", "suffix": "b"}, "suffix", "no such field"),
    ("completions", {"prompt": "a", "logprobs": 21}, "logprobs", "from 0 to 20"),
    ("completions", {"prompt": "a", "logprobs": True}, "logprobs", "from 0 to 20"),
    ("completions", {"prompt": "a", "best_of": 2}, "best_of", "expected 1"),
    ("completions", {"prompt": "a", "presence_penalty": 1}, "presence_penalty", "expected 0"),
    ("completions", {"prompt": "a", "stream_options": {}}, "stream_options", "stream: true"),
    ("completions", {"prompt": "a", "temperature": -1}, "temperature", "from 0"),
    ("completions", {"prompt": "a", "top_p": 0}, "top_p", "above 0"),
    ("completions", {"prompt": "a", "stop": [""]}, "stop", "one character"),
    ("completions", {"prompt": [[1, 99999]]}, "prompt", "99999"),
    ("completions", {"prompt": []}, "prompt", "expected text"),
    ("completions", {"prompt": [["a"]]}, "prompt[0]", "token ids"),
    ("completions", {}, "prompt", "missing"),
    ("completions", {"prompt": "a", "max_tokens": 999}, None, "the context is 64"),
    ("completions", {"prompt": [5] * 65}, "prompt", "65 tokens"),
    ("completions", {"prompt": ["a"] * 64, "n": 3}, "n", "192 choices"),
    ("chat/completions", {"messages": []}, "messages", "one message"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "text"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a", "name": "b"}]},
     "messages[0].name", "no such field"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": [{}]},
     "tools[0].type", "is missing"),
    ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1},
     "top_logprobs", "logprobs: true"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
     "messages[0].content[0].type", "nothing else"),
    ("responses", {"input": "a", "store": True}, "store", "expected false"),
    ("responses", {"input": "a", "previous_response_id": "x"}, "previous_response_id", "no such"),
    ("embeddings", {"input": "a", "dimensions": 3}, "dimensions", "no such field"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "param", "said"), WRONG)
def test_what_is_not_served_is_named(client, path, body, param, said):
    answer = client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert said in error["message"]
    assert "\n" not in error["message"]


def test_only_models_named_at_the_start(client):
    for name in ("demo", "../tiny", "/etc/passwd"):
        answer = client.post("/v1/completions", json={"model": name, "prompt": "a"})
        assert answer.status_code == 404
        assert "served: tiny" in answer.json()["error"]["message"]
    assert [row["id"] for row in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_an_error_inside_a_stream_is_an_event(client, monkeypatch):
    steps, step = [], Choice.step

    def failing(self):
        steps.append(1)
        if len(steps) == 3:
            raise ValueError("the logits are not numbers")
        return step(self)

    monkeypatch.setattr(Choice, "step", failing)
    body = {"prompt": "the", "max_tokens": 9, "stream": True, "temperature": 0, "stop": "\0"}
    answer = client.post("/v1/completions", json=body)
    last = answer.text.removesuffix("\n\n").split("\n\n")[-1]
    assert httpx.Response(200, text=last[6:]).json()["error"]["message"] == (
        "the logits are not numbers"
    )
    assert "[DONE]" not in answer.text


def test_what_happened_is_counted(lm):
    with served(ServedModel(lm, "tiny", fast=False)) as client:
        # A seed: without one, a run in about fifty draws a stop token and writes less than 4.
        answer = call(client, "/v1/completions", prompt="the cat", max_tokens=4, seed=1)
        client.post("/v1/completions", json={"prompt": 3})
        lines = client.get("/metrics").text.splitlines()
    read = len(lm.encode("the cat"))
    assert 'pellucid_requests_total{path="/v1/completions",status="200"} 1' in lines
    assert 'pellucid_requests_total{path="/v1/completions",status="400"} 1' in lines
    assert f'pellucid_prompt_tokens_total{{model="tiny"}} {read}' in lines
    written = answer["usage"]["completion_tokens"]
    assert written > 0 and f'pellucid_new_tokens_total{{model="tiny"}} {written}' in lines
    assert 'pellucid_requests_live{model="tiny"} 0' in lines
