"""Tokens, positions, masks and numbers of keys: what may differ, what may not, what is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import GPT, LLAMA, random_model, random_tokens

from pellucid.diff.replay.judge import Judge
from pellucid.diff.replay.operations import Setting
from pellucid.diff.sides.side import from_model
from pellucid.prompts import padded
from pellucid.trace import Trace

ROW = random_tokens(LLAMA, 9).tolist()
PADDED = [ROW, ROW[:5], ROW[2:8]]  # padding: 0, 4 and 3 tokens


def judged(edits, names, *, rows=(ROW,), config=LLAMA, steps=1, keep=None, declared=None):
    """The measures of some names of B's trace, of which `edits` changes some tensors.

    declared: the dtype that B says it computes in; None: it says nothing.
    """
    model = random_model(config, torch.float32)
    side = from_model(model, "B")
    setting = Setting(
        config=model.config, dialect=model.dialect, weights=model.state_dict().get,
        dtype=torch.float32,
    )  # fmt: skip
    seen = side.observe([*rows], steps)
    for name, change in edits.items():
        seen[name] = change(seen[name])
    tokens, starts = padded([*rows])
    said = None if declared is None else replace(setting, dtype=declared)
    judge = Judge(side, Trace(seen), setting, starts, tokens, keep=keep, declared=said)
    return [judge.judge(name) for name in names]


def said(found):
    return [(each.verdict, each.note) for each in found]


def changed(place, value):
    def change(x):
        x = x.clone()
        x[place] = value
        return x

    return change


ALIKE = ("within-rounding", "all positions shifted alike: RoPE sees only differences")
SAME = ("identical", "")


def test_other_tokens_than_asked_for_matter_in_the_first_pass_only():
    other = changed((0, -1), 1)
    assert said(judged({"tokens": other}, ["tokens"])) == [
        ("diverged", "other tokens than the run was asked for")
    ]
    assert said(judged({"step.1.tokens": other}, ["tokens", "step.1.tokens"])) == [SAME, SAME]


def test_positions_of_padding_are_ignored_under_rope():
    """transformers gives padding the position 1, where others give 0."""
    padding = torch.arange(9)[None] < torch.tensor([0, 4, 3])[:, None]
    found = judged({"positions": lambda x: x.masked_fill(padding, 1)}, ["positions"], rows=PADDED)
    assert said(found) == [ALIKE]
    found = judged({"positions": lambda x: x + 7}, ["positions"], rows=PADDED)
    assert said(found) == [ALIKE]


def test_positions_shifted_by_another_number_in_a_later_pass_are_off():
    names = ["positions", "step.1.positions"]
    five = {name: lambda x: x + 5 for name in names}
    assert said(judged(five, names)) == [ALIKE, ALIKE]
    four = five | {"step.1.positions": lambda x: x + 4}
    assert said(judged(four, names)) == [ALIKE, ("diverged", "token 0: off by +4")]
    later = {"step.1.positions": lambda x: x - 1}
    assert said(judged(later, names)) == [SAME, ("diverged", "token 0: off by -1")]
    one = {"positions": changed((..., 6), 9)}
    assert said(judged(one, names)) == [("diverged", "token 6: off by +3"), SAME]


def test_learned_positions_may_not_be_shifted():
    found = judged({"positions": lambda x: x + 5}, ["positions"], config=GPT)
    assert said(found) == [("diverged", "token 0: off by +5")]


def test_a_mask_says_which_token_looks_where_and_padding_is_ignored():
    for place, value, note in (
        ((2, 0, 5, 2), True, "token 5 may look at token 2"),
        ((2, 0, 5, 4), False, "token 5 may not look at token 4"),
        ((0, 0, 0, 1), True, "token 0 may look at token 1"),
    ):
        found = judged({"mask": changed(place, value)}, ["mask"], rows=PADDED)
        assert said(found) == [("diverged", note)]
    for row, query in ((1, 3), (2, 2)):  # the last of the row's padding
        found = judged({"mask": changed((row, 0, query, 0), True)}, ["mask"], rows=PADDED)
        assert said(found) == [SAME]
    wide = judged({"step.1.mask": changed((1, 0, 0, 4), False)}, ["step.1.mask"], rows=PADDED)
    assert said(wide) == [("diverged", "token 0 may not look at token 4")]


def test_a_mask_of_one_row_may_have_axes_for_rows_and_heads():
    found = judged({"mask": lambda x: x[None, None]}, ["mask"])
    assert said(found) == [SAME]
    wrong = {"mask": lambda x: changed((0, 0, 4, 6), True)(x[None, None])}
    assert said(judged(wrong, ["mask"])) == [("diverged", "token 4 may look at token 6")]


def test_a_mask_of_another_shape_is_said_with_both():
    (found,) = judged({"mask": lambda x: x[:4, :4]}, ["mask"])
    assert (found.verdict, found.note) == ("diverged", "shape (4, 4), expected (9, 9)")


def test_what_is_judged_is_kept_beside_what_it_should_be():
    kept = {}

    def keep(name, right, seen):
        kept[name] = (right, seen)

    wrong = changed((0, 3), 7.0)
    judged({"embed": wrong}, ["mask", "embed", "layers.0.attn_norm"], keep=keep)
    assert list(kept) == ["mask", "embed", "layers.0.attn_norm"]
    right, seen = kept["embed"]
    assert (seen[0, 3] == 7).all() and not (right[0, 3] == 7).any()
    assert torch.equal(right[0, :3].float(), seen[0, :3])


def widened(x):
    return torch.cat((x, x[..., -1:]), -1)


def test_what_a_declared_dtype_does_not_explain_is_measured_by_a_s_own():
    names = ["layers.0.attn_norm", "layers.0.mlp_norm"]
    edits = {names[0]: lambda x: x + 1, names[1]: lambda x: x.bfloat16().float()}
    plain, coarse = judged(edits, names), judged(edits, names, declared=torch.bfloat16)
    assert [each.verdict for each in plain] == ["diverged", "diverged"]
    assert coarse[0] == plain[0]
    assert coarse[1].verdict == "explained" and coarse[1].ratio < 1 < plain[1].ratio
    assert coarse[1].note == "bfloat16 in the dialect hf"


SCORES = ["layers.0.attn.scores", "layers.0.attn.masked_scores", "layers.0.attn.pattern"]


def test_more_keys_than_tokens_are_of_a_static_cache():
    with pytest.raises(ValueError, match="scores has 10 keys, there are 9 tokens so far.*unused"):
        judged({SCORES[0]: widened}, SCORES[:1])
    with pytest.raises(ValueError, match="scores has 8 keys, there are 9 tokens so far"):
        judged({SCORES[0]: lambda x: x[..., 1:]}, SCORES[:1])


def test_fewer_keys_in_a_later_pass_are_a_token_lost():
    later = [f"step.1.{name}" for name in SCORES[:2]]
    found = judged({name: lambda x: x[..., 1:] for name in later}, later)
    assert said(found) == [
        ("diverged", "shape (1, 4, 1, 9), expected (1, 4, 1, 10)"),
        ("not-judged", f"computed from {later[0]}, which has another shape"),
    ]


def test_more_keys_after_a_divergence_are_its_consequence():
    names = ["layers.0.attn_norm", *SCORES]
    edits = {"layers.0.attn_norm": lambda x: x + 1, SCORES[0]: widened}
    found = judged(edits, names)
    assert [each.verdict for each in found] == ["diverged", *["not-judged"] * 2, "identical"]
    assert found[1].note == "more keys than tokens, after an earlier divergence"
    assert found[2].note == f"computed from {SCORES[0]}, which has another shape"
