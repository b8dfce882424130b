"""Changes of weights that nothing may excuse, quantisations that must be, and how they are read.

`measure` holds each change and each format on each subject against the weight stage. A change that
reads as explained is excused, the one thing that must not happen; a control that does not is
accused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pellucid.diff.selftest.quantisers import FORMATS, by_rows, with_offset
from pellucid.diff.selftest.subjects import Subject
from pellucid.diff.sides.side import Side
from pellucid.diff.static import weight_findings

Weights = dict[str, Tensor]
DTYPES = ("float32", "bfloat16")
_ONE, _SQUARE, _NORM = "mlp.up_proj.weight", "attn.o_proj.weight", "mlp_norm.weight"


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing done to float32 weights; `causes` are the names a reader would understand."""

    name: str
    make: Callable[[Weights, torch.Generator], None]
    causes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the weight stage read one change or control.

    differs  whether anything is left of it in this dtype
    """

    name: str
    subject: str
    dtype: str
    control: bool
    differs: bool
    verdict: str
    found: tuple[str, ...]
    expected: tuple[str, ...]

    @property
    def excused(self) -> bool:
        """A change that reads as explained."""
        return not self.control and self.differs and self.verdict != "diverged"

    @property
    def accused(self) -> bool:
        """A control that reads as diverged."""
        return self.control and self.verdict == "diverged"

    @property
    def named(self) -> bool:
        """The change has one of the right names."""
        return not self.differs or bool(set(self.found) & set(self.expected))


def _last(weights: Weights, stem: str) -> str:
    return [name for name in weights if name.endswith(stem)][-1]


def _one(change: Callable[[Tensor, torch.Generator], Tensor], stem: str = _ONE):
    """A change of one tensor, of the last block."""

    def make(weights: Weights, random: torch.Generator) -> None:
        name = _last(weights, stem)
        weights[name] = change(weights[name], random)

    return make


def _all(change: Callable[[Tensor, torch.Generator], Tensor], within: str = ""):
    """A change of every matrix (whose name has `within`)."""

    def make(weights: Weights, random: torch.Generator) -> None:
        for name, x in weights.items():
            if x.ndim == 2 and within in name:
                weights[name] = change(x, random)

    return make


def _noise(size: float, relative: bool = True, even: bool = False):
    def change(x: Tensor, random: torch.Generator) -> Tensor:
        drawn = torch.randn(x.shape, generator=random)
        if even:
            drawn = (torch.rand(x.shape, generator=random) - 0.5) * 12**0.5
        return x * (1 + size * drawn) if relative else x + size * x.pow(2).mean().sqrt() * drawn

    return change


def _adapter(rank: int, size: float):
    def change(x: Tensor, random: torch.Generator) -> Tensor:
        down = torch.randn(rank, x.shape[1], generator=random)
        made = torch.randn(len(x), rank, generator=random) @ down
        return x + made * (size * x.norm() / made.norm())

    return change


def _part(dim: int, first: int, count: int, factor: float):
    def change(x: Tensor, random: torch.Generator) -> Tensor:
        y = x.clone()
        y.narrow(dim, first, count).mul_(factor)
        return y

    return change


def _lines(dim: int):
    """Each row (0) or column (1) by a factor of its own."""

    def change(x: Tensor, random: torch.Generator) -> Tensor:
        shape = (len(x), 1) if dim == 0 else (1, x.shape[1])
        return x * (1 + 0.05 * torch.randn(shape, generator=random))

    return change


def _then(*changes: Callable[[Tensor, torch.Generator], Tensor]):
    def change(x: Tensor, random: torch.Generator) -> Tensor:
        for one in changes:
            x = one(x, random)
        return x

    return change


def _doubled_scale(x: Tensor, random: torch.Generator) -> Tensor:
    y = by_rows(x)
    y[5] *= 2
    return y


def _moved_level(x: Tensor, random: torch.Generator) -> Tensor:
    y = by_rows(x)
    y[5, 7] += x[5].abs().amax() / 127 * (1 if y[5, 7] < 0 else -1)
    return y


def _cut_levels(x: Tensor, random: torch.Generator) -> Tensor:
    step = x.abs().amax(1, keepdim=True) / 127
    return (x / step).floor() * step


def _bfloat16_but_one(x: Tensor, random: torch.Generator) -> Tensor:
    y = x.bfloat16().float()
    y[2, 3] *= 1.25
    return y


def _adam_step(weights: Weights, random: torch.Generator) -> None:
    for name, x in weights.items():
        sign = torch.randn(x.shape, generator=random).sign()
        weights[name] = x + 1e-3 * x.pow(2).mean().sqrt() * sign


def _trained(weights: Weights, random: torch.Generator) -> None:
    for name, x in weights.items():
        size = 0.01 * float(1 + torch.rand((), generator=random))
        weights[name] = x + size * x.pow(2).mean().sqrt() * torch.randn(x.shape, generator=random)


def _last_block(weights: Weights, random: torch.Generator) -> None:
    layer = _last(weights, _ONE).split(".")[1]
    for name, x in weights.items():
        if name.startswith(f"layers.{layer}.") and x.ndim == 2:
            weights[name] = _noise(0.01, relative=False)(x, random)


_SCALED, _LOOSE = ("scaled weights",), ("noise", "other weights")
_TRAINED = ("another checkpoint of the same training",)
_ELSEWHERE = ("quantised from other weights", "quantised group with wrong values")
_CHANGES: tuple[tuple[str, Callable[..., None], tuple[str, ...]], ...] = (
    ("one weight times 1.05", _one(lambda x, r: x * 1.05), _SCALED),
    ("one weight times 1.01", _one(lambda x, r: x * 1.01), _SCALED),
    ("one weight times 1.000001", _one(lambda x, r: x * 1.000001), (*_SCALED, *_LOOSE)),
    ("every matrix times 1.05", _all(lambda x, r: x * 1.05), _SCALED),
    ("one weight negated", _one(lambda x, r: -x), _SCALED),
    ("noise of 5 % on one weight", _one(_noise(0.05)), _LOOSE),
    ("noise of 1 % on one weight", _one(_noise(0.01)), _LOOSE),
    ("noise of 0.1 % on one weight", _one(_noise(1e-3)), _LOOSE),
    ("noise of 0.0001 % on one weight", _one(_noise(1e-6)), _LOOSE),
    ("uniform noise of 1 %", _one(_noise(0.01, even=True)), _LOOSE),
    ("noise of 1 % of the mean size", _one(_noise(0.01, relative=False)), _LOOSE),
    ("noise of 5 % on every matrix", _all(_noise(0.05)), _TRAINED),
    ("noise of 0.1 % on every matrix", _all(_noise(1e-3)), (*_TRAINED, *_LOOSE)),
    (
        "one weight shifted",
        _one(lambda x, r: x + 0.02 * x.abs().mean()),
        ("shifted weights", *_LOOSE),
    ),
    ("eight columns times 1.01", _one(_part(1, 0, 8, 1.01)), ("scaled columns", "other columns")),
    ("eight rows times 1.01", _one(_part(0, 3, 8, 1.01)), ("scaled rows", "other rows")),
    ("each row by its own factor", _one(_lines(0)), ("scaled rows", "other weights", "noise")),
    (
        "each column by its own factor",
        _one(_lines(1)),
        ("scaled columns", "other weights", "noise"),
    ),
    ("a merged adapter of rank 1", _one(_adapter(1, 0.05), _SQUARE), ("low-rank change", *_LOOSE)),
    ("a merged adapter of rank 8", _one(_adapter(8, 0.05), _SQUARE), ("low-rank change", *_LOOSE)),
    ("adapters on all of attention", _all(_adapter(4, 0.02), "attn"), ("low-rank change", *_LOOSE)),
    ("another checkpoint", _trained, _TRAINED),
    ("one more step of Adam", _adam_step, (*_TRAINED, *_LOOSE)),
    ("the last block trained further", _last_block, _LOOSE),
    (
        "int8, then times 1.05",
        _one(_then(lambda x, r: by_rows(x), lambda x, r: x * 1.05)),
        (*_ELSEWHERE, "quantised and scaled"),
    ),
    (
        "int4, then times 1.02",
        _one(_then(lambda x, r: with_offset(4, 16)(x), lambda x, r: x * 1.02)),
        (*_ELSEWHERE, "quantised and scaled"),
    ),
    (
        "trained by 1 %, then int8",
        _one(_then(_noise(0.01, relative=False), lambda x, r: by_rows(x))),
        _ELSEWHERE,
    ),
    (
        "an adapter, then int4",
        _one(_then(_adapter(2, 0.1), lambda x, r: with_offset(4, 16)(x))),
        _ELSEWHERE,
    ),
    (
        "int8 with one doubled scale",
        _one(_doubled_scale),
        ("quantised group with a wrong scale", "quantised group with wrong values"),
    ),
    ("int8 with one level moved", _one(_moved_level), ("quantised group with wrong values",)),
    ("int8 cut off, not rounded", _one(_cut_levels), _ELSEWHERE),
    ("bfloat16 but for one value", _one(_bfloat16_but_one), ("one value changed",)),
    (
        "rounded to four decimals",
        _one(lambda x, r: (x * 1e4).round() / 1e4),
        ("rounded to decimals", *_LOOSE),
    ),
    ("rows in another order", _one(lambda x, r: x.roll(1, 0)), ("reordered rows",)),
    ("a norm's weight times 1.01", _one(lambda x, r: x * 1.01, _NORM), _SCALED),
    ("noise of 1 % on a norm's weight", _one(_noise(0.01), _NORM), (*_LOOSE, "other values")),
    (
        "a tenth of the values zero",
        _one(lambda x, r: x * (torch.rand(x.shape, generator=r) > 0.1)),
        _LOOSE,
    ),
)
CHANGES = tuple(Change(name=name, make=make, causes=causes) for name, make, causes in _CHANGES)


def control(name: str) -> Change:
    """Every matrix whose columns the format can hold, through one of `FORMATS`."""
    whole = 256 if name.endswith("_K") else 32  # of K-quants a shorter row is one block

    def make(weights: Weights, random: torch.Generator) -> None:
        for full, x in weights.items():
            if x.ndim != 2 or x.shape[1] % 32 or "proj" not in full:
                continue
            if x.shape[1] % min(whole, x.shape[1]) == 0:
                weights[full] = FORMATS[name](x)

    causes = ("rounded weights",) if name in ("bfloat16", "float16") else ("quantised weights",)
    return Change(name=name, make=make, causes=causes)


CONTROLS = tuple(control(name) for name in FORMATS)


def measure(
    subjects: Sequence[Subject],
    dtypes: Sequence[str] = DTYPES,
    changes: Sequence[Change] = CHANGES,
    controls: Sequence[Change] = CONTROLS,
) -> Iterator[Outcome]:
    """How the weight stage reads every change and control on every subject, in each dtype."""
    for subject in subjects:
        for dtype in dtypes:
            for change in (*changes, *controls):
                yield read(subject, dtype, change, change in controls)


def read(subject: Subject, dtype: str, change: Change, is_control: bool = False) -> Outcome:
    """One change on one subject: made in float32 on weights of the dtype, stored in it again."""
    held = getattr(torch, dtype)
    mine = {name: x.to(held) for name, x in subject.weights.items()}
    changed = {name: x.float() for name, x in mine.items()}
    change.make(changed, torch.Generator().manual_seed(1))
    theirs = {name: x.to(held) for name, x in changed.items()}
    a = Side(label="A", dtype=held, config=subject.config, weights=mine)
    b = replace(a, label="B", weights=theirs)
    found = weight_findings(a, b)
    wrong = [finding for finding in found if finding.kind == "fault"]
    verdict = "diverged" if wrong else "explained" if found else "identical"
    return Outcome(
        name=change.name,
        subject=subject.name,
        dtype=dtype,
        control=is_control,
        differs=any(not torch.equal(mine[name], theirs[name]) for name in mine),
        verdict=verdict,
        found=tuple(dict.fromkeys(finding.cause for finding in (wrong or found))),
        expected=change.causes,
    )
