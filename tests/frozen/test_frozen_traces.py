"""Golden traces: every named tensor of today's runs, both families, in all dialects and dtypes."""

from __future__ import annotations

from pathlib import Path

import frozen_traces
import pytest
import torch
from frozen_traces import CLOSE, DIALECTS, DTYPES, KINDS, MODELS, TRACED, TRACES, WHOLE
from safetensors.torch import load_file

import pellucid
from pellucid.cli import main


@pytest.fixture(autouse=True)
def one_thread():
    """As they were made: the number of threads decides the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def loaded(name: str | Path, dtype: str, dialect: str | None = None) -> pellucid.LanguageModel:
    return pellucid.load(MODELS / name, dtype=dtype, dialect=dialect)


def departures(lm: pellucid.LanguageModel, frozen: str, kind: str, run: str) -> list[str]:
    """Where a run of `lm` departs from the frozen one."""
    then = frozen_traces.read(TRACES / f"{frozen}.safetensors")[f"{kind}/{run}"]
    now = frozen_traces.golden(frozen_traces.observe(lm, kind))
    bits = frozen_traces.same_machine() and kind != "gradients"  # sums there may run in any order
    return frozen_traces.differences(now, then, run.split("/")[1], bits=bits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", TRACED)
def test_every_named_tensor_is_what_it_was(name, dialect, dtype):
    lm = loaded(name, dtype, dialect)
    found = {kind: departures(lm, name, kind, f"{dialect}/{dtype}") for kind in KINDS}
    assert not {kind: lines[:6] for kind, lines in found.items() if lines}


@pytest.mark.parametrize("kind", ["edited", "gradients"])
@pytest.mark.parametrize("name", TRACED)
def test_an_edit_and_the_gradients_are_what_they_were(name, kind):
    assert not departures(loaded(name, "float64"), name, kind, "hf/float64")[:6]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WHOLE)
def test_every_value_is_what_it_was(name, dtype):
    """Not the projections alone: of two models each number is kept."""
    seen = loaded(name, dtype).trace(frozen_traces.PROMPT)
    kept = load_file(TRACES / f"whole-{name}.safetensors")
    frozen = {key.split("/")[1]: x for key, x in kept.items() if key.startswith(f"{dtype}/")}
    assert frozen.keys() == set(seen)
    for key, then in frozen.items():
        now = seen[key]
        assert (now.shape, now.dtype) == (then.shape, then.dtype), key
        if frozen_traces.same_machine() or not now.dtype.is_floating_point:
            assert torch.equal(now, then), key
        scale = then.double().masked_fill(then.double().abs() > 1e30, 0.0).abs().max().item()
        close = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype] * 4 * scale}
        torch.testing.assert_close(now, then, **close, msg=lambda told, key=key: f"{key}: {told}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["llama-wide", "llama-mqa-tied"])
def test_metas_layout_computes_what_it_did(name, dtype, tmp_path, capsys):
    """The same weights as consolidated.00.pth: un-permuted at load, and in the dialect meta."""
    folder = tmp_path / "meta"
    assert main(["convert", str(MODELS / name), str(folder), "--to", "meta"]) == 0
    # Meta's layout has a tokenizer.model; what is read here are token ids
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((MODELS / name / file).read_bytes())
    lm = pellucid.load(folder, dtype=dtype)
    assert lm.model.dialect.name == "meta"
    found = {kind: departures(lm, name, kind, f"meta/{dtype}") for kind in KINDS}
    assert not {kind: lines[:6] for kind, lines in found.items() if lines}


def test_a_trace_file_is_what_it_was(tmp_path):
    """Names, order and metadata of a file, read with nothing but the safetensors library."""
    from safetensors import safe_open

    seen = loaded("gpt2", "float32").trace(frozen_traces.PROMPT)
    seen.save(tmp_path / "t.safetensors")
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        stated = file.metadata()
    assert sorted(stated) == [
        "dialect", "dims", "dtype", "family", "model", "order", "token_strings", "tokens",
        "versions",
    ]  # fmt: skip
    assert stated["tokens"] == "[3, 141, 59, 26, 5, 35, 89]"
    assert (stated["dialect"], stated["dtype"], stated["family"]) == ("hf", "float32", "gpt2")
    kept = load_file(TRACES / "whole-gpt2.safetensors")
    again = pellucid.Trace.load(tmp_path / "t.safetensors")
    assert set(again) == {key.split("/")[1] for key in kept if key.startswith("float32/")}
    assert again.dims("layers.0.attn.pattern") == ("B", "H", "T", "S")
