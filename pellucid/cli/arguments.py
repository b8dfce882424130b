"""Arguments that several verbs have, each with one sentence of help, and the model they choose."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pellucid.language_model import LanguageModel

DTYPES = ("float32", "bfloat16", "float16", "float64")
MODEL_HELP = (
    "a folder, a GGUF file, owner/name on the Hub, demo (a Llama), demo-gpt2, stdlib, stdlib-gpt2 "
    "or smollm2"
)
MODEL_FLAG_HELP = "model, in place of MODEL as an argument of its own (default: demo)"
ENGINES = {"auto": None, "fast": True, "plain": False}  # --engine -> `fast`
SHARED: dict[str, dict[str, Any]] = {
    "--json": {"action": "store_true", "help": "print one JSON object, no text"},
    "--force": {"action": "store_true", "help": "replace files that exist"},
    "--no-bos": {
        "action": "store_true",
        "help": "do not put the token that begins a text before the prompt",
    },
    "--dtype": {
        "choices": DTYPES,
        "help": "data type to compute in (default: that of the weights)",
    },
    "--device": {
        "default": "cpu",
        "help": "device to compute on: cpu, cuda, cuda:1 … (default: cpu)",
    },
    "--dialect": {
        "help": "reference implementation whose rounding is followed: meta, hf, notebook "
        "(default: the one that wrote the model's files, else hf)"
    },
    "--engine": {
        "choices": tuple(ENGINES),
        "default": "auto",
        "help": "plain: the model's own PyTorch code; fast: decoding in C, or as CUDA graphs on a "
        "GPU; auto: fast on a CPU once the C code is compiled (default: auto)",
    },
    "--draft": {
        "metavar": "MODEL",
        "help": "a smaller model with the same tokenizer that runs ahead of a single text where it "
        "pays; int8, int6, int4: a copy of the model itself. Greedy text stays the same, drawn "
        "text as likely (default: none)",
    },
    "--resume": {
        "action": "store_true",
        "help": "continue the run from its last checkpoint, RUN/last, bit for bit",
    },
    "--overwrite": {"action": "store_true", "help": "replace the run that RUN holds already"},
}
Arguments = argparse.ArgumentParser | argparse._ArgumentGroup


def add_shared(group: Arguments, *flags: str) -> None:
    """Flags that mean the same in every verb that has them."""
    for flag in flags:
        group.add_argument(flag, **SHARED[flag])


def add_value(
    group: Arguments,
    flag: str,
    metavar: str,
    help: str,
    *,
    kind: Callable[[str], Any] = int,
    default: Any = None,
    otherwise: str = "",
) -> None:
    """A flag with a value; its help ends with the default, or with what is `otherwise` taken."""
    told = otherwise if default is None else f"{default:g}{otherwise}"
    help += f" (default: {told})" if told else ""
    group.add_argument(flag, type=kind, default=default, metavar=metavar, help=help)


def add_model(
    parser: argparse.ArgumentParser,
    group: Arguments,
    what: str,
    *,
    kinds: str = MODEL_HELP,
    default: str | None = "demo",
) -> None:
    """MODEL as the first argument or behind ``-m``: call before other positional arguments.

    what     the model is for
    default  where there is neither
    """
    parser.add_argument(
        "first", nargs="?", metavar="MODEL", help=f"{what}: {kinds} (default: demo)"
    )
    group.add_argument("-m", "--model", help=MODEL_FLAG_HELP)
    parser.set_defaults(default_model=default)


def settle_model(given: argparse.Namespace) -> str | None:
    """Join the two places that `add_model` gives MODEL; an error, or None.

    Where a verb takes prompts, a first argument is MODEL if it names a model that ships or a
    path, or if it looks like a Hub repository and a prompt follows; otherwise a prompt.
    """
    if not hasattr(given, "first"):
        return None
    prompts = getattr(given, "prompt", None)
    if hasattr(given, "prompt") and given.first is not None:
        rest = prompts if isinstance(prompts, list) else [prompts] * (prompts is not None)
        if given.model is not None or not names_model(given.first, prompt_follows=bool(rest)):
            rest, given.first = [given.first, *rest], None
        if given.first is None and given.model is None:
            misplaced = next((word for word in rest[1:] if word and names_model(word)), None)
            if misplaced is not None:
                return f"{misplaced} is a model, and stands where a prompt does: give MODEL first"
        if not isinstance(prompts, list) and len(rest) > 1:
            return f"one PROMPT is expected, {len(rest)} are given; the first is no model"
        given.prompt = rest if isinstance(prompts, list) else (rest or [None])[0]
    if given.first is not None and given.model is not None:
        return f"two models are given, {given.first} and -m {given.model}: one is expected"
    given.model = given.first or given.model or given.default_model
    return None


def names_model(word: str, *, prompt_follows: bool = False) -> bool:
    """Whether a first argument is MODEL, not a text: a model that ships, a folder or a path."""
    from pellucid.checkpoints.hub import NAMES, is_repository

    if word in NAMES:
        return True
    if not word or any(sign.isspace() or not sign.isprintable() for sign in word):
        return False
    try:
        path = Path(word).expanduser()
        if path.is_dir() or (path.suffix == ".gguf" and path.is_file()):
            return True
        within = path.parts[: 2 if path.is_absolute() else 1]
        if len(path.parts) > len(within) and Path(*within).is_dir():
            return True  # a mistyped path, such as RUN/bset
    except (OSError, RuntimeError):  # a name longer than paths may be, or ~NAME of no user
        return False
    return prompt_follows and is_repository(word)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL, and how to run it."""
    group = parser.add_argument_group("model")
    add_model(parser, group, "model to run")
    group.add_argument(
        "--adapter", metavar="DIR", help="folder of a LoRA adapter to merge into the model"
    )
    add_shared(group, "--dtype", "--device", "--dialect")
    group.add_argument(
        "--stream-weights",
        action="store_true",
        help="read each block from the disk when it runs, for a model larger than memory",
    )


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """MODEL where only the config counts: also a config file, or the name of a known shape."""
    from pellucid.families.shapes import SHAPES

    shapes = ", ".join(SHAPES)
    kinds = f"{MODEL_HELP}, a config.json or params.json, or a published shape: {shapes}"
    add_model(parser, parser, "model", kinds=kinds)


def add_page_argument(group: Arguments, what: str) -> None:
    """``--html FILE``; `what` the page shows."""
    group.add_argument(
        "--html", type=Path, metavar="FILE", help=f"also write {what} as one HTML page"
    )


def add_run_arguments(group: Arguments) -> None:
    """The folder of a training run, and what to do with one that is there."""
    group.add_argument(
        "--out", type=Path, metavar="RUN", required=True, help="folder that the run is written to"
    )
    add_shared(group, "--resume", "--overwrite")


def load_model(arguments: argparse.Namespace) -> LanguageModel:
    """The language model that the arguments of `add_model_arguments` describe."""
    from pellucid.language_model import load

    if arguments.adapter and arguments.stream_weights:
        raise ValueError("--adapter changes weights that --stream-weights leaves on the disk")
    lm = load(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        dialect=arguments.dialect,
        stream=arguments.stream_weights,
        adapter=arguments.adapter,
    )
    if arguments.adapter:
        from pellucid.models.adapters import fold

        fold(lm.model)  # merged weights decode faster, in C where that can be done
    return lm


def read_prompt(prompt: str) -> str:
    """The prompt itself; for ``-`` standard input, without the line break that ends it."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt
