"""The forms in which others write tokens with log-probabilities, and answers that are in none."""

from __future__ import annotations

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

import pellucid
from pellucid.cli import main
from pellucid.diff.served import ask, judge
from pellucid.diff.served.spelling import Name, ids_of
from pellucid.generate.sample import penalise_repetition

PROMPT, ANSWER = "def read(path):\n    for", " line in open(path):\n        print(line)\n"


@pytest.fixture(scope="module")
def lm():
    return pellucid.load("demo", dtype="float32")


@pytest.fixture(scope="module")
def text(lm):
    """Prompt ids, answer ids, ln p of every token (the first: None), ln p of all (N, V)."""
    prompt = lm.encode(PROMPT)
    answer = lm.tokenizer.encode(ANSWER)
    with torch.no_grad():
        table = lm.model(torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
    ids = [*prompt, *answer]
    values = [None, *(float(table[place - 1, ids[place]]) for place in range(1, len(ids)))]
    return prompt, answer, values, table


def ours(prompt, answer, values, lm):
    return {"tokens": [*prompt, *answer], "logprobs": values, "prompt_tokens": len(prompt)}


def trl(prompt, answer, values, lm):
    return {"prompt_ids": [prompt], "completion_ids": [answer], "logprobs": [values[len(prompt) :]]}


def verl(prompt, answer, values, lm):
    """A tool's tokens stand among the response and are masked; their numbers mean nothing."""
    said = values[len(prompt) :]
    said[3] = -30.0
    return {
        "prompts": prompt,
        "responses": answer,
        "response_mask": [int(place != 3) for place in range(len(answer))],
        "rollout_log_probs": said,
    }


def by_id(ids, values, lm):
    return [
        None if x is None else {str(id): {"logprob": x, "rank": 1, "decoded_token": "?"}}
        for id, x in zip(ids, values, strict=True)
    ]


def vllm(prompt, answer, values, lm):
    output = {"index": 0, "text": ANSWER, "token_ids": answer,
              "logprobs": by_id(answer, values[len(prompt) :], lm)}  # fmt: skip
    return {
        "request_id": "0",
        "prompt": PROMPT,
        "prompt_token_ids": prompt,
        "prompt_logprobs": by_id(prompt, values[: len(prompt)], lm),
        "outputs": [output],
    }


def sglang(prompt, answer, values, lm):
    rows = [[x, id, None] for x, id in zip(values, [*prompt, *answer], strict=True)]
    before, after = rows[: len(prompt)], rows[len(prompt) :]
    meta = {"input_token_logprobs": before, "output_token_logprobs": after}
    return {"text": ANSWER, "meta_info": meta}


def completion(prompt, answer, values, lm):
    names = [lm.tokenizer.decode([id]) for id in answer]
    logprobs = {"tokens": names, "token_logprobs": values[len(prompt) :], "top_logprobs": None}
    choice = {"index": 0, "text": ANSWER, "logprobs": logprobs}
    return {"prompt": PROMPT, "response": {"choices": [choice]}}


def batch(prompt, answer, values, lm):
    content = [
        {"token": lm.tokenizer.decode([id]), "bytes": list(lm.tokenizer.decode_bytes([id])),
         "logprob": x, "top_logprobs": []}
        for id, x in zip(answer, values[len(prompt) :], strict=True)
    ]  # fmt: skip
    choice = {"index": 0, "message": {"content": ANSWER}, "logprobs": {"content": content}}
    return {"body": {"prompt": prompt}, "response": {"body": {"choices": [choice]}}}


FORMS = [ours, trl, verl, vllm, sglang, completion, batch]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_file_in_each_form_is_read(lm, text, form, tmp_path):
    prompt, answer, values, _ = text
    file = tmp_path / "logs.jsonl"
    file.write_text("\n\n".join([json.dumps(form(prompt, answer, list(values), lm))] * 2))
    report = pellucid.diff(lm, file)
    assert report.verdict == "within-rounding", str(report)
    assert report.gaps.texts == 2 and report.gaps.rms < 1e-5
    assert report.gaps.sampled == 2 * (len(answer) - (form is verl))
    assert report.tokens == [[*prompt, *answer]] * 2


def test_a_file_whose_numbers_are_another_s(lm, text, tmp_path):
    """A sampler's numbers at a temperature; those of the token after; log2."""
    prompt, answer, values, table = text
    ids, said = [*prompt, *answer], {}
    said["temperature in the logprobs"] = [
        float((table[p - 1] / 0.6).log_softmax(-1)[ids[p]]) for p in range(1, len(ids))
    ]
    said["logprobs shifted by one token"] = [*values[2:], -1.0]
    said["logarithm to the base 2"] = [x / math.log(2) for x in values[1:]]
    for cause, changed in said.items():
        file = tmp_path / "logs.jsonl"
        file.write_text(json.dumps({"tokens": ids, "logprobs": changed}))
        report = pellucid.diff(lm, file)
        assert report.exit_status == 1
        assert report.cause is not None and report.cause.name == cause, str(report)


def test_two_settings_at_once(lm, text, tmp_path):
    prompt, answer, _, _ = text
    ids, said = [*prompt, *answer], []
    with torch.no_grad():
        logits = lm.model(torch.tensor([ids]))[0]
    for place in range(len(prompt), len(ids)):
        seen = torch.zeros(1, logits.shape[1], dtype=torch.bool)
        seen[0, ids[:place]] = True
        row = penalise_repetition(logits[place - 1 : place], seen, 1.3)
        said.append(float((row / 0.8).log_softmax(-1)[0, ids[place]]))
    file = tmp_path / "logs.jsonl"
    row = {"prompt_ids": prompt, "completion_ids": answer, "logprobs": said}
    file.write_text(json.dumps(row))
    report = pellucid.diff(lm, file)
    assert report.exit_status == 1 and report.gaps.kl > 0
    assert report.cause is not None, str(report)
    assert report.cause.name == "several settings in the logprobs"
    assert "temperature 0.8, repetition 1.3:" in report.cause.evidence


def test_a_token_that_was_ruled_out_has_no_number(lm, text, tmp_path, monkeypatch):
    prompt, answer, values, _ = text
    monkeypatch.setattr(judge, "find_cause", lambda *given: (None, (), ""))
    values = [*values[:9], -9999.0, *values[10:]]
    file = tmp_path / "logs.jsonl"
    file.write_text(json.dumps({"tokens": [*prompt, *answer], "logprobs": values}))
    report = pellucid.diff(lm, file)
    assert report.first is not None and report.first.measure.where.startswith("token 9,")
    told = report.to_json()["served"]
    assert told["most"] is None and told["rows"][8]["logprob_b"] is None
    assert "ln p −∞ there" in str(report)


WRONG = {
    "no JSON": "{",
    "expected one object": "[1, 2]",
    "no line holds": "",
    "fields text": '{"text": "hello"}',
    "NaN": '{"tokens": [1, 2], "logprobs": [null, NaN]}',
    "above 0": '{"tokens": [1, 2], "logprobs": [null, 0.7]}',
    "expected a number": '{"tokens": [1, 2], "logprobs": [null, "x"]}',
    "expected whole numbers": '{"tokens": [1, "a"], "logprobs": [null, -1]}',
    "3 tokens and 1 log": '{"tokens": [1, 2, 3], "logprobs": [-1], "prompt_tokens": 1}',
    "A's vocabulary ends": '{"tokens": [1, 999999], "logprobs": [null, -1]}',
    "without its prompt": '{"choices": [{"logprobs": {"content": []}}]}',
    "no log-probabilities": '{"prompt": "a", "choices": [{"text": "b", "logprobs": null}]}',
    "no form that is known": '{"tokens": [[1, 2]], "logprobs": [[null, -1], [-1]]}',
    "is no token of A": '{"prompt": "a", "choices": [{"logprobs": {"tokens": ["日本"], '
    '"token_logprobs": [-1]}}]}',
    "expected as many": '{"prompt": "a", "choices": [{"logprobs": {"tokens": ["a", "b"], '
    '"token_logprobs": [-1]}}]}',
    "nothing is said": '{"tokens": [1], "logprobs": [-1]}',
}


@pytest.mark.parametrize("said", WRONG)
def test_a_file_in_no_form_is_one_line(said, tmp_path, capsys):
    file = tmp_path / "logs.jsonl"
    file.write_text(WRONG[said])
    assert main(["diff", "demo", str(file)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told, told


def test_names_of_tokens():
    """By bytes, escapes and ids; two tokens of one spelling; part of a character."""
    tokenizer = pellucid.load("demo").tokenizer
    ids = tokenizer.encode("naïve 日 café")
    bare = [tokenizer.decode_bytes([id]) for id in ids]
    assert ids_of([Name("", data=x) for x in bare], tokenizer, [], "") == ids
    escaped = [Name("bytes:" + "".join(f"\\x{b:02x}" for b in x)) for x in bare]
    assert ids_of(escaped, tokenizer, [], "") == ids
    assert ids_of([Name(f"token_id:{id}") for id in ids], tokenizer, [], "") == ids
    shown = [Name(x.decode("utf-8", "replace")) for x in bare]
    assert "\ufffd" in "".join(name.text for name in shown)
    assert ids_of(shown, tokenizer, ids, "") == ids
    with pytest.raises(ValueError, match="no whole character"):
        ids_of(shown, tokenizer, [], "")
    with pytest.raises(ValueError, match="A has no tokenizer"):
        ids_of([Name("a")], None, [], "")


# ── Servers that answer in their own way ─────────────────────────────────────────────────────────


@contextmanager
def answering(reply, models=None, status=200):
    """A server that gives `reply(path, body)`, JSON or bytes, to every request."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send(models if models is not None else {"data": [{"id": "m"}]}, 200)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = reply(self.path, body)
            self.send(*(said if isinstance(said, tuple) else (said, status)))

        def send(self, said, status):
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if 300 <= status < 400:
                self.send_header("Location", "http://example.org/")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_vllm_server_states_its_token_ids(lm, text):
    prompt, answer, values, _ = text
    asked = []

    def reply(path, body):
        asked.append((path, body))
        names = [f"token_id:{id}" for id in (*prompt, *answer)]
        logprobs = {"tokens": names, "token_logprobs": values, "top_logprobs": None}
        choice = {"text": PROMPT + ANSWER, "logprobs": logprobs}
        return {"choices": [choice], "usage": {"prompt_tokens": len(prompt)}}

    with answering(reply, {"data": [{"id": "m", "owned_by": "vllm"}]}) as url:
        report = pellucid.diff(lm, url, PROMPT, steps=len(answer))
    assert report.verdict == "within-rounding" and report.gaps.sampled == len(answer)
    path, body = asked[0]
    assert path == "/v1/completions" and body["return_token_ids"] and body["echo"]
    assert body["model"] == "m" and body["max_tokens"] == len(answer)


def test_a_llama_cpp_server_does_not_echo_and_names_ids(lm, text):
    prompt, answer, values, table = text

    def reply(path, body):
        if body.get("echo"):
            return {"error": {"code": 400, "message": "Only no echo is supported"}}, 400
        content = []
        for place, id in enumerate(answer, len(prompt)):
            top = [{"id": int(i), "token": "?", "bytes": [63], "logprob": float(x)}
                   for x, i in zip(*table[place - 1].topk(3), strict=True)]  # fmt: skip
            content.append({"id": id, "token": "?", "logprob": values[place],
                            "top_logprobs": top})  # fmt: skip
        return {"choices": [{"text": ANSWER, "logprobs": {"content": content}}]}

    with answering(reply) as url:
        report = pellucid.diff(lm, f"{url}/v1/completions", PROMPT)
    assert report.verdict == "within-rounding", str(report)
    assert report.gaps.tokens == report.gaps.sampled == len(answer)
    assert "does not echo" in report.note


ANSWERS = {
    "no JSON object": b"<html>",
    "has no choices": {"hello": 1},
    "without log-probabilities": {"choices": [{"text": "a", "logprobs": None}]},
    "no form that is known": {"choices": [{"logprobs": {"content": [{"top_logprobs": 3}]}}]},
    "is no token of A": {"choices": [{"logprobs": {"tokens": ["日本"], "token_logprobs": [-1.0]}}]},
    "NaN": b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [NaN]}}]}',
    "status 500, out of memory": ({"error": {"message": "out of\nmemory"}}, 500),
    "status 429": ({"detail": "slow down"}, 429),
    "points elsewhere": (b"", 302),
}


@pytest.mark.parametrize("said", ANSWERS)
def test_an_answer_in_no_form_is_one_line(said, capsys):
    with answering(lambda path, body: ANSWERS[said]) as url:
        assert main(["diff", "demo", url]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and said in told, told


def test_a_server_that_says_nothing_is_given_up(monkeypatch, capsys):
    monkeypatch.setattr(ask, "PATIENCE", 0.2)
    stop = threading.Event()

    def reply(path, body):
        stop.wait(5)
        return {}

    with answering(reply) as url:
        assert main(["diff", "demo", url]) == 2
        stop.set()
    assert "no answer within 0.2 seconds" in capsys.readouterr().err
