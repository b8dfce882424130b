"""All seeded faults, and the controls: differences that are no fault and must not read as one."""

from __future__ import annotations

import re
from typing import Any

from pellucid.diff.selftest import damage
from pellucid.diff.selftest.fault import Fault, learned, plain_scores
from pellucid.diff.selftest.in_code import CODE
from pellucid.diff.selftest.in_features import FEATURES
from pellucid.diff.selftest.in_ports import PORTS, hooked
from pellucid.diff.selftest.in_weights import WEIGHTS
from pellucid.diff.selftest.port import Port

_EXPLAINED = ("identical", "within-rounding", "explained")
_DIGITS = re.compile(r"\d|[^\d]+")


def encoded(tokenizer: Any, text: str) -> list[int]:
    """As the model expects its prompts: special tokens read, one BOS where there is one."""
    return tokenizer.encode(text, bos=tokenizer.bos_id is not None, specials=True)


def _without_bos(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, specials=True)


def _doubled_bos(tokenizer: Any, text: str) -> list[int]:
    return [tokenizer.bos_id, *encoded(tokenizer, text)]


def _other_specials(tokenizer: Any, text: str) -> list[int]:
    """The special tokens of a neighbouring release: the same names, other ids."""
    ids = sorted(tokenizer.specials.values())
    moved = dict(zip(ids, [*ids[1:], ids[-1] + 1], strict=True))
    first, *rest = encoded(tokenizer, text)
    return [first, *(moved.get(token, token) for token in rest)]


def _digit_by_digit(tokenizer: Any, text: str) -> list[int]:
    """Text cut so that each digit stands alone, before the merges."""
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for piece in _DIGITS.findall(text):
        ids += tokenizer.encode(piece, specials=True)
    return ids


def _tokens(name: str, cause: str, encode: Any) -> Fault:
    return Fault(name=name, first="tokens", cause=cause, static=cause, encode=encode)


TOKENS = (
    _tokens("BOS missing", "BOS missing", _without_bos),
    _tokens("BOS doubled", "BOS doubled", _doubled_bos),
    _tokens("other special-token table", "other special-token table", _other_specials),
    _tokens("other pre-tokenizer pattern", "other splitting of the text", _digit_by_digit),
)

FAULTS: tuple[Fault, ...] = (
    *(*TOKENS, *WEIGHTS, *CODE, *FEATURES, *PORTS),
    *hooked((*CODE, *PORTS)),
)

CONTROLS: tuple[Fault, ...] = (
    Fault(name="a healthy port"),
    Fault(name="a healthy port, decoding with a cache", steps=3),
    Fault(name="a healthy port, left padding", rows="padded", steps=1),
    Fault(name="a healthy port, long prompt", rows="long"),
    Fault(name="split-K summation", port=Port(summation="split")),
    Fault(name="permuted summation", port=Port(summation="permuted")),
    Fault(name="fused attention", port=Port(fused=True), applies=plain_scores, steps=1),
    Fault(
        name="fused attention, left padding",
        port=Port(fused=True),
        applies=plain_scores,
        rows="padded",
    ),
    Fault(name="batch of four", copies=4, steps=1),
    Fault(name="one product for q, k and v", port=Port(merged=True)),
    Fault(
        name="all positions shifted alike",
        port=Port(first_position=7),
        applies=lambda c: not learned(c),
        steps=1,
    ),
    Fault(
        name="left padding counted in all positions",  # each row is shifted as a whole
        port=Port(counts_padding="always"),
        applies=lambda c: not learned(c),
        rows="padded",
        steps=1,
    ),
    Fault(
        name="vocabulary padded",
        applies=lambda c: "head" not in c.biases,
        weights=damage.vocabulary_padded,
        verdicts=_EXPLAINED,
    ),
    Fault(name="int8 weights", weights=damage.all_int8, verdicts=("explained",), visible_only=True),
    Fault(name="bfloat16 against float32", side_dtype="bfloat16", verdicts=("explained",)),
)
