"""The walk on a terminal: chapters, steps, the tokens, attention, the next token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text
from torch import Tensor

from pellucid.names import layer_of
from pellucid.show.digest import corner, hidden_cells, shape_text, visible
from pellucid.walk.chapters import Chapters

if TYPE_CHECKING:
    from pellucid.walk import Step

_MOST_TOKENS, _MOST_SPECIALS = 60, 4
_LONGEST_LABEL = 16
_CELL = 3  # characters per cell: an index of up to three digits fits above it
# From which share on: nothing, a little, … nearly all.
_SHADES = ((0.75, "█"), (0.5, "▓"), (0.25, "▒"), (0.05, "░"), (0.0, " "))
_WARM, _COLD = "yellow", "cyan"


class WalkPrinter:
    """Prints steps as they come, under the chapters they belong to.

    tokens  of the prompt, their ids; token_strings  their texts
    lines   from the name of a step to its lines of resolved code; None: without code
    """

    def __init__(
        self,
        console: Console,
        tokens: Sequence[int],
        token_strings: Sequence[str],
        lines: Callable[[str], Sequence[str]] | None = None,
    ) -> None:
        self.console, self._lines = console, lines
        self.tokens, self.token_strings = tokens, token_strings
        self._chapters = Chapters()

    def print_step(self, step: Step) -> None:
        """Title and address, formula, code, shape, dtype and statistics, a corner of the values."""
        chapter = self._chapters.begins(step)
        if chapter:
            self._print()
            self._print(Text(f"── {chapter} ", style=f"bold {_WARM}"))
        self._print()
        self._print(
            Text(step.title, style="bold").append(f"  {step.address}", style=f"not bold {_COLD}")
        )
        self._print(Text(f"  {step.formula}"))
        for line in self._lines(step.name) if self._lines and step.source else ():
            fits = cell_len(line) + 4 <= self.console.width
            code = line if fits else line.partition("  # ")[0]  # its shape is printed below
            self._print(Text(f"    {code}", style="dim"))
        self._print(Text(f"  {_facts(step)}", style="dim"))
        for line in self._values(step):
            self._print(line)

    def _values(self, step: Step) -> list[Text]:
        if step.name == "token_strings":
            return self._token_table()
        if not isinstance(step.value, Tensor):
            return _strings(step.value)
        lines = [Text(f"    {line}", style="dim") for line in corner(step.value).splitlines()]
        if step.name.endswith(".pattern"):
            return [*lines, Text(), *self._heat_map(step)]
        return lines

    def _token_table(self) -> list[Text]:
        """Position, id and text of each token."""
        width = max(len(str(token)) for token in self.tokens)
        rows = [
            Text(f"    {place:>4}  ", style="dim")
            .append(f"{token:>{width}}", style="not dim")
            .append(f"  {visible(text)}", style=f"not dim {_COLD}")
            for place, (token, text) in enumerate(zip(self.tokens, self.token_strings, strict=True))
        ]
        left_out = len(rows) - _MOST_TOKENS
        if left_out > 0:
            half = _MOST_TOKENS // 2
            rows[half:-half] = [Text(f"    ⋮ {left_out:,} more", style="dim")]
        return [Text("    position, id, text  (· is a space)", style="dim"), *rows]

    def _heat_map(self, step: Step) -> list[Text]:
        """Attention of row to column, masked cells dotted; as many tokens as the width has room."""
        labels = [visible(text) for text in self.token_strings]
        margin = 4 + 5 + min(_LONGEST_LABEL, max(map(cell_len, labels))) + 1
        room = max(4, (min(self.console.width, 200) - margin - 1) // _CELL)
        count = min(len(labels), room)
        values = step.value[:count, :count].float().cpu().numpy()
        hidden = hidden_cells(step.name, values)
        lines = [Text(" " * margin + "".join(f"{place:>{_CELL}}" for place in range(count)))]
        for row in range(count):
            label = set_cell_size(_cut(labels[row]), margin - 10)
            line = Text(f"    {row:>4} ", style="dim").append(f"{label} ", style="not dim")
            for column in range(count):
                if hidden[row, column]:
                    line.append(" · ", style="dim")
                else:
                    line.append(_shade(values[row, column]) * _CELL, style=f"not dim {_WARM}")
            line.rstrip()
            lines.append(line)
        lines[0].stylize("dim")
        legend = "attention of row to column:  ░ 5 %  ▒ 25 %  ▓ 50 %  █ 75 % and more  · masked"
        if count < len(labels):
            legend += f"; the first {count} of {len(labels)} tokens"
        return [*lines, Text(f"    {legend}", style="dim")]

    def print_result(self, result: Mapping[str, Any]) -> None:
        """The next token, and the likeliest ones with their probabilities."""
        self._print()
        line = Text("Next token  ", style="bold").append(repr(result["next_text"]), style=_WARM)
        self._print(line.append(f"  {result['next_token']}", style="not bold dim"))
        likeliest = max(entry["probability"] for entry in result["top"])
        for entry in result["top"]:
            share = entry["probability"]
            length = round(24 * share / likeliest) if likeliest > 0 else 0
            line = Text(f"    {share:>7.2%}  ").append(f"{'█' * length:<24}", style=_WARM)
            line.append(f"  {entry['text']!r}").append(f"  {entry['token']}", style="dim")
            self._print(line)

    def print_files(self, places: Mapping[str, str]) -> None:
        """Where files were written: what -> where."""
        if places:
            self._print()
        for what, where in places.items():
            self._print(Text(f"{what:<12}", style="bold").append(where, style="not bold"))

    def _print(self, line: Text | None = None) -> None:
        self.console.print(line if line is not None else "", soft_wrap=True)


@contextmanager
def layer_status(console: Console, layers: int) -> Iterator[Callable[[str], None]]:
    """A line that says which layer the walk is in, and goes away; nothing for 0 layers.

    Gives a function that takes the address of each step.
    """
    if not layers:
        yield lambda address: None
        return
    with console.status("[dim]reading[/dim]") as status:

        def show_layer(address: str) -> None:
            layer = layer_of(address)
            if layer is not None:
                status.update(f"[dim]layer {layer} of {layers}[/dim]")

        yield show_layer


def _facts(step: Step) -> str:
    facts = f"{shape_text(step.shape)}  {step.dtype}"
    counted = step.dtype.startswith(("int", "bool"))  # a mean of token ids says nothing
    numbers = [(key, value) for key, value in step.stats().items() if value is not None]
    if numbers and not counted:
        facts += "   " + "  ".join(f"{key} {value:.4g}" for key, value in numbers)
    return facts


def _strings(texts: Sequence[str]) -> list[Text]:
    pairs = [text.partition(" ") for text in texts[:_MOST_SPECIALS]]  # id and text
    lines = [Text(f"    {number}  {visible(text)}", style="dim") for number, _, text in pairs]
    if len(texts) > _MOST_SPECIALS:
        lines.append(Text(f"    ⋮ {len(texts) - _MOST_SPECIALS:,} more", style="dim"))
    return lines


def _cut(label: str) -> str:
    if cell_len(label) <= _LONGEST_LABEL:
        return label
    return set_cell_size(label, _LONGEST_LABEL - 1) + "…"


def _shade(share: float) -> str:
    return next((sign for least, sign in _SHADES if share >= least), "?")  # NaN is no share
