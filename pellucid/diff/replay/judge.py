"""The verdict on each observed tensor of one side, held against its operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.causes.search import Cause, Trial, explains_earlier, find_cause
from pellucid.diff.replay.bits import Bits, read_bits
from pellucid.diff.replay.operations import SOURCES, Setting, leaf
from pellucid.diff.replay.replay import Replay, rows_seen
from pellucid.diff.replay.statistics import Measure, beyond, equal, not_judged
from pellucid.diff.sides.side import Side
from pellucid.diff.static import Finding
from pellucid.trace import Trace

Keep = Callable[[str, Tensor, Tensor], None]  # name, R, what was observed

MOST_SEARCHED = 64  # tensors whose bits are searched for a cause before they are judged
# R is not computed where nothing differs: it costs more than all the rest.
_IDENTICAL = replace(equal(), error_a=float("nan"), error_b=float("nan"))


class Judge:
    """One side's observations, each held against its operation on that side's own inputs.

    setting   side A's arithmetic
    declared  that of this side, where it says so: its dtype, its dialect, and weights declared to
              differ (quantised, rounded); what these explain reads "explained"
    """

    def __init__(
        self,
        side: Side,
        observed: Trace,
        setting: Setting,
        padding: Tensor | None,
        tokens: Tensor,
        *,
        declared: Setting | None = None,
        keep: Keep | None = None,
        static: Sequence[Finding] = (),
    ) -> None:
        self.keep, self.static = keep, static
        self.side, self.padding, self.tokens = side, padding, tokens
        self.observed = dict(observed)
        held = {"tokens": tokens, **self.observed}
        self.own = Replay(held, setting, padding)
        self.wide = Replay(held, setting.wide(), padding)
        self.declared = self.declared_wide = None
        if declared is not None:
            self.declared = Replay(held, declared, padding)
            self.declared_wide = Replay(held, declared.wide(), padding)
        self._shift: Tensor | None = None
        self._parted = False  # whether a computed tensor has diverged so far
        self._misshapen: set[str] = set()  # tensors with fewer keys than there are tokens
        self._bits: dict[str, Bits] = {}  # of tensors that only their bits accuse
        self._causes: dict[str, tuple[Cause | None, tuple[Trial, ...]]] = {}

    def judge(self, name: str) -> Measure:
        """The verdict on one observed tensor.

        ValueError, in one line, where the recorded shapes do not fit each other.
        """
        seen = self.observed[name]
        try:
            source = leaf(name) in SOURCES
            found = (self._judge_source if source else self._judge_computed)(name, seen)
            self._parted |= not source and found.verdict == "diverged"
            return found
        except KeyError as error:
            return not_judged(f"needs {error.args[0]}")
        except (RuntimeError, IndexError) as error:
            wrong = self._misshapen & set(self._inputs(name))
            if wrong:
                self._misshapen.add(name)
                return not_judged(f"computed from {min(wrong)}, which has another shape")
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"{self.side.label}: {name}, of shape {tuple(seen.shape)}, does not fit the tensors"
                f" it is computed from: {why}"
            ) from error

    def _judge_computed(self, name: str, seen: Tensor) -> Measure:
        near = rows_seen(name, self.own.compute(name), seen)
        sinks = self.own.setting.config.sinks
        try:
            _demand_keys(self.side.label, name, near, seen, sinks)
        except ValueError:
            if not self._parted:
                raise
            self._misshapen.add(name)  # positions went wrong, and with them slots of the cache
            return not_judged("more keys than tokens, after an earlier divergence")
        if "S" in graph.dims(name) and (
            near.shape != seen.shape or self._misshapen & set(self._inputs(name))
        ):
            self._misshapen.add(name)
        if torch.equal(near, seen) and bool(seen.isfinite().all()):
            if self.keep is not None:
                self.keep(name, near, seen)
            return _IDENTICAL
        exact = rows_seen(name, self.wide.compute(name), seen)
        result = self._held(self.own, name, near, exact, seen)
        if self.keep is not None and exact.shape == seen.shape:
            self.keep(name, exact, seen)
        if result.verdict == "identical":
            return _IDENTICAL
        if result.verdict != "diverged" or self.declared is None:
            return result
        assert self.declared_wide is not None, "made together with `declared`"
        accused, caused = self._bits.pop(name, None), self._causes.pop(name, None)
        exact, near = (rows_seen(name, r.compute(name), seen) for r in self._declared_two())
        other = self._held(self.declared, name, near, exact, seen, seen.dtype)
        if other.verdict == "diverged":
            if name in self._bits:
                return other
            if accused is not None and caused is not None:
                self._bits[name], self._causes[name] = accused, caused
            return result
        note = _declared(self.own.setting, self.declared.setting)
        return replace(result, verdict="explained", ratio=other.ratio, where="", note=note)

    def _inputs(self, name: str) -> tuple[str, ...]:
        return graph.inputs(self.own.setting.config, name)

    def _declared_two(self) -> tuple[Replay, Replay]:
        assert self.declared is not None and self.declared_wide is not None, "made together"
        return self.declared_wide, self.declared

    def _held(
        self,
        replay: Replay,
        name: str,
        near: Tensor,
        exact: Tensor,
        seen: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Measure:
        """The verdict by the sizes of the errors, and where these are rounding's, by the bits.

        Where A itself rounds on the way, bits accuse only together with a cause.
        """
        result = replay.hold(name, exact, near, seen, dtype)
        if result.verdict != "within-rounding":
            return result
        bits = None if self.side.coarse else read_bits(replay, name, near, exact, seen)
        if bits is None:
            return result
        found = replace(result, verdict="diverged", ratio=bits.excess, note=bits.note())
        found = replace(found, where=bits.where)
        self._bits[name] = bits
        if not bits.alone:
            if len(self._causes) >= MOST_SEARCHED:
                del self._bits[name]
                return result
            self._causes[name] = self.cause(name, found, self.static)
            if self._causes[name][0] is None:
                del self._bits[name]
                return result
        return found

    def _judge_source(self, name: str, seen: Tensor) -> Measure:
        """Tokens, positions and mask: exact, but for what cannot matter."""
        what, step = leaf(name), names.step_of(name)
        if what == "tokens":
            same = step > 0 or torch.equal(torch.atleast_2d(seen), self.tokens)
            return _exact(same, "other tokens than the run was asked for")
        positions, mask = self.own.expected_places(step)
        if what == "mask":
            return self._judge_mask(name, seen, mask)
        shift = (seen - positions).to(torch.int64)
        if not shift.any():
            return equal()
        real = self._real_tokens(step, shift.shape)
        if (
            not graph.has(self.own.setting.config, "pos_embed")
            and shift.ndim
            and _uniform(shift, real)
        ):
            first = shift.reshape(-1, shift.shape[-1])[:, -1]
            if self._shift is None and step == 0:
                self._shift = first
            if self._shift is not None and torch.equal(first, self._shift):
                note = "all positions shifted alike: RoPE sees only differences"
                return replace(equal(note), verdict="within-rounding")
        place = int((shift != 0).reshape(-1, shift.shape[-1]).any(0).nonzero()[0])
        return beyond(f"token {place}: off by {int(shift[..., place].reshape(-1)[0]):+d}")

    def _judge_mask(self, name: str, seen: Tensor, mask: Tensor) -> Measure:
        try:
            wrong = seen.to(torch.bool) != mask
        except RuntimeError:
            note = f"shape {tuple(seen.shape)}, expected {tuple(mask.shape)}"
            return beyond(note)
        if self.keep is not None:
            self.keep(name, mask, seen)
        if self.padding is not None and wrong.ndim == 4:
            rows = torch.arange(mask.shape[-2]) + mask.shape[-1] - mask.shape[-2]
            real = rows[None] >= self.padding[:, None]  # (B, T): padding rows are ignored
            wrong = wrong & real[:, None, :, None]
        if not wrong.any():
            return equal()
        query, key = wrong.nonzero()[0][-2:].tolist()
        may = "may" if bool(seen.expand(wrong.shape)[tuple(wrong.nonzero()[0])]) else "may not"
        return beyond(f"token {query} {may} look at token {key}")

    def _real_tokens(self, step: int, shape: torch.Size) -> Tensor:
        if self.padding is None or len(shape) < 2 or step:
            return torch.ones(shape, dtype=torch.bool)
        return torch.arange(shape[-1])[None] >= self.padding[:, None]

    def cause(
        self, name: str, result: Measure, static: Sequence[Finding]
    ) -> tuple[Cause | None, tuple[Trial, ...]]:
        """What reproduces the diverged tensor, or None; and all that was tried."""
        if name in self._causes:
            return self._causes[name]
        replay, bits = self._arithmetic, self._bits.get(name)
        if bits is not None:
            replay = Replay(replay.observed, bits.setting, replay.starts)
        return find_cause(replay, name, self.observed[name], result, self.side, static, bits)

    @property
    def _arithmetic(self) -> Replay:
        return self.declared or self.own

    def caused_too(self, name: str, result: Measure, cause: Cause) -> tuple[Measure, Cause] | None:
        """The divergence of a tensor within rounding which the cause of a later one explains."""
        if result.verdict != "within-rounding":
            return None
        evidence = explains_earlier(self._arithmetic, name, self.observed[name], cause)
        if not evidence:
            return None
        note = "within rounding by its size, but the cause of a later layer's fits it"
        return replace(result, verdict="diverged", note=note), replace(cause, evidence=evidence)


def _demand_keys(label: str, name: str, near: Tensor, seen: Tensor, sinks: bool) -> None:
    """ValueError where scores or a pattern look at more keys than there are tokens.

    With `sinks` one key more is no other width: the sink's column, which was left in. Fewer keys in
    a decoding step are a fault: a token is lost. In the first pass they are of another run.
    """
    if "S" not in graph.dims(name) or near.shape == seen.shape or near.ndim != seen.ndim:
        return
    axis = graph.dims(name).index("S")
    more = seen.shape[axis] - near.shape[axis]
    if more > sinks or (more < 0 and not names.step_of(name)):
        raise ValueError(
            f"{label}: {name} has {seen.shape[axis]} keys, there are {near.shape[axis]} tokens so "
            "far: record it without the unused part of a static cache"
        )


def _declared(setting: Setting, other: Setting) -> str:
    if (other.dtype, other.dialect) == (setting.dtype, setting.dialect):
        return "with the weights it is known to have"
    return f"{str(other.dtype).removeprefix('torch.')} in the dialect {other.dialect.name}"


def _uniform(shift: Tensor, real: Tensor) -> bool:
    rows = shift.reshape(-1, shift.shape[-1])
    kept = real.reshape(-1, shift.shape[-1])
    return all(len(set(row[keep].tolist())) == 1 for row, keep in zip(rows, kept, strict=True))


def _exact(same: bool, note: str) -> Measure:
    return equal() if same else beyond(note)
