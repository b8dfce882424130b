"""From logits (B, V) to the next token of each row: pure functions in one fixed order.

    logits ── repetition penalty ── ÷ temperature ── top-k ── top-p ── min-p ── softmax ── draw
                                └─ temperature 0: argmax

The order is that of transformers' ``generate``, and so is each step, ties included: the same
settings mean the same distribution there and here. A token that a step rules out gets −inf.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

# Logits divided by less than one, or multiplied by more than the other, may be beyond float32.
_SMALLEST, _LARGEST = 1e-30, 1e30


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults draw from the model's own distribution.

    temperature         divides the logits: below 1 sharper, above 1 flatter; 0 takes the likeliest,
                        and so does anything below 1e-30, which differs from it in nothing
    top_k               keep the k likeliest tokens; 0 keeps all
    top_p               keep the likeliest tokens that together have at least this probability
                        (nucleus sampling, Holtzman et al. 2020); 1 keeps all
    min_p               keep tokens at least this fraction as likely as the likeliest
                        (Nguyen et al. 2024); 0 keeps all
    repetition_penalty  divides positive and multiplies negative logits of tokens already in the
                        prompt or the text (CTRL, Keskar et al. 2019); 1 changes nothing; from
                        1e-30 to 1e30
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Integral if name == "top_k" else Real):
                kind = "a whole number" if name == "top_k" else "a number"
                raise ValueError(f"{name} is {value!r}: expected {kind}")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: expected 1 or more, or 0 for all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: expected above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: expected between 0 and 1")
        if not _SMALLEST <= self.repetition_penalty <= _LARGEST:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: expected above 0, from "
                f"{_SMALLEST:g} to {_LARGEST:g} (1 is none)"
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < _SMALLEST


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """logits (B, V), seen (B, V) bool: what a row has already -> its logits made less likely."""
    lowered = torch.where(logits < 0, logits * penalty, logits / penalty)
    most = torch.finfo(logits.dtype).max
    lowered = torch.where(logits.isinf(), logits, lowered.clamp(-most, most))  # −inf: ruled out
    return torch.where(seen, lowered, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """logits (B, V) -> those below the k-th largest at −inf; its equals stay."""
    smallest_kept = torch.topk(logits, min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest_kept, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """logits (B, V) -> all but the smallest set of likeliest tokens with mass >= p at −inf.

    Counted from the least likely end, as in transformers: a token goes while everything up to and
    including it has at most 1 − p. Which of equally likely tokens go is left to ``torch.sort``.
    """
    ascending, order = torch.sort(logits)
    goes = ascending.softmax(-1).cumsum(-1) <= 1 - p
    goes[:, -1] = False  # the likeliest stays, whatever the rounding
    return logits.masked_fill(goes.scatter(1, order, goes), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """logits (B, V) -> those less than p times as likely as the likeliest at −inf."""
    probabilities = logits.softmax(-1)
    likeliest = probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < p * likeliest, -math.inf)


def warp(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """All steps before the draw, on logits (B, V); one that is greedy ends after the penalty.

    seen (B, V) bool: tokens of each row's prompt and text; needed with a repetition penalty.
    """
    if sampling.repetition_penalty != 1:
        assert seen is not None, "a repetition penalty needs the tokens seen so far"
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits
    if sampling.temperature < 1e-3:  # the quotients may be beyond float32: only differences count
        logits = logits - logits.amax(-1, keepdim=True)
    logits = logits / min(sampling.temperature, _LARGEST)  # −inf by infinity is no number
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def probabilities(logits: Tensor) -> Tensor:
    """What `draw` gives each token of logits (B, V) -> (B, V) float64 on the CPU, about 1 a row."""
    return logits.softmax(-1).to("cpu", torch.float64)


def draw(logits: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row of logits (B, V), each with its row's generator -> (B).

    Inverse transform: a row spends one uniform number per token, drawn on the CPU, so that a seed
    means the same on every device.

        0 ├── token 0 ──┼ 1 ┼──── token 2 ────┤ 1     the token on whose stretch the number falls
    """
    cumulative = probabilities(logits).cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]  # (B, 1), about 1
    uniform = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    # Below 1, but the product may round up to the total, which is on no token's stretch.
    falls = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cumulative, falls, right=True)[:, 0]
    assert (drawn < logits.shape[-1]).all(), "the number falls on a token's stretch"
    return drawn


class NotFinite(ValueError):
    """Logits that are not numbers."""


def next_tokens(
    logits: Tensor,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    seen: Tensor | None = None,
) -> list[int]:
    """The next token of each row of logits (B, V); the generators are left alone at temperature 0.

    Raises NotFinite for logits that are not numbers: no token would be right.
    """
    logits = _shaped(logits, sampling, seen)
    chosen = likeliest(logits) if sampling.greedy else draw(logits, generators)
    return chosen.tolist()


def accept_or_draw(
    logits: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    seen: Tensor | None,
    token: int,
    drafted_by: Tensor,
) -> int:
    """The next token of logits (1, V), where `token` was drawn for it by `drafted_by` (V).

    It is accepted with the probability min(1, p / q), else one is drawn from max(0, p − q): the
    result is distributed by the row's own p, whatever q is. Raises NotFinite as `next_tokens`.
    """
    own = probabilities(_shaped(logits, sampling, seen))[0]
    uniform = torch.rand(1, dtype=torch.float64, generator=generator)
    if uniform * drafted_by[token] < own[token]:
        return token
    left = (own - drafted_by).clamp_min(0)
    left = left if left.any() else own  # both are the same but for rounding
    return int(draw(left.log()[None], [generator]))


def _shaped(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not logits.amax(-1).isfinite().all():  # one NaN makes a row's largest logit NaN
        raise NotFinite(
            "the logits are not numbers (NaN, or infinite): the weights are damaged, or the dtype "
            "is too narrow for this model; try another dtype"
        )
    return warp(logits, sampling, seen)


def likeliest(logits: Tensor) -> Tensor:
    """The place of the largest logit of each row (B, V) -> (B)."""
    if logits.device.type != "cpu":
        return logits.argmax(-1)
    return torch.from_numpy(logits.detach().numpy().argmax(-1))  # vectorised, unlike PyTorch's


def row_seed(seed: int, row: int) -> int:
    """The seed of one row of a batch: row 0 has `seed` itself, the others one mixed from both."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}: expected 0 or more and below 2^63")
    if row == 0:
        return seed
    mixed = hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "big") >> 1


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """The seed of each row: from one for all, one each, or chance (None)."""
    if seed is None:
        seed = secrets.randbits(63)
    if isinstance(seed, int):
        seeds = [row_seed(seed, row) for row in range(rows)]
    else:
        seeds = [row_seed(one, 0) for one in seed]
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds for {rows} prompts: expected one for all or one each")
    return seeds


def row_generators(seed: int | Sequence[int] | None, rows: int) -> list[torch.Generator]:
    """A random generator for each row; its seed is `row_seeds`'."""
    return [torch.Generator().manual_seed(one) for one in row_seeds(seed, rows)]


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch's operations on this thread alone.

    To choose a token is little work, and the threads that OpenMP would wake for it go on spinning
    for milliseconds afterwards: on the very cores that the next step of the C decoder needs.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
