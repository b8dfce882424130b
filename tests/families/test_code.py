"""One file per model: it computes what the decoder computes, with nothing left to choose."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from family_samples import SAMPLES
from tiny import random_model, random_tokens

import pellucid
from pellucid import checkpoints, trace
from pellucid.families import read_config
from pellucid.models import Cache, Config, Model
from pellucid.source import file_text


def config_of(sample: str) -> Config:
    return read_config(SAMPLES[sample], "sample")


def executed(text: str) -> ModuleType:
    module = ModuleType("model")
    exec(compile(text, "model.py", "exec"), vars(module))
    return module


def unused_imports(text: str) -> set[str]:
    """Names that a file imports and never uses."""
    tree = ast.parse(text)
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return imported - used - {"annotations"}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {sample: file_text(config_of(sample), "hf") for sample in SAMPLES}


def named_logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder's logits by the named steps of attention."""
    with trace.trace(model, only="logits") as seen:
        model(tokens)
    return seen["logits"]


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_file_computes_the_decoders_logits(sample, texts, tmp_path):
    """To the bit: in float32 and bfloat16, through the files, with and without the cache."""
    config = config_of(sample)
    module = executed(texts[sample])
    tokens = random_tokens(config, 2, 21)  # longer than the window, and than yarn's context
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model(config, dtype)
        folder = tmp_path / str(dtype)
        checkpoints.save(folder, config, model.state_dict(), max_shard_bytes=30_000)
        loaded = module.load(folder)
        assert loaded.state_dict().keys() == model.state_dict().keys()
        with torch.no_grad():
            logits = loaded(tokens)
        model = checkpoints.load_model(checkpoints.open_checkpoint(folder))
        assert torch.equal(logits, named_logits(model, tokens))
    cache, ours = module.Cache(), Cache(config.n_layers)
    model = checkpoints.load_model(checkpoints.open_checkpoint(tmp_path / "torch.float32"))
    loaded = module.load(tmp_path / "torch.float32")
    for piece in tokens.split((13, 1, 7), dim=1):
        with torch.no_grad(), trace.trace(model, only="logits") as seen:
            model(piece, cache=ours)
            torch.testing.assert_close(loaded(piece, cache), seen["logits"], rtol=1e-5, atol=1e-4)


def test_nothing_is_left_to_choose(texts):
    for sample, text in texts.items():
        assert not re.search(r"\b(dialect|family|config)\b(?!\.json)\W*[.=(\[]", text), sample
        assert not unused_imports(text), sample
        assert not re.search(r"^\s*(\w+) = \1$", text, re.MULTILINE), sample


def test_a_llama_fits_in_250_lines(texts):
    assert max(len(texts[sample].splitlines()) for sample in ("llama", "llama llama3")) <= 250


def test_the_files_are_formatted(texts, tmp_path):
    """As `ruff format` would have them, and without a finding of its rules."""
    for number, text in enumerate(texts.values()):
        (tmp_path / f"model{number}.py").write_text(text)
    for arguments in (
        ["format", "--check", "--line-length", "100"],
        ["check", "--line-length", "100", "--select", "F,W,I,B,UP,PIE"],
    ):
        command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--no-cache", "."]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("demo", ["demo", "demo-gpt2"])
def test_a_file_that_is_run_writes_what_the_model_writes(demo, tmp_path):
    opened = checkpoints.open_checkpoint(demo)  # in float32, where no tie is broken by rounding
    folder = tmp_path / "model"
    checkpoints.save(folder, opened.config, opened.weights, opened.folder, torch.float32)
    lm, prompt = pellucid.load(folder), "def main("
    (tmp_path / "model.py").write_text(pellucid.code(folder))
    command = [sys.executable, "model.py", str(folder), prompt]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = lm.generate(prompt, max_new_tokens=64, temperature=0.0)
    assert done.stdout == f"{prompt}{expected}\n"


def test_a_gguf_models_file_reads_the_folder_that_is_made_of_it(tmp_path):
    checkpoints.convert("demo", tmp_path / "in" / "model.gguf", "gguf")
    checkpoints.convert(tmp_path / "in", tmp_path / "out", "hf")
    without_name = [pellucid.code(tmp_path / name).splitlines()[1:] for name in ("in", "out")]
    assert without_name[0] == without_name[1]
