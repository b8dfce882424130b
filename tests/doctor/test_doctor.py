"""`pellucid doctor`: right on this machine, and every kind of wrong seeded and found."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import pellucid
from pellucid.cli import main
from pellucid.doctor import arithmetic, check, machine, report
from pellucid.generate.native import build

NATIVE = Path(pellucid.__file__).parent / "generate" / "native"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(machine, "_WRITTEN", 1 << 20)
    rates = {"float32_flops": 1e11, "bfloat16_flops": 3e11, "read_bytes": 2e10}
    monkeypatch.setattr("pellucid.doctor.advice.measure", lambda: rates)


def test_this_machine_is_right(capsys):
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["right"] is True
    states = {each["name"]: each["state"] for each in told["checks"]}
    assert "wrong" not in states.values()
    assert {"products, float64", "attention, bfloat16", "bfloat16, every value"} <= set(states)
    assert told["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert any("train --precision bfloat16" in line for line in told["advice"])
    assert main(["doctor"]) == 0
    assert "computes correctly, as far as was examined" in capsys.readouterr().out


@pytest.fixture
def broken_kernels(tmp_path, monkeypatch):
    """A function that compiles the C decoder with a change of its source."""
    if not build._recipe(build.instruction_sets()[0]).compiler:
        pytest.skip("no C compiler")
    folder = tmp_path / "native"
    shutil.copytree(NATIVE, folder)

    def broken(file: str, old: str, new: str) -> None:
        text = (folder / file).read_text()
        assert old in text, f"{file} has changed: seed another mistake"
        (folder / file).write_text(text.replace(old, new))
        monkeypatch.setattr(build, "__file__", str(folder / "build.py"))
        monkeypatch.setattr(build, "_OPTIMISE", ("-O1", "-std=gnu11", "-fopenmp-simd"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        build.library.cache_clear()

    yield broken
    build.library.cache_clear()


def test_a_broken_kernel_is_found(broken_kernels, capsys):
    """A row of one vector reads the same eight numbers again and again."""
    broken_kernels(
        "kernels.h", "load_float32(x[first + b] + i + p * LANES)", "load_float32(x[first + b] + i)"
    )
    assert main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    wrong = [each["name"] for each in told["checks"] if each["state"] == "wrong"]
    assert f"C kernels, {build.instruction_sets()[0]}: products" in wrong
    assert all(name.startswith("C kernels") for name in wrong)


def test_broken_attention_in_c_is_found(broken_kernels):
    """The shares of a row add up to 0.999."""
    broken_kernels("decode.c", "(float)(scores[i] / total)", "(float)(scores[i] / total * 0.999)")
    states = {each.name.partition(": ")[2]: each.state for each in arithmetic.kernels()}
    assert states == {"products": "right", "a decoding step": "wrong"}


@pytest.mark.parametrize(
    ("patched", "name"),
    [
        ("torch.Tensor.__matmul__", "products"),
        ("torch.nn.functional.scaled_dot_product_attention", "attention"),
        ("torch.Tensor.bfloat16", "bfloat16, every value"),
    ],
)
def test_a_product_that_loses_a_bit_is_found(patched, name, monkeypatch):
    owner, _, attribute = patched.rpartition(".")
    holder = torch.Tensor if owner == "torch.Tensor" else torch.nn.functional
    right = getattr(holder, attribute)

    def wrong(*given, **named):
        made = right(*given, **named)
        if made.dtype == torch.float64:
            return made  # what the others are held against
        made = made.clone()
        made.view(-1)[0] += made.abs().max() * 2**-4
        return made

    looks = {
        "products": lambda: arithmetic.products(torch.float32, "cpu"),
        "attention": lambda: arithmetic.attention(torch.float32, "cpu"),
        "bfloat16, every value": lambda: arithmetic.bfloat16_bits("cpu"),
    }
    assert looks[name]().state == "right"
    monkeypatch.setattr(holder, attribute, wrong)
    found = looks[name]()
    assert (found.name.startswith(name), found.state) == (True, "wrong")


def test_what_is_not_a_number_is_wrong():
    one = torch.ones(2, dtype=torch.float64)
    for bad in (torch.nan, torch.inf):
        found = check.compared("x", [(torch.tensor([1.0, bad]), one, one)])
        assert found.state == "wrong"
    assert check.compared("x", [(torch.ones(2), one, one * 0)]).state == "right"


def test_the_rounding_allowed_is_that_of_the_type():
    a, b = torch.ones(1, 4), torch.ones(4, 1)
    exact = a.double() @ b.double()
    wide, narrow = (
        float(arithmetic.rounding(a, b, exact, dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide == 4 * 2 * 2**-24 * 4
    assert narrow == wide + 2 * 2**-8 * 4


def test_a_check_that_raises_is_wrong_and_the_others_go_on(monkeypatch):
    def ill():
        raise RuntimeError("CUDA error:\n an illegal instruction")

    monkeypatch.setattr(arithmetic, "whole_numbers", ill)
    found = report.examine_machine()
    assert not found.right
    assert found.checks[0].found == "RuntimeError: CUDA error: an illegal instruction"
    assert len(found.checks) > 10


def test_a_disk_that_forgets_and_one_that_is_full(monkeypatch, tmp_path):
    assert machine.disk().state in ("right", "note")
    monkeypatch.setattr(machine.hashlib, "file_digest", lambda file, name: machine.hashlib.sha256())
    assert machine.disk().state == "wrong"

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.os, "fsync", full)
    assert "No space left" in machine.disk().found


def test_packages_out_of_bounds(monkeypatch):
    needed = ["a>=1.10,<3", "b>=2", 'c; extra == "x"']
    monkeypatch.setattr(machine.metadata, "requires", lambda name: needed)
    installed = {"a": "1.9.1+cpu", "b": "2.0"}
    monkeypatch.setattr(machine.metadata, "version", installed.__getitem__)
    found, versions = machine.packages()
    assert found.state == "wrong" and "a>=1.10,<3, found 1.9.1+cpu" in found.found
    assert "b>=2" not in found.found and versions == installed
    installed["a"] = "2.11.0"
    assert machine.packages()[0].state == "right"


def test_no_compiler_is_a_note_with_advice(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", str(tmp_path / "none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.library.cache_clear()
    try:
        found = report.examine_machine()
    finally:
        build.library.cache_clear()
    states = {each.name: each.state for each in found.checks}
    assert states["C kernels"] == "note" and found.right
    assert any("install a C compiler" in line for line in found.advice)
