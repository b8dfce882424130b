"""``pellucid train``: a small model from raw text, saved where every other verb can read it."""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pellucid.cli.common import print_json

if TYPE_CHECKING:
    import torch

    from pellucid.cli.training_run import Run
    from pellucid.models import Config, Model
    from pellucid.tokenizers import Tokenizer
    from pellucid.train import Document, TrainConfig

# Of a model that begins from random weights. With --init all of it comes from that model.
SHAPE = {"family": "llama", "vocab": 2048, "width": 192, "layers": 4, "heads": 6, "context": 256}
FROM_INIT = (*SHAPE, "kv_heads", "hidden", "tokenizer")


def train_arguments(parser: argparse.ArgumentParser) -> None:
    """What to read, what to build, how to train it and where to put it."""
    _data_arguments(parser)
    _model_arguments(parser)
    _training_arguments(parser)
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, metavar="DIR", required=True, help="the model's folder")
    group.add_argument("--overwrite", action="store_true", help="replace a model that is there")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="of the saved weights"
    )
    group.add_argument("--log", type=Path, metavar="FILE", help="CSV of every step (DIR.csv)")
    group.add_argument("--json", action="store_true", help="a summary as JSON instead of progress")


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", nargs="+", metavar="PATH", help="text files, folders of them")
    source.add_argument(
        "--stdlib", action="store_true", help="the standard library of this Python: code and prose"
    )
    group.add_argument("--tokenizer", type=Path, metavar="PATH", help="one to use as it is")
    _whole(group, "--vocab", "tokens of the byte-level BPE that is learnt otherwise")
    _number(group, "--hold-out", 40, "hold out each N-th file for evaluation")
    _number(group, "--copies", 0.0, "share of rows with a passage copied, to form induction heads")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--family", choices=("llama", "gpt2"), help="which of the two (llama)")
    _whole(group, "--width", "of the residual stream")
    _whole(group, "--layers", "blocks")
    _whole(group, "--heads", "query heads")
    _whole(group, "--kv-heads", "key/value heads, llama only", "as many")
    _whole(group, "--hidden", "of the MLP", "8/3 of the width, gpt2: 4 times")
    _whole(group, "--context", "tokens in view")
    group.add_argument("--init", metavar="MODEL", help="begin from this one, its shape and weights")


def _training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    _number(group, "--steps", 1600, "optimiser steps")
    _whole(group, "--stop", "end after this one; the rate goes by --steps all the same", "the last")
    _number(group, "--batch", 16, "rows of a step, each as long as the context")
    _whole(group, "--micro-batch", "rows in memory at a time", "all")
    _number(group, "--lr", 3e-3, "highest learning rate")
    _number(group, "--warmup", 80, "steps up to it")
    _number(group, "--hold", 0, "steps at it, before the cosine comes down")
    group.add_argument("--min-lr", type=float, metavar="N", help="at the end (lr / 20)")
    _number(group, "--weight-decay", 0.1, "of matrices")
    _number(group, "--clip", 1.0, "longest gradient; 0: any")
    _number(group, "--seed", 1, "of weights, batches and samples")
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of matrix products; auto: bfloat16 where the processor has it",
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (cpu)")
    _number(group, "--eval-every", 50, "steps between evaluations on held-out text")
    _number(group, "--sample-every", 200, "steps between samples; 0: none")
    _number(group, "--save-every", 200, "steps between checkpoints; 0: at the end only")
    group.add_argument("--prompt", default="def", help="where samples begin (def)")


def _number(group: argparse._ArgumentGroup, flag: str, default: float, what: str) -> None:
    kind, shown = type(default), f"{what} ({default:g})"
    group.add_argument(flag, type=kind, default=default, metavar="N", help=shown)


def _whole(group: argparse._ArgumentGroup, flag: str, what: str, otherwise: str = "") -> None:
    """A whole number that is None where it is not given."""
    shown = otherwise or SHAPE[flag[2:]]
    group.add_argument(flag, type=int, metavar="N", help=f"{what} ({shown})")


def train(arguments: argparse.Namespace) -> int:
    """Train and save; 130 when interrupted, with what there is saved."""
    from pellucid.cli.training_run import stopping

    _check_out(arguments.out, arguments.overwrite)
    with TemporaryDirectory() as folder:
        run = _prepare(arguments, Path(folder))
        run.save()  # a folder that cannot be written shows now, not after an hour
        with stopping() as stop:
            run.fit(stop)
    summary = run.summary()
    if arguments.json:
        print_json(summary)
    else:
        run.display.closing(summary)
    return 130 if summary["interrupted"] else 0


def _check_out(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file: expected a folder")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise FileExistsError(f"--out {out} is not empty: give a new folder, or --overwrite")


def _prepare(arguments: argparse.Namespace, folder: Path) -> Run:
    """Read the text, learn or load the tokenizer, build the model; files go to `folder`."""
    import torch

    from pellucid.cli.training_run import Run
    from pellucid.train import Batches, hold_out, token_stream

    config = _train_config(arguments)  # first what is quick to complain about
    torch.manual_seed(arguments.seed)  # for dropout
    training, held_out = hold_out(_documents(arguments), arguments.hold_out)
    start = _trained_model if arguments.init else _new_model
    model, tokenizer, tokenizer_folder = start(arguments, training, folder)
    end = text_begin(tokenizer)
    return Run(
        arguments=arguments,
        model=model.to(arguments.device),
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        begin=end,
        batches=Batches(
            token_stream(training, tokenizer.encode, end),
            context=model.config.context_length,
            batch=arguments.batch,
            seed=arguments.seed,
            copies=arguments.copies,
        ),
        held_out=token_stream(held_out, tokenizer.encode, end),
        held_out_bytes=sum(len(document.text.encode()) for document in held_out),
        config=config,
    )


def _new_model(
    arguments: argparse.Namespace, training: list[Document], folder: Path
) -> tuple[Model, Tokenizer, Path]:
    """Random weights, and a tokenizer that is given or learnt from the training text."""
    from pellucid.models import build
    from pellucid.train import begin

    for name, default in SHAPE.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    tokenizer, tokenizer_folder = _tokenizer(arguments, training, folder)
    model = build(_model_config(arguments, tokenizer.vocab_size), "meta")
    begin(model, arguments.seed)
    return model, tokenizer, tokenizer_folder


def _trained_model(
    arguments: argparse.Namespace, training: list[Document], folder: Path
) -> tuple[Model, Tokenizer, Path]:
    """Shape, weights and tokenizer of ``--init``; weights in float32 and apart from its file."""
    from pellucid import checkpoints, tokenizers
    from pellucid.models import build

    given = [name for name in FROM_INIT if getattr(arguments, name) is not None]
    if given:
        flag = "--" + given[0].replace("_", "-")
        raise ValueError(f"--init brings its own shape and tokenizer: leave out {flag}")
    checkpoint = checkpoints.open_checkpoint(arguments.init)
    model = build(checkpoint.config, "meta")
    model.load_state_dict(dict(checkpoint.weights))
    return model, tokenizers.load(checkpoint.folder), checkpoint.folder


def _documents(arguments: argparse.Namespace) -> list[Document]:
    from pellucid.train import read_documents, stdlib_documents

    documents = stdlib_documents() if arguments.stdlib else read_documents(arguments.data)
    if not documents:
        given = " ".join(arguments.data or ["the standard library"])
        raise ValueError(f"no text to train on in {given}: expected files with text in them")
    return documents


def _tokenizer(
    arguments: argparse.Namespace, training: list[Document], folder: Path
) -> tuple[Tokenizer, Path]:
    """The tokenizer and the folder its files are in: the one given, or one learnt into `folder`."""
    from pellucid import tokenizers

    given: Path | None = arguments.tokenizer
    if given is not None:
        return tokenizers.load(given), given if given.is_dir() else given.parent
    texts = (document.text for document in training)
    return tokenizers.train_bpe(texts, arguments.vocab, folder), folder


def text_begin(tokenizer: Tokenizer) -> int:
    """The token that stands before each document: end of text, or beginning, where there is one."""
    for token in (tokenizer.eos_id, tokenizer.bos_id):
        if token is not None:
            return token
    raise ValueError("this tokenizer has no token that begins or ends a text: give another one")


def _model_config(arguments: argparse.Namespace, vocab_size: int) -> Config:
    from pellucid.models import GPTConfig, LlamaConfig, RopeConfig

    width, heads = arguments.width, arguments.heads
    if arguments.family == "gpt2":
        if arguments.kv_heads not in (None, heads):
            raise ValueError("--kv-heads is for llama: in GPT-2 every head has its own keys")
        return GPTConfig(
            vocab_size=vocab_size,
            context_length=arguments.context,
            width=width,
            n_layers=arguments.layers,
            n_heads=heads,
            hidden_width=arguments.hidden or 0,
        )
    if heads < 1 or width % heads:
        raise ValueError(f"--width {width} does not divide into --heads {heads}")
    return LlamaConfig(
        vocab_size=vocab_size,
        context_length=arguments.context,
        width=width,
        n_layers=arguments.layers,
        n_heads=heads,
        n_kv_heads=arguments.kv_heads or heads,
        head_dim=width // heads,
        hidden_width=arguments.hidden or _rounded(width * 8 / 3),
        rope=RopeConfig(theta=10000.0),
        tied=True,
    )


def _rounded(width: float, multiple: int = 32) -> int:
    """`width` up to a multiple: three matrices of 8/3 are as many weights as GPT-2's two of 4."""
    return -int(-width // multiple) * multiple


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    import torch

    from pellucid.train import Schedule, TrainConfig

    peak = arguments.lr
    if arguments.stop is not None and not 1 <= arguments.stop <= arguments.steps:
        raise ValueError(f"--stop {arguments.stop} is not one of the {arguments.steps} steps")
    return TrainConfig(
        schedule=Schedule(
            peak=peak,
            final=peak / 20 if arguments.min_lr is None else arguments.min_lr,
            warmup=arguments.warmup,
            hold=arguments.hold,
            steps=arguments.steps,
        ),
        batch=arguments.batch,
        micro_batch=arguments.micro_batch or arguments.batch,
        weight_decay=arguments.weight_decay,
        clip=arguments.clip,
        bfloat16=_bfloat16(arguments.precision, torch.device(arguments.device)),
        eval_every=arguments.eval_every,
    )


def _bfloat16(precision: str, device: torch.device) -> bool:
    """Whether to multiply matrices in bfloat16; "auto" asks the processor for instructions."""
    import torch

    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    able = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
