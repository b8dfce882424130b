"""Every setting of a training run, one row each."""

from __future__ import annotations

from dataclasses import dataclass

Value = bool | int | float | str | list[str] | None
SECTIONS = ("text", "model", "training", "output")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One setting: ``[section] name = …`` in a file, ``--name`` with dashes as a flag.

    kind       type of its value: bool, int, float, str, or list for a list of texts
    default    the value where nobody says anything; None where that depends on other settings
    help       one line
    otherwise  what None stands for
    """

    section: str
    name: str
    kind: type
    default: Value
    help: str
    otherwise: str = ""
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """As on the command line."""
        return "--" + self.name.replace("_", "-")


def _rows(section: str, *rows: tuple[str, type, Value, str]) -> list[Setting]:
    settings = []
    for name, kind, default, text in rows:
        text, _, otherwise = text.partition(" | ")
        choices = tuple(otherwise.split(": ")[1].split(", ")) if "one of: " in otherwise else ()
        settings.append(
            Setting(
                section=section,
                name=name,
                kind=kind,
                default=default,
                help=text,
                otherwise="" if choices else otherwise,
                choices=choices,
            )
        )
    return settings


# name, kind, default, what it is | what None stands for (or its choices)
SETTINGS: tuple[Setting, ...] = (
    *_rows(
        "text",
        ("data", list, None, "text files, JSON lines, folders of them"),
        ("stdlib", bool, False, "the standard library of this Python: code and prose"),
        ("text_key", str, "text", "key of the text in JSON lines"),
        (
            "separator",
            str,
            None,
            "stands between two documents of a text file | a file is one",
        ),
        ("tokenizer", str, None, "a tokenizer to use, or 'characters' | a BPE is learnt"),
        ("tokens", str, None, "folder of tokenised text, to share between runs | RUN/tokens"),
        ("vocab", int, 2048, "tokens of the byte-level BPE that is learnt"),
        ("begin", bool, True, "put the tokens that begin and end a text around each document"),
        ("hold_out", int, 40, "hold out each N-th document; of fewer, the last tenth of each"),
        ("copies", float, 0.0, "share of rows with a passage copied, to form induction heads"),
        ("order", str, "seeded", "of windows | one of: seeded, dataloader, random"),
        (
            "documents",
            str,
            "packed",
            "of a row: one text, or each alone | one of: packed, masked",
        ),
    ),
    *_rows(
        "model",
        ("init", str, None, "begin from this model, its shape and weights | random weights"),
        ("family", str, "llama", "which of the two | one of: llama, gpt2"),
        ("width", int, 192, "of the residual stream"),
        ("layers", int, 4, "blocks"),
        ("heads", int, 6, "query heads"),
        ("kv_heads", int, None, "key/value heads, llama only | as many"),
        ("hidden", int, None, "of the MLP | 8/3 of the width, gpt2: 4 times"),
        ("context", int, 256, "tokens in view"),
        ("dropout", float, 0.0, "share of values left out while training, gpt2 only"),
        ("qkv_bias", bool, True, "biases of queries, keys and values, gpt2 only"),
        ("bias", bool, True, "train the other biases, gpt2 only; else they stay 0"),
        ("tied", bool, True, "the head is the embedding"),
        ("start", str, "sinusoids", "random weights | one of: sinusoids, gpt2, torch"),
    ),
    *_rows(
        "training",
        ("steps", int, None, "optimiser steps | 1600, or as many as the epochs have"),
        ("epochs", int, None, "times over the text, in place of steps | go by steps"),
        ("stop", int, None, "end after this step; the rate goes by all the same | the last"),
        ("batch", int, 16, "rows of a step, each as long as the context"),
        ("micro_batch", int, None, "rows in memory at a time | all"),
        ("lr", float, 3e-3, "highest learning rate"),
        ("min_lr", float, None, "at the end | lr / 20"),
        ("warmup", int, 80, "steps up to it"),
        ("hold", int, 0, "steps at it, before it comes down"),
        ("schedule", str, "cosine", "how it comes down | one of: cosine, linear, constant"),
        ("weight_decay", float, 0.1, "of matrices"),
        ("decay_all", bool, False, "decay biases and norms as well"),
        ("beta1", float, 0.9, "AdamW's memory of gradients"),
        ("beta2", float, 0.95, "AdamW's memory of their squares"),
        ("fused", bool, True, "AdamW in one kernel"),
        ("clip", float, 1.0, "longest gradient; 0: any"),
        ("seed", int, 1, "of weights, batches, dropout and samples"),
        ("precision", str, "auto", "of products | one of: auto, float32, bfloat16"),
        ("compile", bool, False, "torch.compile the blocks"),
        ("recompute", bool, False, "activation checkpointing: less memory, one more forward pass"),
        ("parallel", str, "ddp", "how torchrun's ranks share work | one of: ddp, fsdp, tp"),
        ("tensor", int, 1, "ranks that share every matrix, with fsdp"),
        ("rank_timeout", float, 600.0, "seconds a rank waits for another"),
        ("loss", str, "chunked", "logits a part at a time, or at once | one of: chunked, plain"),
        ("device", str, "cpu", "cpu, cuda, cuda:1 …"),
        ("eval_every", int, 50, "steps between evaluations on held-out text"),
        ("eval_first", bool, False, "the first evaluation is after step 1"),
        ("eval_windows", int, 32, "windows of held-out text in each; 0: all"),
        ("patience", int, 0, "evaluations without a better loss before an early end; 0: none"),
    ),
    *_rows(
        "output",
        ("save_every", int, 200, "steps between checkpoints; 0: at the end only"),
        ("sample_every", int, 200, "steps between samples; 0: none"),
        ("prompt", str, "def", "where samples begin"),
        ("dtype", str, "float32", "of the best model's file | one of: float32, bfloat16"),
        ("tensorboard", bool, True, "write event files into RUN/tensorboard"),
        ("plot", bool, True, "draw the losses into RUN/loss.png"),
        ("trace_every", int, 0, "watch tensors at step 1 and each N-th: RUN/trace.csv; 0: none"),
        ("only", list, None, "globs of the names to watch, such as 'layers.*.resid_post' | all"),
        ("trace_tensors", bool, False, "write watched tensors whole into RUN/traces"),
    ),
)
