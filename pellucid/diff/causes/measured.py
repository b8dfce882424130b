"""The last resort: which weights would give the observed values? Solved for, then replayed.

A product is linear in its weights, so the error of a channel says which of its weights differ, and
by how much: one of them, a group of neighbours by one amount, or, where there are more tokens than
columns, all of them (fitted on every second token, so that the others are a test).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from pellucid.diff.causes.hypothesis import Hypothesis, in_setting, parameters, with_weights
from pellucid.diff.replay.operations import leaf
from pellucid.diff.replay.replay import Replay

Found = tuple[str, str, Tensor]  # cause, evidence, the weight as it would be
GROUPS = (32, 64, 128)
FEW = 8  # channels that are looked at one by one
WIDEST = 2048  # columns that are solved for at once


def measured_weights(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """Hypotheses about single weights, groups and whole tensors of the operation."""
    own = [p for p in parameters(replay.setting, name) if p.endswith(".weight")]
    if not own or not observed.isfinite().all() or leaf(name) == "pos_embed":
        return
    wide = Replay(replay.observed, replay.setting.wide(), replay.starts)
    right = wide.compute(name)
    seen = observed[..., : right.shape[-1]].to(right.dtype)
    if seen.shape != right.shape:
        return
    error = _by_token(name, wide.real_tokens(name, seen - right)).double()  # (n, out)
    plain = replay.setting.parameter_named(own[0])
    if leaf(name) == "embed":
        found = _of_rows(plain, wide.arguments(name)[0].flatten(), error)
    elif leaf(name).endswith("norm"):
        found = _named(plain, _of_channels(wide, name, own[0], error))
    else:
        x = wide.arguments(name)[0]
        x = x.transpose(1, 2).flatten(2) if leaf(name) == "attn_out" else x
        x = wide.real_tokens("embed", x).flatten(0, 1).double()
        found = _named(plain, _of_products(x, error))
    if error.shape[0] > 2 and leaf(name) != "embed":
        added = _by_channel(name, error.mean(0).to(right.dtype), right)
        yield Hypothesis(
            "other bias",
            f"{own[0].removesuffix('weight')}bias: a vector added to every token, "
            f"{float(added.abs().max()):.3g} at most",
            lambda r, n, by=added: r.compute(n) + by.to(r.setting.dtype),
        )
    for cause, evidence, tensor in found:
        exchanged = in_setting(lambda s, t=tensor: with_weights(s, {own[0]: t}))
        yield Hypothesis(cause, f"{own[0]}{evidence}", exchanged)


def _by_token(name: str, x: Tensor) -> Tensor:
    """(B, T, out) or (B, heads, T, D) -> (B · T, out)."""
    x = x.transpose(1, 2).flatten(2) if leaf(name).startswith("attn.") else x
    return x.flatten(0, 1)


def _by_channel(name: str, vector: Tensor, like: Tensor) -> Tensor:
    """A vector of all channels so that it can be added to (B, T, out) or (B, heads, T, D)."""
    return vector.unflatten(0, (like.shape[1], 1, -1)) if like.ndim == 4 else vector


def _of_rows(plain: Tensor, tokens: Tensor, error: Tensor) -> Iterator[Found]:
    """A change of one entry of the embedding table."""
    places = {(int(tokens[n]), int(c)) for n, c in error.nonzero().tolist()}
    if len(places) == 1:
        ((row, column),) = places
        yield from _one_value(plain, (row, column), float(error[tokens == row][0, column]))


def _of_channels(wide: Replay, name: str, parameter: str, error: Tensor) -> Iterator[Tensor]:
    """Changes of a norm's weight: each channel's error is its normalised input times the change."""
    setting = wide.setting
    plain = setting.parameter_named(parameter)
    bias = {p: torch.zeros_like(plain) for p in parameters(setting, name) if p != parameter}
    ones = with_weights(setting, {parameter: torch.ones_like(plain), **bias})
    unit = Replay(wide.observed, ones, wide.starts).compute(name)
    unit = wide.real_tokens(name, unit).flatten(0, 1).double()
    change = (unit * error).sum(0) / unit.pow(2).sum(0).clamp(min=1e-30)
    worst = int(change.abs().argmax())
    single = torch.zeros_like(change)
    single[worst] = change[worst]
    yield single
    yield change


def _of_products(x: Tensor, error: Tensor) -> Iterator[Tensor]:
    """Changes of a matrix (out, in) with error = x · changeᵀ; x (n, in), error (n, out)."""
    shape = error.shape[1], x.shape[1]
    size = error.pow(2).sum(0)
    bad = (size > 64 * size.median()).nonzero().flatten()
    if 0 < len(bad) <= FEW:
        for width in (1, *(group for group in GROUPS if group <= shape[1])):
            change = torch.zeros(shape, dtype=torch.float64)
            groups = x.shape[1] // width
            sums = x[:, : groups * width].unflatten(1, (groups, width)).sum(-1)  # (n, groups)
            power = sums.pow(2).sum(0).clamp(min=1e-30)
            for channel in bad.tolist():
                amounts = sums.T @ error[:, channel] / power
                place = int((amounts.pow(2) * power).argmax())
                change[channel, place * width : (place + 1) * width] = amounts[place]
            yield change
    half = slice(None, None, 2)
    if shape[1] <= WIDEST and len(x[half]) >= 1.5 * shape[1]:
        yield torch.linalg.lstsq(x[half], error[half], rcond=1e-7, driver="gelsd").solution.T


def _named(plain: Tensor, changes: Iterable[Tensor]) -> Iterator[Found]:
    """What each change of a weight would be called."""
    for change in changes:
        yield from _named_one(plain, change)


def _named_one(plain: Tensor, change: Tensor) -> Iterator[Found]:
    places = change.nonzero()
    if len(places) == 1:
        place = tuple(places[0].tolist())
        yield from _one_value(plain, place, float(change[place]))
        return
    changed = plain.double() + change
    if change.ndim == 2 and 1 < len(places) <= FEW * max(GROUPS):
        row = int(places[0, 0])
        columns = change[row].nonzero().flatten()
        amounts = change[row, columns]
        if len(columns) in GROUPS and bool((amounts == amounts[0]).all()):
            where = f"[{row}, {int(columns[0])}:{int(columns[-1]) + 1}]"
            evidence = f"{where} moved by {float(amounts[0]):.3g}"
            yield "quantised group with a wrong zero point", evidence, changed
            return
    x, y = plain.double().flatten(), changed.flatten()
    alike = float((x @ y) / (x.norm() * y.norm()).clamp(min=1e-30))
    cause = "unrelated weights" if abs(alike) < 0.2 else "other weights"
    yield cause, f": solved for; correlation with A's {alike:.2f}", changed


def _one_value(plain: Tensor, place: tuple[int, ...], amount: float) -> Iterator[Found]:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[plain.dtype.itemsize]
    old = plain[place]
    target = float(old) + amount
    bits = old.view(integers) ^ torch.tensor(
        [1 << bit for bit in range(8 * plain.dtype.itemsize - 1)]
    ).to(integers)
    values = bits.view(plain.dtype).double()
    near = (values - target).abs().nan_to_num(nan=float("inf"))
    bit = int(near.argmin())
    where = f"[{','.join(map(str, place))}]"
    if float(near[bit]) < 0.1 * abs(amount):
        changed = plain.clone()
        changed[place] = values[bit].to(plain.dtype)
        evidence = f"{where}: {float(old):.6g} became {float(values[bit]):.6g} (bit {bit})"
        yield "one bit flipped", evidence, changed
    changed = plain.double().clone()
    changed[place] = target
    yield "one value changed", f"{where}: {float(old):.6g} became about {target:.6g}", changed
