"""The settings of a training run: from TOML files and flags to one resolved set, and back.

    defaults  <  preset  <  config file  <  flags            the later one wins

The fields of `TrainSettings` are the only list there is. The command line makes its flags of them,
`read` checks a file against them, and `dump` gives what a run really used; `read` takes it again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pellucid.files import read_text
from pellucid.train import fields
from pellucid.train.fields import setting

CONFIG = "config.toml"  # in a run's folder
DEFAULT_STEPS = 1600
_ELSEWHERE = {  # what other trainers call it
    "learning_rate": "lr",
    "batch_size": "batch",
    "max_iters": "steps",
    "block_size": "context",
    "n_layer": "layers",
    "n_head": "heads",
    "n_embd": "width",
}
# What may be changed when a run goes on: nothing that changes its steps.
MAY_CHANGE = {"stop", "device", "save_every", "sample_every", "prompt", "tensorboard", "plot"}
MAY_CHANGE |= {"trace_every", "only", "trace_tensors"}
MAY_CHANGE |= {"parallel", "tensor", "recompute", "rank_timeout"}  # who computes what, not what
# Of a model that begins from random weights; with `init` all of it comes from that model.
FROM_INIT = ("family", "width", "layers", "heads", "kv_heads", "hidden", "context")
FROM_INIT += ("qkv_bias", "tied", "start", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Every setting of a training run; None where the value depends on others."""

    data: list[str] | None = setting(
        None, "text to train on: files, JSON lines, folders of them", "none", section="text"
    )
    stdlib: bool = setting(False, "train on the standard library of this Python, code and prose")
    world: float | None = setting(
        None,
        "share of a small English world in the text, the rest is --stdlib; 1 is the world alone",
        "none of it",
    )
    text_key: str = setting("text", "key of the text in a record of JSON lines", metavar="KEY")
    separator: str | None = setting(
        None, "text between two documents of a text file", "none: a file is one document"
    )
    tokenizer: str | None = setting(
        None,
        "folder or file of a tokenizer to use, or 'characters'",
        "a BPE is learnt from the text",
        metavar="PATH",
    )
    tokens: str | None = setting(
        None, "folder of tokenised text, which several runs may share", "RUN/tokens", metavar="DIR"
    )
    vocab: int = setting(2048, "tokens in the byte-level BPE that is learnt")
    begin: bool = setting(True, "put the tokens that begin and end a text around each document")
    hold_out: int = setting(
        40, "keep every N-th document for validation; of fewer than N, the last tenth of each"
    )
    copies: float = setting(
        0.0, "share of training rows that hold a passage twice, which forms induction heads"
    )
    order: Literal["seeded", "dataloader", "random"] = setting(
        "seeded",
        "order of the text's windows: shuffled by the seed, as PyTorch's DataLoader shuffles, or "
        "drawn at random",
    )
    documents: Literal["packed", "masked"] = setting(
        "packed", "whether tokens of a row see all documents in it (packed) or their own (masked)"
    )
    init: str | None = setting(
        None,
        "model to begin from, with its shape, weights and tokenizer",
        "random weights",
        section="model",
        metavar="MODEL",
    )
    new_vocab: bool = setting(
        False, "learn a new BPE of --vocab tokens for the model of --init, spelt with its old ones"
    )
    family: Literal["llama", "gpt2"] = setting("llama", "kind of model to build")
    width: int = setting(192, "width of the residual stream, d_model")
    layers: int = setting(4, "number of blocks")
    heads: int = setting(6, "number of attention heads, of queries")
    kv_heads: int | None = setting(
        None, "number of key/value heads, llama only", "as many as query heads"
    )
    hidden: int | None = setting(
        None,
        "hidden width of the MLP, d_ff",
        "8/3 of the width for llama, 4 times the width for gpt2",
    )
    context: int = setting(256, "tokens in a row, the most that the model sees")
    dropout: float = setting(
        0.0, "share of values that dropout sets to 0 while training, gpt2 only"
    )
    qkv_bias: bool = setting(True, "give queries, keys and values biases, gpt2 only")
    bias: bool = setting(True, "train the other biases, gpt2 only; otherwise they stay 0")
    tied: bool = setting(True, "use the embedding as the output head too")
    start: Literal["sinusoids", "gpt2", "torch"] = setting(
        "sinusoids", "how weights are initialised"
    )
    steps: int | None = setting(
        None, "number of optimiser steps", "1600, or those of --epochs", section="training"
    )
    epochs: int | None = setting(
        None, "passes over the text, in place of --steps", "as --steps says"
    )
    stop: int | None = setting(
        None,
        "step to end after; the learning rate follows the whole schedule nevertheless",
        "the last step",
    )
    batch: int = setting(16, "rows of an optimiser step, each as long as the context")
    micro_batch: int | None = setting(
        None,
        "rows in memory at a time; gradients add up to those of the batch",
        "all rows of the batch",
    )
    lr: float = setting(0.003, "highest learning rate")
    min_lr: float | None = setting(None, "learning rate at the last step", "lr / 20")
    warmup: int | None = setting(
        None,
        "steps in which the learning rate rises to its highest value",
        "80, or a quarter of fewer than 320 steps",
    )
    hold: int = setting(0, "steps at the highest learning rate before it falls")
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "shape in which the learning rate falls"
    )
    weight_decay: float = setting(
        0.1, "share of each matrix that AdamW takes off, per step and unit of learning rate"
    )
    decay_all: bool = setting(
        False, "apply weight decay to biases and norms as well as to matrices"
    )
    beta1: float = setting(0.9, "share of the old mean of gradients that AdamW keeps at each step")
    beta2: float = setting(
        0.95, "share of the old mean of squared gradients that AdamW keeps at each step"
    )
    fused: bool = setting(True, "run AdamW as one kernel")
    clip: float = setting(
        1.0,
        "largest norm of a step's gradient, larger ones are scaled down to it; 0: no clipping",
    )
    seed: int = setting(1, "seed of weights, batches, dropout and samples")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "data type of matrix products; auto is bfloat16 where the processor has it"
    )
    compile: bool = setting(False, "compile the blocks with torch.compile")
    recompute: bool = setting(
        False, "recompute activations in the backward pass: less memory, one more forward pass"
    )
    parallel: Literal["ddp", "fsdp", "tp"] = setting(
        "ddp", "how ranks started by torchrun share the work"
    )
    tensor: int = setting(1, "number of ranks that share each matrix, with --parallel fsdp")
    rank_timeout: float = setting(
        600.0, "seconds that a rank waits for another before the job ends"
    )
    loss: Literal["chunked", "plain"] = setting(
        "chunked", "compute logits in parts (chunked) or all of a batch at once (plain)"
    )
    device: str = setting("cpu", "device to compute on: cpu, cuda, cuda:1 …", metavar="DEVICE")
    eval_every: int = setting(50, "steps between two evaluations")
    eval_first: bool = setting(False, "evaluate after step 1 already")
    eval_windows: int = setting(32, "windows of validation text in an evaluation; 0 takes all")
    patience: int = setting(
        0, "evaluations without a better result before training ends early; 0 never ends early"
    )
    save_every: int = setting(
        200, "steps between two checkpoints; 0 saves at the end only", section="output"
    )
    sample_every: int = setting(200, "steps between two samples of text; 0 writes none")
    prompt: str | None = setting(
        None, "text that samples begin with", "the first words of the validation text"
    )
    dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "data type of the weights in the best model's file"
    )
    tensorboard: bool = setting(True, "write TensorBoard event files into RUN/tensorboard")
    plot: bool = setting(True, "draw the losses into RUN/loss.png")
    trace_every: int = setting(
        0,
        "record statistics of tensors at step 1 and every N-th into RUN/trace.csv; 0 records none",
    )
    only: list[str] | None = setting(
        None,
        "glob patterns of the tensor names to record, such as 'layers.*.resid_post'",
        "all tensors",
        metavar="GLOB",
    )
    trace_tensors: bool = setting(False, "write the recorded tensors whole into RUN/traces")


NEEDS_TOKENIZER = {"book-gpt2": "GPT-2's tokenizer of 50,257 tokens"}  # presets that do


def presets() -> list[str]:
    """Names of the recipes that ship with the package."""
    files = resources.files("pellucid.train").joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def preset(name: str) -> dict[str, Any]:
    """The settings of a shipped recipe; ValueError that lists them for a name that is none."""
    if name not in presets():
        raise ValueError(f"no preset is called {name!r}: expected one of {', '.join(presets())}")
    file = resources.files("pellucid.train").joinpath("presets", f"{name}.toml")
    return parse(file.read_text(encoding="utf-8"), f"preset {name}")


def read(path: str | Path) -> dict[str, Any]:
    """The settings in a TOML file, checked; those it does not name are not in the result.

    Raises OSError where there is no file, ValueError for one that is no TOML, a key that is no
    setting (with the nearest that is one) and a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config file")
    return parse(read_text(path), str(path))


def parse(text: str, where: str) -> dict[str, Any]:
    """As `read`, from text that an error calls `where`."""
    return fields.parse(text, where, TrainSettings, _ELSEWHERE)


def dump(settings: TrainSettings, title: str = "") -> str:
    """The settings as TOML, in their order, without what is None or comes from `init`."""
    return fields.dump(settings, title, FROM_INIT if settings.init is not None else ())


def resolve(
    given: Mapping[str, Any], *, recipe: str | None = None, config: str | Path | None = None
) -> TrainSettings:
    """The defaults, over them a `recipe` (a preset), a `config` file, and what is `given`.

    Raises ValueError for a value of the wrong kind, and where two exclude each other.
    """
    found = preset(recipe) if recipe else {}
    found |= read(config) if config else {}
    found |= fields.checked(given, TrainSettings, _ELSEWHERE)
    _check_exclusive(found)
    if recipe in NEEDS_TOKENIZER and not (found.get("tokenizer") or found.get("tokens")):
        raise ValueError(
            f"preset {recipe} has {NEEDS_TOKENIZER[recipe]}, and would be another model with a "
            "tokenizer learnt from your text: give --tokenizer FOLDER"
        )
    if found.get("steps") is None and found.get("epochs") is None:
        found["steps"] = DEFAULT_STEPS
    return _absolute(TrainSettings(**found))


def _check_exclusive(found: Mapping[str, Any]) -> None:
    shipped = bool(found.get("stdlib") or found.get("world"))
    if bool(found.get("data")) == shipped:
        raise ValueError(
            "what to train on: give either data, files and folders of text, or stdlib, or world"
        )
    _check_world(found.get("world") or 0.0, bool(found.get("stdlib")))
    steps, epochs = found.get("steps"), found.get("epochs")
    if steps is not None and epochs is not None:
        raise ValueError(f"{steps} steps and {epochs} epochs: give one of them")
    if found.get("new_vocab") and found.get("init") is None:
        raise ValueError("--new-vocab is for the model of --init: any other learns one anyway")
    if found.get("init") is not None:
        for name in FROM_INIT:
            if found.get(name) is not None:
                flag = fields.flag_of(name)
                raise ValueError(f"init brings its own shape and tokenizer: leave out {flag}")


def _check_world(world: float, stdlib: bool) -> None:
    if not 0 <= world <= 1:
        raise ValueError(f"--world {world:g}: expected a share, 0 to 1")
    if stdlib and world == 1:
        raise ValueError("--world 1 leaves no room for --stdlib: give a smaller share, or it alone")
    if 0 < world < 1 and not stdlib:
        raise ValueError(f"--world {world:g}: give --stdlib for the rest of the text, or --world 1")


def _absolute(settings: TrainSettings) -> TrainSettings:
    """Paths that lead to the same place wherever the run is resumed."""
    paths: dict[str, Any] = {}
    if settings.data is not None:
        paths["data"] = [os.path.abspath(path) for path in settings.data]
    for name in ("tokenizer", "tokens", "init"):
        path = getattr(settings, name)
        if path is not None and (name == "tokens" or Path(path).exists()):
            paths[name] = os.path.abspath(path)
    return replace(settings, **paths)


def resumed(out: Path, given: Mapping[str, Any]) -> TrainSettings:
    """The settings of the run in `out`; what is `given` may change only what changes no step.

    Raises FileNotFoundError where there is no run, ValueError for what may not change.
    """
    path = out / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {out} holds no run (no {CONFIG} in it)")
    changes = fields.checked(given, TrainSettings, _ELSEWHERE)
    written = TrainSettings(**read(path))
    steps, wanted = written.steps, changes.get("steps") or changes.get("stop") or 0
    if steps is not None and wanted > steps:
        raise ValueError(
            f"--resume ends at step {steps} of {path}, to which the learning rate has fallen, not "
            f"at {wanted}: to train longer begin a new run with this one's model, pellucid train "
            f"--init {out}/last --out NEW --steps {wanted - steps}, and the same text"
        )
    return fields.changed(written, changes, MAY_CHANGE, path)
