"""A window slid over texts of any length, so that each token is scored once, in context.

    text       a b c d e f g h i j k                context 4, stride 2
    window 0   a b c d                              scores b c d e
    window 1       c d e f                          scores       f g
    window 2           e f g h                      scores           h i
    window 3               g h i j                  scores                   j k

A window is what the model reads; what it scores is the token after each of its last places. With a
stride of the context the windows lie side by side, the cheapest; a stride of 1 gives each token all
the context there is, at a pass for each. In between each scored token sees at least
context - stride + 1 tokens, where its text has them before it. The last window of a text is moved
back to be as long as the others, so that its tokens too are scored in all the context they have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """Of text number `text` the model reads tokens start … stop - 1.

    The tokens first + 1 … stop are scored: those after the places from `first` on.
    """

    text: int
    start: int
    stop: int
    first: int


class WindowRows(NamedTuple):
    """Windows side by side, B rows of T tokens, padded on the right where one is shorter.

    inputs, targets  (B, T) token ids, and the token after each
    scored           (B, T) whether this window scores that target
    places           text and place in it of each scored target, in the order of the rows
    """

    inputs: Tensor
    targets: Tensor
    scored: Tensor
    places: list[tuple[int, int]]


def sliding_windows(lengths: Sequence[int], context: int, stride: int) -> Iterator[Window]:
    """The windows over texts of so many tokens; the first token of a text is context only.

    Raises ValueError for a stride outside 1 … context: tokens would be left out.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"a stride of {stride} tokens: expected 1 to the context of {context}")
    for text, length in enumerate(lengths):
        first = 0
        while first < length - 1:
            stop = min(first + (stride if first else context), length - 1)
            yield Window(text, max(0, stop - context), stop, first)
            first = stop


def batch_windows(
    texts: Sequence[Sequence[int]], windows: Iterable[Window], batch: int
) -> Iterator[WindowRows]:
    """Windows over `texts`, token ids each, `batch` of them at a time, longest first."""
    longest_first = sorted(windows, key=lambda window: window.start - window.stop)
    for begin in range(0, len(longest_first), batch):
        yield _rows(texts, longest_first[begin : begin + batch])


def _rows(texts: Sequence[Sequence[int]], windows: Sequence[Window]) -> WindowRows:
    shape = len(windows), windows[0].stop - windows[0].start
    inputs, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    scored = torch.zeros(shape, dtype=torch.bool)
    places = []
    for row, (text, start, stop, first) in enumerate(windows):
        ids = torch.tensor(texts[text][start : stop + 1])
        width = stop - start
        inputs[row, :width], targets[row, :width] = ids[:-1], ids[1:]
        scored[row, first - start : width] = True
        places += [(text, place) for place in range(first + 1, stop + 1)]
    return WindowRows(inputs, targets, scored, places)
