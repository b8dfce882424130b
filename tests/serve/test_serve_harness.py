"""lm-evaluation-harness's own client of a served model against the adapter in this process."""

from __future__ import annotations

import pytest
import torch
from serving import served

import pellucid
from pellucid.evaluate.harness import Answers
from pellucid.serve import ServedModel

CONTEXTS = [
    ("import os\nimport ", "sys"),
    ("def f(x):\n    return ", "x + 1\n\ndef"),
    ("class Tree:\n    def __init__(self):\n", "        self.root = None"),
    ("", "import os"),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_echoed_scores_are_the_adapters_to_the_last_digit(dtype, threads, monkeypatch):
    """Whatever the batch; as the harness' client adds them up: all of a text or its end."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # of the C decoder
    lm = pellucid.load("demo", dtype=dtype)
    answers = Answers(lm)
    pairs = [(answers.encode(a) or [answers.begin], answers.encode(b)) for a, b in CONTEXTS]
    texts = ["import os\nimport sys\n", "def f(x):\n    return x\n" * 12]
    rows = [[*a, *b] for a, b in pairs] + [
        [answers.begin, *answers.encode(t, bos=False)] for t in texts
    ]
    with served(ServedModel(lm, "demo")) as client:
        asked = {"prompt": rows, "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
        choices = client.post("/v1/completions", json=asked).json()["choices"]
    scores = [choice["logprobs"]["token_logprobs"][:-1] for choice in choices]
    ends = zip(scores, pairs, strict=False)
    found = [sum(row[len(before) :]) for row, (before, _) in ends]
    assert found == [score for score, _ in answers.continuations(pairs)]
    assert [sum(row[1:]) for row in scores[len(pairs) :]] == answers.whole_texts(texts)


@pytest.mark.peers
def test_local_completions_gives_the_adapters_numbers_to_the_last_digit():
    """The scores of continuations, greedy flags among them, and of whole texts."""
    api = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    lm = pellucid.load("demo", dtype="float32")
    answers = Answers(lm, batch=1)
    with served(ServedModel(lm, "demo")) as client:
        url = str(client.base_url).rstrip("/")
        model = api.LocalCompletionsAPI(
            model="demo", base_url=f"{url}/v1/completions", tokenizer_backend="remote",
            batch_size=1, max_length=lm.config.context_length,
        )  # fmt: skip
        asked = [
            instance(request_type="loglikelihood", doc={}, arguments=pair, idx=number)
            for number, pair in enumerate(CONTEXTS[:3])
        ]
        found = model.loglikelihood(asked, disable_tqdm=True)
        pairs = [model._encode_pair(*pair) for pair in CONTEXTS[:3]]
        texts = [
            instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
            for text in ("import os\nimport sys\n", "def f(x):\n    return x\n" * 4)
        ]
        rolled = model.loglikelihood_rolling(texts, disable_tqdm=True)
    assert found == answers.continuations(pairs)
    assert rolled == answers.whole_texts([text.args[0] for text in texts])
