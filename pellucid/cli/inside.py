"""``pellucid walk`` and ``pellucid trace``: look inside a run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pellucid.cli.common import add_model_arguments, console, load_model, print_json

if TYPE_CHECKING:
    from torch import Tensor

    from pellucid.checkpoints import Checkpoint
    from pellucid.tokenizers import Tokenizer
    from pellucid.trace import Trace
    from pellucid.walk import Step

# The prompt of the notebook "llama3 implemented from scratch", whose vocabulary is Llama 3's.
LLAMA3_VOCABULARY = 128_256
LLAMA3_PROMPT = "the answer to the ultimate question of life, the universe, and everything is "
CODE_PROMPT = "if not isinstance(value, str"
TOP = 10
_NUMBERED = re.compile(r"\b(layers|step)\.\d+\.")
_DRAWN = re.compile(r"rope\.cis|embed|layers\.\d+\.attn\.(q|scores|masked_scores|pattern)")


def walk_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid walk``."""
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="text to walk from, - for standard input"
    )
    group = parser.add_argument_group("what to unroll")
    group.add_argument("--layer", type=int, default=0, metavar="N", help="layer (default 0)")
    group.add_argument("--head", type=int, default=0, metavar="N", help="head (default 0)")
    group.add_argument("--all", action="store_true", help="every head of every layer")
    group.add_argument("--no-bos", action="store_true", help="do not begin with the bos token")
    group = parser.add_argument_group("where to")
    group.add_argument("--plots", type=Path, metavar="DIR", help="also write the figures")
    group.add_argument("--html", type=Path, metavar="FILE", help="also one self-contained page")
    group.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_model_arguments(parser)


def trace_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid trace``."""
    parser.add_argument("prompt", metavar="PROMPT", help="text to run on, - for standard input")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="safetensors file to write"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="GLOB",
        help="names to keep, such as 'layers.*.attn.pattern' (repeatable; default: every name)",
    )
    parser.add_argument(
        "--generate", type=int, default=0, metavar="N", help="trace N decoding steps too"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE")
    parser.add_argument("--all", action="store_true", help="list every tensor, not one per layer")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_model_arguments(parser)


# Walk -------------------------------------------------------------------------------------------


def walk(arguments: argparse.Namespace) -> None:
    """Tell every step between a prompt and its next token; the model is never loaded whole."""
    from pellucid import checkpoints, tokenizers
    from pellucid.show.walk_terminal import Teller

    _check_targets(arguments)
    checkpoint = checkpoints.open_checkpoint(arguments.model)
    tokenizer = tokenizers.load(checkpoint.folder)
    prompt = _prompt(arguments.prompt, checkpoint)
    tokens = _encoded(tokenizer, prompt, checkpoint, bos=not arguments.no_bos)
    token_strings = [tokenizer.token_string(token) for token in tokens]
    told: dict[str, Any] = {
        "model": checkpoint.source,
        "prompt": prompt,
        "tokens": tokens,
        "token_strings": token_strings,
        "steps": [],
    }
    keeper = _Keeper(arguments.plots, token_strings, whole=arguments.html is not None)
    out = console()
    teller = None if arguments.json else Teller(out, tokens, token_strings)
    steps = _steps(arguments, checkpoint, tokenizer, tokens, token_strings)
    with _progress(out, checkpoint.config.n_layers) as progress:
        for step in steps:
            progress(step.address)
            if teller:
                teller.step(step)
            else:
                told["steps"].append(step.to_json())
            keeper.keep(step)
            told.update(_outcome(step, tokenizer))
    if teller:
        teller.end(told)
    _write(arguments, told, keeper, teller)


def _steps(
    arguments: argparse.Namespace,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    token_strings: Sequence[str],
) -> Iterator[Step]:
    from pellucid import numerics
    from pellucid import walk as reference
    from pellucid.checkpoints import WeightsInOrder
    from pellucid.language_model import as_dtype

    return reference.walk(
        checkpoint.config,
        _placed(WeightsInOrder(checkpoint.weights), arguments.device),
        tokens,
        token_strings=token_strings,
        specials=tokenizer.specials,
        dialect=numerics.dialect(
            arguments.dialect or checkpoint.dialect, checkpoint.config.rounding
        ),
        dtype=as_dtype(arguments.dtype),
        layer=arguments.layer,
        head=arguments.head,
        everything=arguments.all,
    )


def _check_targets(arguments: argparse.Namespace) -> None:
    """Complain about places that cannot be written before anything is computed."""
    page, plots = arguments.html, arguments.plots
    if page is not None and (page.is_dir() or not page.absolute().parent.is_dir()):
        raise ValueError(
            f"--html {page}: expected a file in a folder that is there, such as walk.html"
        )
    if plots is not None and plots.exists() and not plots.is_dir():
        raise ValueError(f"--plots {plots}: a folder was expected, this is a file")


def _prompt(given: str | None, checkpoint: Checkpoint) -> str:
    if given is None:
        llama3 = checkpoint.config.vocab_size == LLAMA3_VOCABULARY
        return LLAMA3_PROMPT if llama3 else CODE_PROMPT
    prompt = sys.stdin.read().removesuffix("\n") if given == "-" else given
    if not prompt:
        raise ValueError("the prompt is empty: give some text, or leave it out for an example")
    return prompt


def _encoded(tokenizer: Tokenizer, prompt: str, checkpoint: Checkpoint, *, bos: bool) -> list[int]:
    from pellucid.generate import encode_prompt
    from pellucid.language_model import check_tokens

    tokens = encode_prompt(tokenizer, prompt, bos=None if bos else False)
    check_tokens(tokens, checkpoint.config)
    return tokens


def _placed(weights: Mapping[str, Tensor], device: str) -> Mapping[str, Tensor]:
    """The weights, each moved to `device` when it is asked for."""
    import torch

    place = torch.device(device)
    return weights if place.type == "cpu" else _Elsewhere(weights, place)


class _Elsewhere(Mapping[str, Any]):
    """Weights on another device, one at a time."""

    def __init__(self, weights: Mapping[str, Tensor], device: Any) -> None:
        self.weights, self.device = weights, device

    def __getitem__(self, name: str) -> Tensor:
        return self.weights[name].to(self.device)

    def __contains__(self, name: object) -> bool:
        return name in self.weights  # asked often: without reading a tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def _outcome(step: Step, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the last steps say: the likeliest tokens of the logits, then the next token."""
    if step.name == "logits":
        shares = step.value.double().softmax(-1)  # of the last token: its row (V)
        likeliest = shares.topk(min(TOP, len(shares)))
        return {
            "top": [
                {"token": token, "text": tokenizer.token_string(token), "probability": share}
                for share, token in zip(*(part.tolist() for part in likeliest), strict=True)
            ]
        }
    if step.name == "next_token":
        token = int(step.value)
        return {"next_token": token, "next_text": tokenizer.token_string(token)}
    return {}


class _Keeper:
    """Draws the figures as their steps come by, and keeps what the page shows of every step."""

    def __init__(self, plots: Path | None, token_strings: Sequence[str], *, whole: bool) -> None:
        self.plots, self.token_strings, self.whole = plots, token_strings, whole
        self.kept: list[Any] = []
        self.drawn: list[Path] = []
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)

    def keep(self, step: Step) -> None:
        """Take from the step what is needed, and let its tensor go."""
        if self.whole:
            from pellucid.show.digest import digest

            self.kept.append(digest(step))
        if self.plots is not None and _DRAWN.fullmatch(step.name):
            from pellucid.show import figures as plots

            drawn = plots.figure(step, self.token_strings)
            if drawn is not None:
                self._save(drawn[0], step.address)

    def draw_top(self, told: Mapping[str, Any]) -> None:
        """The bars of the likeliest next tokens."""
        from pellucid.show import figures as plots

        texts = [entry["text"] for entry in told["top"]]
        drawn, _ = plots.top_tokens(texts, [entry["probability"] for entry in told["top"]])
        self._save(drawn, "logits")

    def _save(self, drawn: Any, address: str) -> None:
        from pellucid.show import figures as plots

        assert self.plots is not None, "figures without a folder"
        path = self.plots / f"{file_name(address)}.png"
        plots.save(drawn, path)
        self.drawn.append(path)


def file_name(address: str) -> str:
    """An address as the name of a file: ``layers.0.attn.q[3]`` -> ``layers.0.attn.q-3``."""
    return re.sub(r"[^\w.]+", "-", address).strip("-")


def _write(
    arguments: argparse.Namespace, told: dict[str, Any], keeper: _Keeper, teller: Any
) -> None:
    """The figures, the page, the JSON object."""
    if arguments.plots is not None:
        keeper.draw_top(told)
    if arguments.html is not None:
        from pellucid.show.walk_page import page

        arguments.html.write_text(page(told, keeper.kept), encoding="utf-8")
    if not teller:
        print_json(told)
        return
    if arguments.plots is not None or arguments.html is not None:
        teller.console.print()
    if arguments.plots is not None:
        teller.written("figures", f"{arguments.plots}  ({len(keeper.drawn)} files)")
    if arguments.html is not None:
        teller.written("page", arguments.html)


@contextmanager
def _progress(out: Console, layers: int) -> Iterator[Any]:
    """Which layer the walk is in, on a line that goes away; nothing without a terminal."""
    shown = out if out.is_terminal else console(stderr=True)
    if not shown.is_terminal:
        yield lambda address: None
        return
    from pellucid.names import layer_of

    with shown.status("[dim]reading[/dim]") as status:

        def progress(address: str) -> None:
            layer = layer_of(address)
            if layer is not None:
                status.update(f"[dim]layer {layer} of {layers}[/dim]")

        yield progress


# Trace ------------------------------------------------------------------------------------------


def trace(arguments: argparse.Namespace) -> None:
    """Record a run into a trace file and list what is in it."""
    target = arguments.output
    if target.exists() and not arguments.force:
        raise ValueError(f"{target} is there already: --force replaces it")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.parent}")
    if arguments.generate < 0:
        raise ValueError(f"--generate {arguments.generate}: expected 0 or more decoding steps")
    prompt = sys.stdin.read().removesuffix("\n") if arguments.prompt == "-" else arguments.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    lm = load_model(arguments)
    seen = lm.trace(prompt, only=arguments.only or "*", generate=arguments.generate)
    if not seen:
        globs = ", ".join(arguments.only or "*")
        raise ValueError(
            f"no tensor of this run is called {globs}: names look like layers.0.attn.q or logits"
        )
    seen.save(target)
    size = target.stat().st_size
    if arguments.json:
        tensors = [
            {"name": name, "dims": list(seen.dims(name)), "shape": list(tensor.shape)}
            | {"dtype": _dtype(tensor)}
            for name, tensor in seen.items()
        ]
        print_json({"file": str(target), "bytes": size, **seen.meta, "tensors": tensors})
        return
    for line in _listed(seen, every=arguments.all):
        console().print(line, markup=False, soft_wrap=True)
    told = f"{target}: {len(seen):,} tensors, {size:,} bytes"
    console().print(f"\n{told}", markup=False, soft_wrap=True)


def _listed(seen: Trace, *, every: bool) -> list[str]:
    """Name, dims, shape and dtype of each tensor; layers that look alike as one, ``layers.*``."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, tensor in seen.items():
        told = (" ".join(seen.dims(name)), str(tuple(tensor.shape)), _dtype(tensor))
        alike = name if every else _NUMBERED.sub(r"\1.*.", name)
        rows.setdefault((alike, *told), []).append(name)
    table = [
        (_alike(members), dims, shape, dtype, f"× {len(members)}" if members[1:] else "")
        for (_, dims, shape, dtype), members in rows.items()
    ]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    return [
        "  ".join(
            f"{text:<{width}}" for text, width in zip(row, [*widths, 0], strict=True)
        ).rstrip()
        for row in table
    ]


def _alike(members: Sequence[str]) -> str:
    """One name for several that differ in a number: ``step.2.layers.*.attn.q``."""
    split = [name.split(".") for name in members]
    return ".".join(part[0] if len(set(part)) == 1 else "*" for part in zip(*split, strict=True))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
