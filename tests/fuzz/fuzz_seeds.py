"""Whole files of every kind that is read, small, made by the package; the fuzzer damages them."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from pellucid.cli import main

_SHAPE = ["--family=llama", "--vocab=300", "--width=16", "--layers=1", "--heads=2", "--context=32"]
_STEPS = ["--steps=4", "--batch=2", "--warmup=1", "--precision=float32", "--stop=2"]
_QUIET = ["--eval-every=9", "--sample-every=0", "--no-tensorboard", "--no-plot", "--json"]
PROMPT = "def one(x):\n    return x"
MAP = """about: {engine: mine}
sizes: {H: 2}
model.layers.{N}.self_attn.q_proj: "layers.{N}.attn.q | layers.{N}.attn.k"
model.layers.{N}.mlp: layers.{N}.mlp.out
tensors:
  lm_head: logits
"""
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] | trim }}"
    "{% if not loop.last %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_seeds(folder: Path) -> None:
    """Everything that the targets read, in folders of their own below `folder`."""
    text = folder / "text.py"
    text.write_text("\n".join(f"def one_{n}(x):\n    return x + {n}\n" for n in range(40)))
    run = folder / "run"
    call("train", "--data", text, "--out", run, *_SHAPE, *_STEPS, *_QUIET)
    hf = Path(shutil.copytree((run / "last").resolve(), folder / "hf"))
    shutil.rmtree(hf / "training", ignore_errors=True)
    chat(hf)
    for kind in ("meta", "int4", "gguf"):
        target = folder / (f"{kind}.gguf" if kind == "gguf" else kind)
        call("convert", hf, target, "--to", kind, "--json")
    call("convert", hf, folder / "sharded", "--to", "hf", "--max-shard-size", "10K", "--json")
    talk = [{"role": "user", "content": "0"}, {"role": "assistant", "content": "1"}]
    records = [{"messages": talk}, {"messages": talk * 2}, {"messages": talk}]
    (folder / "talks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "lines.jsonl").write_text('{"text": "import os"}\n{"text": "a", "more": [1]}\n')
    (folder / "labels.csv").write_text('text,label\nimport os,code\n"a, b",text\nc,text\n')
    (folder / "pairs.json").write_text(
        json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}, {"text": "d"}])
    )
    call(
        "finetune", hf, "--data", text, "--out", folder / "tuned", "--lora", "2", "--steps", "1",
        "--batch", "1", "--context", "16", "--as", "text", "--json",
    )  # fmt: skip
    call("trace", PROMPT, "-m", hf, "-o", folder / "trace.safetensors")
    (folder / "map.yaml").write_text(MAP)
    recording(folder)


def chat(hf: Path) -> None:
    """A chat template, and what lies beside a tokenizer in published models."""
    stated = json.loads((hf / "tokenizer_config.json").read_text())
    end = json.loads((hf / "tokenizer.json").read_text())["added_tokens"][0]["content"]
    stated |= {"chat_template": TEMPLATE, "eos_token": end, "add_bos_token": False}
    (hf / "tokenizer_config.json").write_text(json.dumps(stated))
    (hf / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": end}}))


def recording(folder: Path) -> None:
    """The trace as numpy writes arrays."""
    import numpy as np

    from pellucid.trace import Trace

    seen = Trace.load(folder / "trace.safetensors")
    np.savez(
        folder / "recording.npz", **{name: value.float().numpy() for name, value in seen.items()}
    )


def call(*words: object) -> None:
    """One verb, quietly; it must succeed."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        status = main([str(word) for word in words])
    assert status == 0, said.getvalue()


def words_of(line: Sequence[object]) -> list[str]:
    """Words of a command line as text."""
    return [str(word) for word in line]
