"""Folded names say exactly the names that were folded."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA

from pellucid import graph
from pellucid.show.folding import fold

ALL = list(graph.expand(LLAMA.__class__(**{**LLAMA.__dict__, "n_layers": 6})))


def unfold(text, layers, steps):
    """The names a folded one stands for, by reading it as a person does."""
    every_step = text.startswith("[step.")
    text = text.replace("[step.", "step.", 1).replace(".]", ".", 1) if every_step else text
    choices = []
    for part in re.split(r"(\{[^}]*\}|(?<=step\.)[^.]+|(?<=layers\.)[^.]+)", text):
        if part.startswith("{"):
            choices.append(part[1:-1].split(","))
        elif part and choices and choices[-1][0].endswith(("step.", "layers.")):
            known = steps - ({0} if not every_step else set())
            known = layers if choices[-1][0].endswith("layers.") else known
            choices.append([str(number) for number in numbers(part, known)])
        else:
            choices.append([part])
    found = {"".join(words) for words in product(*choices)}
    return {name.removeprefix("step.0.") for name in found}


def numbers(text, known):
    if text == "*":
        return sorted(known)
    found = []
    for run in text.split(","):
        first, _, last = run.partition("…")
        found += range(int(first), int(last or first) + 1)
    return found


@pytest.mark.parametrize(
    ("some", "expected"),
    [
        (["layers.1.attn.q"], ["layers.1.attn.q"]),
        (["layers.1.attn.q", "layers.2.attn.q"], ["layers.1,2.attn.q"]),
        ([f"layers.{n}.attn.q" for n in (1, 2, 3, 5)], ["layers.1…3,5.attn.q"]),
        ([f"layers.{n}.attn.q" for n in range(6)], ["layers.*.attn.q"]),
        ([n for n in ALL if n.endswith("scores")], ["layers.*.attn.{scores,masked_scores}"]),
        (["embed", "logits"], ["embed", "logits"]),
        (["step.1.embed", "step.2.embed"], ["step.*.embed"]),
        (["embed", "step.1.embed"], ["[step.0,1.]embed"]),
        (
            [f"layers.{n}.attn.{x}_proj.weight" for n in range(6) for x in "qk"],
            ["layers.*.attn.{q,k}_proj.weight"],
        ),
    ],
)
def test_examples(some, expected):
    everything = [*ALL, *(f"step.{step}.{name}" for step in (1, 2) for name in ALL)]
    assert fold(some, everything) == expected


@given(st.lists(st.sampled_from(ALL), unique=True), st.sets(st.integers(0, 3), min_size=1))
def test_nothing_is_lost_and_nothing_added(some, steps):
    everything = [f"step.{step}.{name}" if step else name for step in range(4) for name in ALL]
    said = [f"step.{step}.{name}" if step else name for step in sorted(steps) for name in some]
    folded = fold(said, everything)
    unfolded = [unfold(text, set(range(6)), set(range(4))) for text in folded]
    assert sum(map(len, unfolded)) == len(said)
    assert set().union(*unfolded) == set(said)
