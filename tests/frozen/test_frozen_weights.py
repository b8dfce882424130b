"""Adapters and quantised folders that an earlier version wrote, and what they compute."""

from __future__ import annotations

import json
import shutil

import frozen_traces
import pytest
import torch
from frozen_models import MODELS
from frozen_traces import PROMPT
from frozen_training import HERE
from safetensors.torch import load_file

import pellucid
from pellucid.cli import main

WEIGHTS = HERE / "weights"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_frozen(logits: torch.Tensor, name: str) -> None:
    """The logits of `name` as they were."""
    frozen = load_file(WEIGHTS / "logits.safetensors")[name]
    assert (logits.shape, logits.dtype) == (frozen.shape, frozen.dtype)
    if frozen_traces.same_machine():
        assert torch.equal(logits, frozen)
    torch.testing.assert_close(logits, frozen, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", ["int8", "int6", "int4"])
def test_a_quantised_folder_of_an_earlier_version_computes_what_it_did(bits):
    lm = pellucid.load(WEIGHTS / bits, dtype="float32")
    assert_frozen(lm.trace(PROMPT)["logits"], bits)


@pytest.mark.parametrize("bits", ["int8", "int6", "int4"])
def test_quantising_writes_the_same_bits(bits, tmp_path, capsys):
    source, made = str(MODELS / "llama-wide"), tmp_path / bits
    assert main(["convert", source, str(made), "--to", bits, "--group", "32", "--json"]) == 0
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (made / name).read_bytes() == (WEIGHTS / bits / name).read_bytes()
    now, then = (load_file(at / "model.safetensors") for at in (made, WEIGHTS / bits))
    assert now.keys() == then.keys()
    for key, tensor in then.items():
        assert now[key].dtype == tensor.dtype
        assert torch.equal(now[key], tensor), key


def test_an_adapter_of_an_earlier_version_computes_what_it_did():
    lm = pellucid.load(MODELS / "llama-wide", dtype="float32", adapter=WEIGHTS / "adapter")
    assert_frozen(lm.trace(PROMPT)["logits"], "adapter")
    plain = pellucid.load(MODELS / "llama-wide", dtype="float32").trace(PROMPT)["logits"]
    assert (plain - lm.trace(PROMPT)["logits"]).abs().max() > 0.1


def test_an_adapter_of_an_earlier_version_is_learnt_on_with(tmp_path, capsys):
    shutil.copytree(WEIGHTS / "adapter", tmp_path / "adapter")
    argv = ["finetune", str(MODELS / "llama-wide"), "--data", str(HERE / "answers.jsonl")]
    argv += ["--adapter", str(tmp_path / "adapter"), "--steps=2", "--batch=4", "--warmup=0"]
    argv += ["--dtype=float32"]
    argv += ["--precision=float32", "--context=48", "--out", str(tmp_path / "out"), "--json"]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    ended = json.loads((HERE / "runs" / "ends" / "lora.json").read_text())[-1][-1]
    assert said["held_out_loss_before"] == pytest.approx(float(ended), rel=1e-4)
