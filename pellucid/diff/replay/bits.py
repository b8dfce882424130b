"""Bits as evidence: what 16-bit values say about a fault that is smaller than one rounding.

A right implementation in bfloat16 or float16 has nearly all of A's bits: they differ only where a
sum in another order falls on the other side of a rounding, and how often that happens is measured
(A's operation with its sums in other orders). A fault of any size moves more values over such an
edge. Two questions are asked of a tensor that is within rounding by its size:

    without a hypothesis   how many values are neither what A's arithmetic gives nor R rounded once?
    with one               of the values for which it and A's arithmetic give different bits, which
                           of the two has B?

Counts are judged by the binomial's tail, P(X >= k) <= exp(-n KL(k/n || p)) (Hoeffding 1963): the
chance that a right implementation has such a count must be below `CHANCE` for the whole tensor. In
the first question p is `SAFETY` times the share that other orders make (of the tensor, and of each
token, head and channel), in the second one half. Where A rounds more than once on the way, another
order of roundings is as good and gives many other bits: then only a hypothesis can tell a fault,
but for a count so small (`SELDOM`) that no order of roundings makes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pellucid import graph
from pellucid.diff.replay.operations import SOURCES, Setting, apply, inner_length, leaf
from pellucid.diff.replay.replay import ROUNDED_ONCE, Replay
from pellucid.diff.replay.statistics import MASKED, roundoff, slice_name

CHANCE = 1e-9  # that a right implementation is told as wrong at one tensor
SAFETY = 4.0  # by how much an unknown kernel may differ more often than the orders tried
ORDERS = 3  # other orders in which A's sums are added up
STEADY = 512  # values of the whole tensor's share that steady that of a slice
OFTEN = 8.0  # times the share of other orders: A's own bits are not R's, so it rounds on the way
SELDOM = 0.1  # share of the bits in which A's and R's differ; another order differs in more
_GIVEN = ("tokens", "positions", "mask", "window_mask", "rope.cos", "rope.sin", "query_growth")
_FAIR = 0.5


@dataclass(frozen=True, kw_only=True)
class Bits:
    """What the bits of a tensor say, before any hypothesis.

    own       (…) where B has the bits of A's arithmetic, or of R rounded once
    counted   (…) where there is something to count: finite, not masked, no padding
    off       how many of `of` counted values have other bits, in the worst slice `where`
    excess    the surprise over what is allowed; above 1 no right implementation has these bits
    alone     whether this is a fault without a hypothesis: A's arithmetic rounds once, or B's
              bits differ in fewer places than any other order of roundings would
    setting   A's arithmetic in the style B has: its bias added before or after rounding
    """

    own: Tensor
    counted: Tensor
    off: int
    of: int
    where: str
    excess: float
    alone: bool
    setting: Setting

    def note(self) -> str:
        """What was counted, as a reader needs it."""
        where = f" of {self.where}" if self.where else ""
        return f"bits: {self.off:,} of {self.of:,} values{where} are not those of A's arithmetic"


@dataclass(frozen=True, kw_only=True)
class Styled(Setting):
    """A's arithmetic with sums in another order, or a bias added to a product rounded before.

    order  seed of a permutation of what is added up; 0 leaves it as it is
    """

    order: int = 0
    late_bias: bool = False

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out), the terms in the other order."""
        weight, bias = (self.name(f"{name}.{kind}") for kind in ("weight", "bias"))
        found, plain = self.weights(bias), self.weights
        order = self.terms(x.shape[-1], x.device)

        def moved(asked: str) -> Tensor | None:
            if asked == bias and self.late_bias:
                return None
            held = plain(asked)
            return held[:, order] if asked == weight and held is not None else held

        y = Setting.linear(_setting(self, weights=moved), name, x[..., order])
        return y + found.to(self.dtype) if self.late_bias and found is not None else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        """A norm of x (…, C), its channels in the other order."""
        order, plain = self.terms(x.shape[-1], x.device), self.weights

        def moved(asked: str) -> Tensor | None:
            held = plain(asked)
            return None if held is None else held[order]

        y = Setting.norm(_setting(self, weights=moved), name, x[..., order])
        return y[..., order.argsort()]

    def terms(self, count: int, device: torch.device) -> Tensor:
        """(count) the order in which so many terms are added up."""
        if not self.order:
            return torch.arange(count, device=device)
        random = torch.Generator().manual_seed(self.order)
        return torch.randperm(count, generator=random).to(device)


def _setting(s: Setting, **changed: Any) -> Setting:
    """The plain setting that a styled one was made of, with some fields changed."""
    own: dict[str, Any] = {field.name: getattr(s, field.name) for field in fields(Setting)}
    return Setting(**(own | changed))


def read_bits(replay: Replay, name: str, near: Tensor, exact: Tensor, seen: Tensor) -> Bits | None:
    """What the bits of `seen` say, or None: nothing, or what any right implementation may have.

    near, exact  the tensor by A's arithmetic and by the wider one (R)
    """
    if not _comparable(replay, name, near, seen):
        return None
    seen = seen[..., : near.shape[-1]]
    if seen.shape != near.shape or exact.shape != near.shape:
        return None
    exact, seen = (replay.real_tokens(name, x) for x in (exact, seen))
    counted = exact.isfinite() & (exact > MASKED) & _first_of_alike(exact, seen, graph.dims(name))
    rounded = exact.to(replay.setting.dtype).to(seen.dtype)
    best: Bits | None = None
    for setting in _styles(replay, name):
        plain = setting is replay.setting
        mine = near if plain else _computed(replay, setting, name)
        mine = replay.real_tokens(name, mine).to(seen.dtype)
        own = (seen == mine) | (seen == rounded) | ~counted
        if bool(own.all()):
            return None
        found = _counted(replay, name, setting, own, counted, mine, rounded)
        if found.excess <= 1:
            return None
        if best is None or int(found.own.sum()) > int(best.own.sum()):
            best = found
    if best is None or _as_if_wider(replay, name, seen, best):
        return None
    return best


def _first_of_alike(exact: Tensor, seen: Tensor, dims: tuple[str, ...]) -> Tensor:
    """(…) False where a token or key has another's R and values again: the same roundings.

    Padding does, and so does a text that repeats its tokens.
    """
    kept = torch.ones(exact.shape, dtype=torch.bool, device=exact.device)
    random = torch.Generator().manual_seed(0)
    for letter in dims if len(dims) == exact.ndim else ():
        if letter not in ("T", "S"):
            continue
        rest = [other for other, name in enumerate(dims) if name not in ("B", letter)]
        weights = [exact.shape[other] if other in rest else 1 for other in range(exact.ndim)]
        factors = torch.randn(weights, generator=random, dtype=torch.float64).to(exact.device)
        marks = ((exact.double() + seen.double() * math.pi) * factors).sum(rest)
        _, which = marks.flatten().unique(return_inverse=True)
        places = torch.arange(len(which), device=exact.device)
        first = torch.full_like(which, len(which)).scatter_reduce(0, which, places, "amin")
        shape = [n if dims[a] in ("B", letter) else 1 for a, n in enumerate(exact.shape)]
        kept &= (first[which] == places).reshape(shape)
    return kept


def _comparable(replay: Replay, name: str, near: Tensor, seen: Tensor) -> bool:
    """Whether tensor and inputs are there in the run's dtype, one of 16 bits."""
    dtype, what = replay.setting.dtype, leaf(name)
    if dtype.itemsize != 2 or what in SOURCES or not near.is_floating_point():
        return False
    if near.dtype != seen.dtype or near.ndim != seen.ndim:
        return False
    if near.dtype != dtype and not torch.equal(near.to(dtype).to(near.dtype), near):
        return False
    for source in graph.inputs(replay.setting.config, name):
        given = leaf(source).removeprefix("second_") in _GIVEN
        held = replay.observed.get(source)
        if not given and (held is None or held.dtype != dtype):
            return False
    return True


def _styles(replay: Replay, name: str) -> Iterator[Setting]:
    """A's arithmetic; a bias added after the product was rounded; the other way to scale scores.

    Scores are rounded before they are scaled: of a thousand mantissas one then is so near a tie
    that a product with 1/√D and a quotient by √D round it to different sides.
    """
    s, module = replay.setting, graph.module_of(replay.setting.config, name)
    yield s
    if leaf(name) == "attn.scores" and not s.config.score_scale:
        other = "divide" if s.dialect.scale == "multiply" else "multiply"
        yield replace(s, dialect=replace(s.dialect, scale=other))
    if module and not leaf(name).endswith("norm") and s.weights(f"{module}.bias") is not None:
        yield Styled(**{f.name: getattr(s, f.name) for f in fields(Setting)}, late_bias=True)


def _computed(replay: Replay, setting: Setting, name: str) -> Tensor:
    return Replay(replay.observed, setting, replay.starts).compute(name)


def _counted(
    replay: Replay,
    name: str,
    setting: Setting,
    own: Tensor,
    counted: Tensor,
    mine: Tensor,
    rounded: Tensor,
) -> Bits:
    """The worst slice by its count; sums in other orders are computed only where that is much."""
    unit = roundoff(replay.setting.dtype)
    floor = 2.0**-22 / unit  # elementary functions are off by a few roundoffs of float32
    terms = inner_length(replay.setting, name, replay.arguments(name))
    rough = torch.tensor(floor + SAFETY * 2.0**-25 * terms**0.5 / unit).clamp(max=0.25)
    dims = graph.dims(name)

    def bits(excess: float, off: int, of: int, where: str, alone: bool) -> Bits:
        return Bits(
            own=own, counted=counted, off=off, of=of, where=where, excess=excess, alone=alone,
            setting=setting,
        )  # fmt: skip

    worst = _worst(~own, counted, dims, lambda count, of: rough.expand(of.shape))
    if worst[0] <= 1:
        return bits(*worst, alone=True)
    others = [
        replay.real_tokens(name, other).to(mine.dtype)
        for other in _reordered(replay, name, setting)
    ]
    marks = [(x != mine) & (x != rounded) & counted for x in others]
    total = float(sum(int(mark.sum()) for mark in marks))
    tries = max(1, len(marks))
    share = total / (tries * max(1, int(counted.sum())))

    def allowed(axis: int | None, of: Tensor) -> Tensor:
        count = torch.zeros_like(of)
        for mark in marks:
            count += _along(mark, axis)
        steady = (count + share * STEADY) / (tries * of + STEADY)
        return (SAFETY * steady.clamp(min=floor / SAFETY)).clamp(max=0.5)

    worst = _worst(~own, counted, dims, allowed)
    moved = sum(float(((x != mine) & counted).sum()) for x in others) / tries
    on_the_way = float(((mine != rounded) & counted).sum())
    limit = OFTEN * (moved + floor * float(counted.sum()) + 1)
    # Another tanh moves a few bits of a GELU that rounds after each operation, as few as a fault.
    seldom = float((~own & counted).sum()) < SELDOM * on_the_way and leaf(name) != "mlp.act"
    alone = on_the_way <= limit or seldom
    return bits(*worst, alone=alone and leaf(name) not in ROUNDED_ONCE)


def _reordered(replay: Replay, name: str, setting: Setting) -> Iterator[Tensor]:
    """The tensor by A's arithmetic with what it adds up in other orders."""
    what = leaf(name)
    late = isinstance(setting, Styled) and setting.late_bias
    plain = {field.name: getattr(setting, field.name) for field in fields(Setting)}
    if what == "attn.pattern" and replay.setting.config.sinks:
        return
    for seed in range(1, ORDERS + 1):
        styled = Styled(**plain, order=seed, late_bias=late)
        values = replay.arguments(name)
        if what == "attn.scores":
            order = styled.terms(values[0].shape[-1], values[0].device)
            values = tuple(x[..., order] for x in values)
        elif what == "attn.z":
            pattern, v = values
            order = styled.terms(v.shape[-2], v.device)
            values = (pattern[..., order], v[..., order, :])
        elif what == "attn.pattern":
            order = styled.terms(values[0].shape[-1], values[0].device)
            yield apply(setting, name, (values[0][..., order],))[..., order.argsort()]
            continue
        yield apply(styled, name, values)


def _worst(off: Tensor, counted: Tensor, dims: tuple[str, ...], share) -> tuple:
    """(excess, off, of, where) of the whole tensor or the slice whose count surprises most."""
    sizes = [off.shape[axis] for axis, letter in enumerate(dims) if off.shape[axis] > 1]
    limit = math.log((1 + sum(sizes)) / CHANCE)
    found = (0.0, 0, 0, "")
    for axis in (None, *range(off.ndim)):
        if axis is not None and (off.shape[axis] == 1 or len(dims) != off.ndim):
            continue
        count, of = _along(off & counted, axis), _along(counted, axis)
        surprise = unlikeliness(count, of, share(axis, of)) / limit
        place = int(surprise.argmax())
        if float(surprise[place]) > found[0]:
            where = "" if axis is None else f"{slice_name(dims[axis])} {place}"
            found = float(surprise[place]), int(count[place]), int(of[place]), where
    return found


def _along(marks: Tensor, axis: int | None) -> Tensor:
    """How many are marked in each slice of an axis, or (1) in all."""
    if axis is None:
        return marks.sum().double().reshape(1)
    return marks.sum([other for other in range(marks.ndim) if other != axis]).double()


def unlikeliness(count: Tensor, of: Tensor, share: Tensor) -> Tensor:
    """-ln of a bound on the chance of `count` or more among `of`, each with the chance `share`."""
    of = of.clamp(min=1)
    seen, share = count / of, share.double().clamp(1e-12, 1 - 1e-12)
    there = torch.xlogy(seen, seen / share)
    absent = torch.xlogy(1 - seen, (1 - seen) / (1 - share))
    return torch.where(seen > share, of * (there + absent), 0.0)


def _as_if_wider(replay: Replay, name: str, seen: Tensor, found: Bits) -> bool:
    """Whether B has the bits of inputs that were written down rounded but used as they were."""
    inner = graph.inputs(replay.setting.config, name)
    kept = {n: x for n, x in replay.observed.items() if n not in inner or leaf(n) in SOURCES}
    try:
        wider = Replay(kept, replay.setting.wide(), replay.starts).compute(name)
    except KeyError:
        return False
    rounded = replay.real_tokens(name, wider).to(replay.setting.dtype).to(seen.dtype)
    if rounded.shape != seen.shape:
        return False
    off = float(((seen != rounded) & found.counted).sum())
    return off < 0.1 * float((~found.own & found.counted).sum())


def telling(found: Bits, seen: Tensor, near: Tensor, exact: Tensor) -> tuple[int, int, int]:
    """(like the hypothesis, like A, unlike both) among values where the two give other bits.

    near, exact  the tensor by the hypothesis, in the run's arithmetic and in the wider one
    """
    rounded = exact.to(found.setting.dtype).to(seen.dtype)
    like = (seen == near.to(seen.dtype)) | (seen == rounded)
    gained = int((like & ~found.own & found.counted).sum())
    lost = int((~like & found.own & found.counted).sum())
    return gained, lost, int((~like & ~found.own & found.counted).sum())


def tells(gained: int, lost: int, tried: int = 1) -> bool:
    """Whether B has the bits of a hypothesis, not A's, beyond what a coin would say."""
    count = torch.tensor([float(gained)]), torch.tensor([float(gained + lost)])
    limit = math.log(max(1, tried) / CHANCE)
    return float(unlikeliness(*count, torch.tensor([_FAIR]))) > limit
