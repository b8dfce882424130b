"""Where tokens stand and who sees whom: positions and masks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import names
from pellucid.diff.causes.hypothesis import Hypothesis, given, of_model
from pellucid.diff.replay.operations import Setting
from pellucid.diff.replay.replay import Replay
from pellucid.diff.replay.statistics import MASKED
from pellucid.models.attention import last_of


def positions(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Off by one, counted from the padding, started again."""
    expected, _ = replay.expected_places(names.step_of(name))
    for shift in (1, -1):
        yield Hypothesis(
            "cache position off by one" if names.step_of(name) else "positions off by one",
            f"every position {shift:+d}",
            lambda r, n, by=shift: expected + by,
        )
    plain = torch.arange(expected.shape[-1]) + int(expected.max()) - expected.shape[-1] + 1
    yield Hypothesis(
        "left padding without positions",
        "positions count the padding",
        lambda r, n: plain.expand_as(expected),
    )
    counted = torch.arange(expected.shape[-1]).expand_as(expected)
    yield Hypothesis("positions restart", "positions start at 0 again", lambda r, n: counted)


def pos_embed(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Rows of other positions, where the positions themselves were not observed."""
    for hypothesis in positions(replay, of_model(name, "positions"), None):

        def rows(s: Setting, right: Tensor, h: Hypothesis = hypothesis) -> Tensor:
            table = s.parameter("pos_embed.weight")
            places = h.compute(replay, name).clamp(0, len(table) - 1)
            if observed is not None and observed.ndim == 2:  # one row of positions for all
                places = places.reshape(-1, places.shape[-1])[0]
            return F.embedding(places, table)

        yield Hypothesis(hypothesis.cause, hypothesis.evidence, given(rows))


def mask(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """One too wide or narrow, top-left, missing, transposed, a window, open to padding."""
    step = names.step_of(name)
    _, expected = replay.expected_places(step)
    tokens, seen = expected.shape[-2:]
    rows, columns = torch.arange(tokens)[:, None], torch.arange(seen)[None]
    bottom = rows + seen - tokens
    for cause, evidence, value in (
        ("mask one too wide", "each token also sees the next one", columns <= bottom + 1),
        ("mask one too narrow", "no token sees itself", columns < bottom),
        (
            "mask one too narrow",
            "no token but the first sees itself",
            (columns < bottom) | ((columns == 0) & (bottom == 0)),
        ),
        ("top-left causal mask", "the mask ignores the tokens in the cache", columns <= rows),
        ("mask missing", "every token sees every other", columns >= 0),
        ("mask transposed", "every token sees only what follows it", columns >= bottom),
    ):
        if cause.startswith("top-left") and tokens == seen:
            continue  # nothing in the cache: the right mask
        allowed = value.expand(expected.shape)
        yield Hypothesis(cause, evidence, lambda r, n, v=allowed: v)
        if expected.ndim == 4:
            padded = allowed & expected.diagonal(dim1=-2, dim2=-1).any(-1)[..., None, None]
            yield Hypothesis(cause, evidence, lambda r, n, v=padded: v)
    for size in () if replay.setting.config.has_windows else _windows(observed, seen):
        evidence = f"a token sees the last {size}, itself included"
        seen_by = expected & (columns > bottom - size)
        yield Hypothesis("sliding window in B", evidence, lambda r, n, v=seen_by: v)
    if expected.ndim == 4:
        causal = (columns <= bottom).expand(expected.shape)
        yield Hypothesis("padding not masked", "tokens see the padding", lambda r, n: causal)


def _windows(observed: Tensor | None, seen: int) -> list[int]:
    """Sizes of a window that the last query shows (of a mask, or of scores), else likely ones."""
    if observed is None:
        return [size for size in (2, 4, 8, 16, 32, 64, 128, seen - 1) if 1 < size < seen]
    last = observed.reshape(-1, observed.shape[-1])[-1]
    count = int((last if last.dtype == torch.bool else last > MASKED).sum())
    return [count] if 0 < count < seen else []


def window_mask(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """A window one too wide or narrow, missing, or of the size that is seen."""
    window = replay.setting.config.window
    allowed = replay.value(of_model(name, "mask"))
    for by, word in ((1, "wide"), (-1, "narrow")):
        evidence = f"a token sees {window + by} instead of {window}, itself included"
        yield _value(f"window one too {word}", evidence, last_of(allowed, window + by))
    yield _value("window missing", "every token before is seen", allowed)
    if observed is not None and observed.shape[-2:] == allowed.shape[-2:]:
        count = int(observed.reshape(-1, allowed.shape[-1])[-1].sum())
        evidence = f"a token sees {count} instead of {window}, itself included"
        yield _value("other window", evidence, last_of(allowed, max(1, count)))


def _value(cause: str, evidence: str, tensor: Tensor) -> Hypothesis:
    return Hypothesis(cause, evidence, lambda r, n: tensor)
