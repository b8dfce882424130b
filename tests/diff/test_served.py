"""A served model against the weights: our own server with one thing different, and healthy ones."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "serve"))
from serving import served

import pellucid
from pellucid.cli import main
from pellucid.diff.served.variants import _CACHES
from pellucid.generate.sample import Sampling, warp
from pellucid.language_model import LanguageModel
from pellucid.models import Layer, RopeConfig, attention, decoder, empty_model
from pellucid.models.quantised import Format, quantise
from pellucid.serve import Rules, ServedModel, writing
from pellucid.tokenizers import TemplateChat

PROMPT = (
    "def read(path):\n    for line in open(path):\n        if line.strip():\n"
    "            yield line.split()\n\nclass Reader:\n    def __init__(self, path):\n"
    "        self.path = path\n"
)
CHATS = [
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
]


def loaded(dtype: str = "float32", **changes) -> LanguageModel:
    lm = pellucid.load("stdlib", dtype=dtype)
    if changes:
        weights, config = lm.model.state_dict(), replace(lm.config, **changes)
        model = empty_model(config, lm.model.dialect.name)
        model.load_state_dict(weights, assign=True)
        lm = LanguageModel(model.eval(), lm.tokenizer, lm.checkpoint)
    lm.tokenizer.chat = TemplateChat(lm.tokenizer, CHATS[0])
    return lm


@pytest.fixture(scope="module")
def lm():
    return loaded()


@contextmanager
def url_of(lm: LanguageModel, **options):
    with served(ServedModel(lm, "stdlib", **options)) as client:
        yield str(client.base_url).rstrip("/")


def against(lm, other, prompt=PROMPT, path="", **options):
    with url_of(other) as url:
        return pellucid.diff(lm, url + path, prompt, **options)


# ── Healthy ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_healthy_server_is_within_rounding(lm, dtype):
    report = against(lm, loaded(dtype))
    assert (report.verdict, report.cause) == ("within-rounding", None), str(report)
    assert report.exit_status == 0 and not report.static
    assert report.gaps.sampled == 32 and report.gaps.tokens > 60
    assert report.gaps.rms < 1.5 * report.gaps.unit
    assert report.gaps.rms < 1e-5 or dtype != "float32"


@pytest.mark.parametrize(("dtype", "how"), [("bfloat16", "meta"), ("float32", "fast")])
def test_other_threads_dialects_and_the_fast_way_are_healthy(lm, dtype, how):
    other = pellucid.load("stdlib", dtype=dtype, dialect="meta" if how == "meta" else None)
    before = torch.get_num_threads()
    torch.set_num_threads(2 if before == 1 else 1)
    try:
        with url_of(other, fast=how == "fast" or None) as url:
            report = pellucid.diff(lm, f"{url}/v1", [0, *range(40, 90)], steps=8)
    finally:
        torch.set_num_threads(before)
    assert report.verdict == "within-rounding", str(report)
    assert report.gaps.sampled == 8


def test_a_gpt2_and_its_own_weights_as_a_chat(lm):
    gpt = pellucid.load("stdlib-gpt2", dtype="float32")
    assert against(gpt, pellucid.load("stdlib-gpt2", dtype="bfloat16")).verdict == "within-rounding"
    report = against(lm, loaded("bfloat16"), [{"role": "user", "content": PROMPT}])
    assert report.verdict == "within-rounding" and report.gaps.sampled == report.gaps.tokens == 32


# ── One thing different ──────────────────────────────────────────────────────────────────────────

MODELS = {
    "RoPE scaling added": {"rope": RopeConfig(theta=10000.0, type="linear", factor=4.0)},
    "RoPE theta": {"rope": RopeConfig(theta=500000.0)},
    "context truncated": {"window": 40, "layers": (Layer(window=True),)},
}


@pytest.mark.parametrize("cause", MODELS)
def test_another_model_is_named(lm, cause):
    report = against(lm, loaded(**MODELS[cause]))
    assert report.exit_status == 1
    assert report.cause is not None and report.cause.name == cause, str(report)
    if cause == "context truncated":
        assert "the last 40:" in report.cause.evidence
        place = int(report.first.measure.where.split()[1].rstrip(","))
        assert 40 < place < 60


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantised_weights_are_named(lm, dtype):
    other = loaded(dtype)
    quantise(other.model, Format(bits=4))
    report = against(lm, other)
    assert report.cause is not None and report.cause.name == "quantised weights", str(report)
    assert "int4" in report.cause.evidence


def test_a_quantised_cache_is_named(lm, monkeypatch):
    """The server's cache keeps 8 bits: what attention is given, not what A computes."""
    other, through = loaded(), _CACHES["float8 e5m2"]
    plain = attention.attend
    theirs = {id(block.attn) for block in other.model.layers}

    def attend(module, q, k, v, mask, how):
        k, v = (through(k), through(v)) if id(module) in theirs else (k, v)
        return plain(module, q, k, v, mask, how)

    monkeypatch.setattr(decoder, "attend", attend)
    with url_of(other, fast=False) as url:
        report = pellucid.diff(lm, url, PROMPT)
    assert report.cause is not None and report.cause.name == "quantised cache", str(report)
    assert "float8 e5m2" in report.cause.evidence


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (lambda ids: [0, *ids], "BOS doubled"),
        (lambda ids: ids[1:], "BOS missing"),
    ],
)
def test_the_begin_token_is_seen_where_the_prompt_comes_back(lm, how, cause):
    report = against(lm, Begun(how))
    assert report.exit_status == 1 and [found.cause for found in report.static] == [cause]


class Begun(LanguageModel):
    """A model whose server begins prompts in its own way."""

    def __init__(self, how) -> None:
        lm = loaded()
        super().__init__(lm.model, lm.tokenizer, lm.checkpoint)
        self.how = how

    def encode(self, prompt):
        return self.how(super().encode(prompt))


def unseen(monkeypatch):
    """The server refuses to echo, as many do: the prompt's tokens are not seen."""
    from pellucid.serve import schemas

    monkeypatch.setitem(schemas.COMPLETION, "echo", schemas.Field(schemas.only(False), False))


@pytest.mark.parametrize(
    ("how", "cause"),
    [
        (lambda ids: [0, *ids], "BOS doubled"),
        (lambda ids: ids[1:], "BOS missing"),
        (lambda ids: ids[-24:], "context truncated"),
    ],
)
def test_what_happens_to_a_prompt_is_told_from_what_is_sampled(lm, how, cause, monkeypatch):
    unseen(monkeypatch)
    report = against(lm, Begun(how))
    assert report.cause is not None and report.cause.name == cause, str(report)
    assert "does not echo" in report.note and "tokens of the prompt" in report.note


def test_another_chat_template_is_named(lm):
    other = loaded()
    other.tokenizer.chat = TemplateChat(other.tokenizer, CHATS[1])
    report = against(lm, other, "What does this do?\n" + PROMPT, "/v1/chat/completions")
    assert report.cause is not None and report.cause.name == "chat template", str(report)
    assert "ChatML" in report.cause.evidence


SETTINGS = {
    "temperature in the logprobs": ("0.7", Sampling(temperature=0.7)),
    "top-k in the logprobs": ("20", Sampling(top_k=20)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cause", SETTINGS)
def test_settings_in_the_logprobs_are_named(lm, cause, dtype, monkeypatch):
    value, how = SETTINGS[cause]
    plain = writing.score_logits
    monkeypatch.setattr(
        writing, "score_logits", lambda logits, ids, top: plain(warp(logits, how), ids, top)
    )
    report = against(lm, loaded(dtype))
    assert report.cause is not None and report.cause.name == cause, str(report)
    assert value in report.cause.evidence


# ── The command line ─────────────────────────────────────────────────────────────────────────────


def test_the_command_line_has_text_json_and_exit_codes(capsys):
    with url_of(loaded("bfloat16")) as url:
        assert main(["diff", "stdlib", url, "--steps", "8", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["verdict"] == "within-rounding" and told["first"] is None
        assert told["served"]["sampled"] == 8 and told["served"]["unit"] > 0
        assert {"logprob_a", "logprob_b"} <= set(told["served"]["rows"][0])
        assert main(["diff", "stdlib", url]) == 0
        assert "bfloat16 against float32" in capsys.readouterr().out
    with url_of(Begun(lambda ids: [0, *ids])) as url:
        assert main(["diff", "stdlib", url, "--prompt", PROMPT]) == 1
    assert "FIRST" in capsys.readouterr().out


def one_line(capsys, *words) -> str:
    assert main(["diff", *words]) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1, err
    return err


def test_trouble_is_one_line(capsys, monkeypatch, lm):
    assert "cannot be reached" in one_line(capsys, "stdlib", "http://127.0.0.1:9/v1")
    assert "expected one like" in one_line(capsys, "stdlib", "http://")
    assert "as A" in one_line(capsys, "http://127.0.0.1:9", "stdlib")
    with served(ServedModel(lm, "stdlib"), rules=Rules(key="secret")) as client:
        url = str(client.base_url)
        assert "PELLUCID_API_KEY" in one_line(capsys, "stdlib", url)
        monkeypatch.setenv("PELLUCID_API_KEY", "secret")
        assert main(["diff", "stdlib", url, "--steps", "2"]) == 0
        capsys.readouterr()
    with served(ServedModel(lm, "one"), ServedModel(loaded(), "two")) as client:
        url = str(client.base_url)
        assert "serves one, two: name one" in one_line(capsys, "stdlib", url)
        assert main(["diff", "stdlib", f"{url}#two", "--steps", "2"]) == 0
        capsys.readouterr()
        assert "status 404" in one_line(capsys, "stdlib", f"{url}#three")
    assert "only prompt, steps" in one_line(capsys, "stdlib", "http://x", "--fused")
