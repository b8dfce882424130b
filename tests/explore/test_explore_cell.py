"""The arithmetic of a number, for every named tensor of every family, against whole operations."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from exploring import elements, language_model, repeated, tiny_run
from family_samples import SAMPLES
from tiny import CONFIGS, FEATURES, GPT, LLAMA

from pellucid.diff.replay.operations import SOURCES
from pellucid.diff.replay.replay import Replay
from pellucid.explore import Runs, cell
from pellucid.explore.cell import shortest, ulps
from pellucid.families.config import read_config
from pellucid.numerics import Dialect

ALL = {**CONFIGS, **FEATURES}
FAMILIES = {name: read_config(sample, name) for name, sample in SAMPLES.items()}


def check_cells(run, count: int, loose: float = 1.0) -> None:
    """Cells of each tensor: the value the run has, explained by its terms and by float64."""
    plain = Dialect(name="reference", scale=run.loaded.model.dialect.scale)
    setting = replace(run.loaded.setting(), dtype=torch.float64, dialect=plain)
    exact = Replay(run, setting)
    eps = torch.finfo(run.loaded.lm.dtype).eps
    for name in run:
        whole = run[name].double() if name in SOURCES else exact.compute(name).double()
        whole = whole[0] if whole.ndim > len(run.shape(name)) else whole
        for address in elements(run, name, count):
            found = cell(run, address)
            told = found.to_json()
            index = tuple(map(int, address.partition("[")[2][:-1].split(",")))
            assert found.value == float(run[address]), address
            expected = float(whole[index])
            expected = found.value if expected == -math.inf else expected  # masked, by its number
            rel = eps if name == "embed_scaled" else 1e-9  # by a constant that the model rounds
            assert found.exact == pytest.approx(expected, rel=rel, abs=1e-12), (address, told)
            unlike = "norm" in name or told["how"] == "e^(a − b)"  # terms of another size
            size = float("norm" in name) if unlike else float(abs(found.sum.terms).sum())
            size = max(size, abs(found.exact), 1e-6)
            assert abs(found.value - found.exact) <= 8 * loose * eps * size or math.isinf(
                found.value
            ), (address, told)
            terms = [term["product"] for term in told["terms"]]
            assert len(terms) + told["rest"]["count"] == len(found.sum.terms)
            assert math.fsum(terms) + told["rest"]["sum"] == pytest.approx(told["sum"])
            assert sorted(map(abs, terms), reverse=True) == list(map(abs, terms))
            if run[name].is_floating_point():
                again = torch.tensor(float(told["shortest"]), dtype=torch.float64)
                assert float(again.to(run[name].dtype)) == found.value


@pytest.mark.parametrize("key", ALL)
def test_cells_of_every_feature(key):
    check_cells(tiny_run(ALL[key]), 2)


@pytest.mark.parametrize("key", FAMILIES)
def test_cells_of_every_family_in_bfloat16(key):
    check_cells(tiny_run(FAMILIES[key], torch.bfloat16, tokens=11), 1, loose=4.0)


@pytest.mark.parametrize("dialect", ["hf", "meta", "notebook"])
@pytest.mark.parametrize("key", ["gpt2", "llama-gqa", "score cap", "like gemma3", "sinks"])
def test_cells_in_each_dialect(key, dialect):
    check_cells(tiny_run(ALL[key], torch.bfloat16, dialect), 1, loose=4.0)


@pytest.mark.parametrize("key", ["gpt2", "llama-gqa", "like gemma2", "like phi", "sinks"])
def test_python_of_a_cell_gives_its_numbers(key):
    run = tiny_run(ALL[key])
    for name in (name for name in run if not name.startswith(("layers.0", "layers.2"))):
        (address,) = elements(run, name, 1)
        found = cell(run, address)
        scope = repeated(found.python, run.loaded.lm)
        assert float(scope["value"]) == found.value, address
        assert float(scope["exact"]) == pytest.approx(found.exact, rel=1e-12, abs=1e-14), address


def test_a_score_by_hand():
    run = tiny_run(LLAMA)
    seen = run.loaded.lm.trace(run.ids)
    told = cell(run, "layers.1.attn.scores[3,7,-2]").to_json()
    q = seen["layers.1.attn.q_rotated"][0, 3, 7].tolist()
    k = seen["layers.1.attn.k_rotated"][0, 1, 7].tolist()
    products = [a * b for a, b in zip(q, k, strict=True)]
    assert told["address"] == "layers.1.attn.scores[3,7,7]"
    assert told["float64"] == pytest.approx(sum(products) / math.sqrt(10), rel=1e-12)
    largest = max(range(10), key=lambda i: abs(products[i]))
    assert told["terms"][0] == {
        "what": f"q_rotated[3,7,{largest}] · k_rotated[1,7,{largest}]",
        "factors": [q[largest], k[largest]],
        "product": products[largest],
    }
    assert (len(told["terms"]), told["rest"]["count"]) == (8, 2)
    bits = int(told["bits"], 16)
    assert (
        torch.tensor(bits - (bits >> 31 << 32), dtype=torch.int32).view(torch.float32)
        == (seen["layers.1.attn.scores"][0, 3, 7, 7])
    )
    assert told["inputs"] == ["layers.1.attn.q_rotated[3,7]", "layers.1.attn.k_rotated[1,7]"]


def test_units_in_the_last_place():
    one = torch.tensor(1.0)
    above = float(torch.nextafter(one, torch.tensor(2.0)))
    assert ulps(above, 1.0, torch.float32) == 1.0
    assert ulps(1.0, 1.0 + 2**-9, torch.bfloat16) == -0.25
    assert ulps(float("-inf"), float("-inf"), torch.float32) == 0.0
    assert ulps(float("nan"), 1.0, torch.float32) is None
    assert shortest(torch.tensor(0.1)) == "0.1"
    assert shortest(torch.tensor(0.1).bfloat16()) == "0.1"
    assert shortest(torch.tensor(1 / 3).half()) == "0.3333"


def test_cells_that_are_none():
    run = Runs({"tiny": language_model(GPT)}).run("tiny", [1, 2])
    with pytest.raises(ValueError, match="so give 3 whole numbers"):
        cell(run, "layers.0.attn.scores[1,0]")
    with pytest.raises(IndexError, match="no such part"):
        cell(run, "layers.0.attn.scores[1,0,5]")
    with pytest.raises(KeyError, match="did you mean"):
        cell(run, "layers.0.attn.score[1,0,0]")
