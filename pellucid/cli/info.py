"""``pellucid info``: what a model is made of, counted and drawn, without loading a weight."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from pellucid.cli.common import add_shape_argument, console, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from pellucid.models import Config
    from pellucid.models.census import Census
    from pellucid.show.diagram import Structure

_STYLES = {
    "stream": "bold red",
    "line": "dim",
    "title": "bold",
    "name": "blue",
    "shape": "cyan",
    "count": "",
    "fact": "dim",
}


def info_arguments(parser: argparse.ArgumentParser) -> None:
    """MODEL and what to show of it."""
    add_shape_argument(parser)
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens in view (default: the whole context)"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the structure as a picture")
    parser.add_argument("--no-diagram", action="store_true", help="the numbers only")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def info(arguments: argparse.Namespace) -> None:
    """Print the census and the diagram of a model."""
    from pellucid.models.census import as_json, census
    from pellucid.show.diagram import structure

    title, config = find_config(arguments.model)
    counted = census(config)
    tokens = config.context_length if arguments.tokens is None else arguments.tokens
    counted.flops(tokens)  # refuses a number of tokens that the model cannot take
    drawn = structure(config, arguments.tokens)
    if arguments.svg:
        from pellucid.show.diagram_svg import svg

        arguments.svg.write_text(svg(drawn, title), "utf-8")
    if arguments.json:
        about = {"model": title, "family": config.family, "config": _stated(config)}
        print_json({**about, **as_json(counted, tokens)})
        return
    out = console()
    _print_summary(out, title, counted)
    _print_parameters(out, counted)
    _print_costs(out, counted, tokens)
    if not arguments.no_diagram:
        _print_diagram(out, drawn)
    if arguments.svg:
        out.print(f"The picture: {arguments.svg}")


def find_config(source: str) -> tuple[str, Config]:
    """Title and config of a model, a bare config file or a named shape; no weight is read.

    ValueError or OSError in one line for what is none of them.
    """
    from pellucid import checkpoints
    from pellucid.families.shapes import SHAPES

    if source in SHAPES and not Path(source).is_dir():
        return SHAPES[source].title, SHAPES[source].config
    if Path(source).is_file():
        return source, _from_file(Path(source))
    try:
        folder = checkpoints.resolve(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or a shape: {', '.join(SHAPES)}") from None
    stated = folder / "config.json"
    if stated.is_file():
        return source, _from_file(stated)
    return source, checkpoints.open_checkpoint(source).config  # Meta's: shapes complete the config


def _from_file(path: Path) -> Config:
    from pellucid.checkpoints.formats import hf_config, meta

    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    if "model_type" in values:
        return hf_config.read_config(values, str(path))
    if values.get("vocab_size", -1) < 1:
        raise ValueError(f"{path}: vocab_size is left to the weights; give the folder they lie in")
    return meta.read_params(values, str(path), shards=(), tied=False)


def _print_summary(out: Console, title: str, counted: Census) -> None:
    config = counted.config
    out.print(Text(title, "bold"), Text(f"  {config.family}", "dim"))
    heads = f"{config.n_heads} heads"
    if config.n_kv_heads != config.n_heads:
        heads = f"{config.n_heads} query heads on {config.n_kv_heads} key/value heads"
    out.print(
        f"{config.n_layers} layers, width {config.width:,}, {heads} of {config.head_dim}, "
        f"hidden {config.hidden_width:,}, vocabulary {config.vocab_size:,}, "
        f"context {config.context_length:,}, head {'tied' if config.tied else 'untied'}"
    )
    out.print()


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", overflow="fold")
    return table


def _print_parameters(out: Console, counted: Census) -> None:
    from pellucid.models.census import BLOCKS

    table = _table("parameters", "count", "share", "")
    table.columns[3].justify = "left"
    for group in counted.groups:
        written = group.written if group.name == BLOCKS else group.parts[0].written
        if len(group.parts) > 1 and group.name != BLOCKS:
            written = " + ".join(f"{part.path} {part.written}" for part in group.parts)
        share = f"{group.count / counted.total:.1%}"
        table.add_row(Text(group.name, "bold"), f"{group.count:,}", share, written)
        if group.name == BLOCKS:
            for part in group.parts:
                share = f"{group.repeats * part.count / counted.total:.1%}"
                name = Text(f"  {part.path}", "blue")
                table.add_row(name, f"{part.count:,}", Text(share, "dim"), part.written)
    out.print(table)
    out.print(counted.written, soft_wrap=True)
    out.print()


def _print_costs(out: Console, counted: Census, tokens: int) -> None:
    from pellucid.models.census import DTYPE_BITS, in_units, nbytes

    table = _table("bytes", *DTYPE_BITS)

    def row(title: str, numbers: int, base: int) -> None:
        sizes = (in_units(nbytes(numbers, dtype), "B", base) for dtype in DTYPE_BITS)
        table.add_row(title, *sizes)

    row("weights", counted.total, 1000)
    row("", counted.total, 1024)
    row("KV cache, one token", counted.cached_numbers, 1000)
    row(f"KV cache, {tokens:,} tokens", tokens * counted.cached_numbers, 1000)
    out.print(table)
    flops = counted.flops(tokens)
    out.print(
        f"FLOPs for one token with {tokens:,} in view: 2 × {flops.matmul_parameters:,} + "
        f"{flops.attention_per_token_in_view:,} × {tokens:,} = {flops.forward:,} "
        f"({in_units(flops.forward, 'FLOP')}); in training {in_units(flops.training, 'FLOP')}",
        soft_wrap=True,
    )
    out.print()


def _print_diagram(out: Console, drawn: Structure) -> None:
    from pellucid.show.diagram_text import text

    ascii_only = not _can_print("╭┃⊕ᵀ√", sys.stdout.encoding)
    for pieces in text(drawn, ascii_only=ascii_only):
        line = Text.assemble(*((piece, _STYLES.get(role, "")) for piece, role in pieces))
        line.rstrip()
        out.print(line, no_wrap=True, crop=False)


def _can_print(characters: str, encoding: str | None) -> bool:
    try:
        characters.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _stated(config: Config) -> dict[str, Any]:
    """The config's fields, without the family, which stands beside them."""
    from pellucid.models.description import describe

    return {name: value for name, value in describe(config).items() if name != "family"}
