"""What ``pellucid info`` prints: a model in figures, its parameters and costs, its diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from pellucid.models.census import BLOCKS, DTYPE_BITS, Census, in_units, nbytes
from pellucid.show.diagram_text import WIDTH, text

if TYPE_CHECKING:
    from rich.console import Console

    from pellucid.checkpoints.model_report import ModelReport
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


def print_report(out: Console, report: ModelReport) -> None:
    """The config in two lines, a table of parameters, bytes and FLOPs."""
    _print_summary(out, report.title, report.census)
    _print_parameters(out, report.census)
    _print_costs(out, report.census, report.tokens)
    if report.stored:
        total = sum(nbytes for _, nbytes in report.stored.values())
        kinds = (f"{count} in {kind}" for kind, (count, _) in report.stored.items())
        out.print(f"The file: tensors {', '.join(kinds)}; {in_units(total, 'B', 1000)} of weights")
        from pellucid.checkpoints.formats.gguf import PLAIN

        if report.stored.keys() - PLAIN.keys():
            out.print("Loading makes numbers of the blocks: the decoder in C reads none as stored")
        out.print()


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
        soft_wrap=not out.is_terminal,
    )
    out.print()


def print_diagram(out: Console, drawn: Structure, *, ascii_only: bool = False) -> None:
    """The structure in box-drawing characters, or in ASCII; a terminal's width decides its own."""
    width = out.width if out.is_terminal else WIDTH
    for pieces in text(drawn, ascii_only=ascii_only, width=width):
        line = Text.assemble(*((piece, _STYLES.get(role, "")) for piece, role in pieces))
        line.rstrip()
        out.print(line, no_wrap=True, crop=False)
