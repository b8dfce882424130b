"""Compute a named tensor again from what a side observed before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pellucid import graph, names
from pellucid.diff.replay.operations import Setting, apply, inner_length, leaf
from pellucid.diff.replay.statistics import (
    MASKED,
    Measure,
    beyond,
    equal,
    explained_error,
    measure,
    roundoff,
)
from pellucid.graph import inputs
from pellucid.models.attention import positions_and_mask

# Read over all steps so far when a KV cache is on: what an earlier pass put there.
_CACHED = {"attn.scores": 1, "attn.z": 1}  # operation -> which input


# Sums and products of single values, and how many roundings they may stand for: a fused kernel
# keeps an addend in float32 that is written down rounded.
ROUNDED_ONCE = ("resid_pre", "resid_mid", "resid_post", "mlp.hidden")
BOUND = 3.0


class Replay:
    """One side's observations seen through one arithmetic.

    `value` of an observed name is the observation; of any other it is computed from the nearest
    observed tensors before it. `compute` always computes, from the observed inputs.
    """

    def __init__(
        self, observed: Mapping[str, Tensor], setting: Setting, starts: Tensor | None = None
    ) -> None:
        self.observed, self.setting, self.starts = observed, setting, starts
        self._derived: dict[str, Tensor] = {}

    def compute(self, name: str) -> Tensor:
        """The named tensor by its operation. KeyError where an input cannot be had."""
        return apply(self.setting, name, self.arguments(name))

    def hold(
        self,
        name: str,
        exact: Tensor,
        near: Tensor,
        seen: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Measure:
        """The verdict on `seen`, with R and this arithmetic's own value at hand.

        `dtype` is what the side is known to hold its values in, where that may be coarser. A
        vocabulary padded to a rounder number is cut; what padding tokens compute is ignored. Of
        logits of the last token alone, that row is judged.
        """
        seen = seen[..., : near.shape[-1]] if leaf(name).endswith("logits") else seen
        exact, near = rows_seen(name, exact, seen), rows_seen(name, near, seen)
        if seen.shape != near.shape:
            return beyond(f"shape {tuple(seen.shape)}, expected {tuple(near.shape)}")
        if near.dtype == torch.bool:
            return _hold_mask(near, seen)
        unit = self.explained_error(name, dtype)
        exact, near, seen = (self.real_tokens(name, value) for value in (exact, near, seen))
        masked = leaf(name) == "attn.masked_scores"
        result = measure(exact, near, seen, graph.dims(name), unit, masked=masked)
        if result.verdict == "within-rounding":
            excess = self._excess(name, exact, seen, dtype)
            if excess > 1:
                note = "single values are farther off than one operation can round"
                return replace(result, verdict="diverged", ratio=excess, note=note)
        return result

    def _excess(self, name: str, exact: Tensor, seen: Tensor, dtype: torch.dtype | None) -> float:
        """Largest error of a single sum or product, in units of what it may be.

        Such an operation rounds once, so its error is bounded value by value, not only on average.
        0 for other operations, or where an input was not observed.
        """
        sources = inputs(self.setting.config, name)
        if leaf(name) not in ROUNDED_ONCE or any(s not in self.observed for s in sources):
            return 0.0
        parts = [part.double().abs() for part in self.arguments(name)]
        size = exact.double().abs()
        if leaf(name) != "mlp.hidden":
            size = size + sum(parts[1:], parts[0])
        units = [roundoff(held) for held in (self.setting.dtype, dtype) if held is not None]
        error = (seen.double() - exact.double()).abs()
        allowed = BOUND * max(units) * size + torch.finfo(torch.float32).tiny
        return float(torch.where(exact.isfinite(), error / allowed, 0).max())

    def real_tokens(self, name: str, value: Tensor) -> Tensor:
        """`value` with zeros where a row of the first pass has padding."""
        letters = graph.dims(name)
        if self.starts is None or names.step_of(name) or "T" not in letters:
            return value
        axis = letters.index("T") - len(letters)  # tables have a batch axis only with padding
        if letters[0] != "B" and value.ndim == len(letters):
            return value
        length = value.shape[axis]
        real = torch.arange(length) >= self.starts[:, None]  # (B, T)
        shape = [len(real), *[1] * (value.ndim - 1)]
        shape[axis] = length
        return torch.where(real.reshape(shape), value, 0)

    def explained_error(self, name: str, dtype: torch.dtype | None = None) -> float:
        """Relative error that rounding explains, in any order of summation.

        In the setting's dtype, or in `dtype` where that is coarser.
        """
        inner = inner_length(self.setting, name, self.arguments(name))
        dtypes = [self.setting.dtype, dtype or self.setting.dtype]
        unit = explained_error(max(dtypes, key=lambda held: torch.finfo(held).eps), inner)
        return math.hypot(unit, self._from_unseen_scores(name))

    def _from_unseen_scores(self, name: str) -> float:
        """What rounding scores in float32 does to z, where a kernel shows only z.

        Softmax turns an absolute error of a score into a relative one of its weight, so large
        scores cost more than z's own summation.
        """
        pattern = name.removesuffix("z") + "pattern"
        if leaf(name) != "attn.z" or pattern in self.observed:
            return 0.0
        scores = self.value(name.removesuffix("z") + "masked_scores")
        largest = float(torch.where(scores > MASKED, scores, 0).abs().max())
        return largest * explained_error(torch.float32, self.setting.config.head_dim)

    def arguments(self, name: str) -> tuple[Tensor, ...]:
        """Inputs of the named tensor's operation, keys and values of earlier steps joined in.

        KeyError for a tensor that the model has not.
        """
        sources = inputs(self.setting.config, name)
        if not sources:
            raise KeyError(f"{name}, which this model does not have")
        cached = _CACHED.get(leaf(name))
        return tuple(
            self._joined(source) if place == cached else self.value(source)
            for place, source in enumerate(sources)
        )

    def value(self, name: str) -> Tensor:
        """The observation, or what follows from the observations before it."""
        if name in self.observed:
            return self.observed[name]
        if name not in self._derived:
            if names.layer_of(name) is not None:
                self._forget_other_layers(name)
            self._derived[name] = self._derive(name)
        return self._derived[name]

    def _derive(self, name: str) -> Tensor:
        what = leaf(name)
        if what == "tokens":
            raise KeyError(f"{name} was not observed: nothing can be computed without the tokens")
        if what in ("positions", "mask"):
            place = 0 if what == "positions" else 1
            return self.expected_places(names.step_of(name))[place]
        return self.compute(name)

    def expected_places(self, step: int) -> tuple[Tensor, Tensor]:
        """Positions and mask that the tokens of a step ask for."""
        widths = [self.observed[at_step(past, "tokens")].shape[1] for past in range(step)]
        tokens = self.observed[at_step(step, "tokens")]
        return positions_and_mask(tokens, sum(widths), self.starts)

    def _joined(self, name: str) -> Tensor:
        """Keys or values (B, Hkv, S, D) of this step and all before it."""
        step, plain = names.step_of(name), names.without_step(name)
        parts = [self.value(at_step(past, plain)) for past in range(step + 1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _forget_other_layers(self, name: str) -> None:
        """Derived tensors serve their own layer; holding every layer's would double the memory.

        Keys and values stay: the steps that follow read them again.
        """
        layer = names.layer_of(name)
        for held in list(self._derived):
            other = names.layer_of(held)
            if other not in (None, layer) and not leaf(held).startswith(("attn.k", "attn.v")):
                del self._derived[held]


def rows_seen(name: str, computed: Tensor, seen: Tensor) -> Tensor:
    """Of logits (B, T, V) the rows that were seen: some implementations compute the last alone."""
    last = leaf(name).endswith("logits") and seen.ndim == 3 and seen.shape[1] == 1
    return computed[:, -1:] if last else computed


def _hold_mask(near: Tensor, seen: Tensor) -> Measure:
    """A mask is right everywhere or it is wrong: (…, T, S), True = may look."""
    wrong = near != seen.to(torch.bool)
    if not wrong.any():
        return equal()
    query, key = wrong.nonzero()[0][-2:].tolist()
    may = "may" if bool(seen[tuple(wrong.nonzero()[0])]) else "may not"
    return beyond(f"token {query} {may} look at token {key}")


def at_step(step: int, plain: str) -> str:
    """A plain name as the pass of a decoding step has it."""
    return f"step.{step}.{plain}" if step else plain
