"""A changed weight is excused only where every value proves that it was rounded."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tiny import GPT, LLAMA, random_model, random_tokens

from pellucid.diff import compare, diff, from_model
from pellucid.diff.causes.search import _explains
from pellucid.diff.levels import OFFSET, SYMMETRIC
from pellucid.diff.quantisation import on_levels, quantised
from pellucid.diff.relayout import explain
from pellucid.diff.replay.statistics import Measure, measure
from pellucid.diff.selftest.changes import CHANGES, read
from pellucid.diff.selftest.changes import measure as measure_changes
from pellucid.diff.selftest.quantisers import FORMATS, by_rows, gptq, with_offset
from pellucid.diff.selftest.subjects import from_language_model, random_gpt2, random_llama
from pellucid.diff.weight_changes import changed, spans
from pellucid.models import build
from pellucid.trace import Trace

NAME = "layers.0.mlp.up_proj.weight"


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 8


def told(x, y, config=None):
    return explain(NAME, {NAME: x}, {NAME: y}, config)


# ── The benchmark ────────────────────────────────────────────────────────────────────────────────

QUICK = [change for change in CHANGES if "every matrix" not in change.name][::3]


def test_there_are_enough_changes():
    assert len(CHANGES) >= 30 and len({change.name for change in CHANGES}) == len(CHANGES)


@pytest.mark.parametrize("change", QUICK, ids=lambda change: change.name)
def test_a_change_is_not_excused_and_has_a_name(change):
    outcome = read(random_llama(), "float32", change)
    assert outcome.differs and not outcome.excused and outcome.named, outcome


@pytest.mark.parametrize("name", ["int4, ours", "Q4_1", "Q6_K", "NF4", "float8 e4m3, one scale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_published_format_is_explained(name, dtype):
    x = drawn(64, 128).to(dtype)
    cause, finding, kind = told(x, FORMATS[name](x.float()).to(dtype))
    assert (cause, kind) == ("quantised weights", "explained"), finding


@pytest.mark.long
@pytest.mark.parametrize("source", ["random-llama", "random-gpt2", "demo", "demo-gpt2", "trained"])
def test_nothing_is_excused_and_no_format_is_accused(source, request):
    made = {"random-llama": random_llama, "random-gpt2": random_gpt2}.get(source)
    if made is None:
        import pellucid

        if source == "trained":
            source = request.getfixturevalue("assets") / "stories260K" / "hf"
        made = lambda: from_language_model(pellucid.load(source))  # noqa: E731
    outcomes = list(measure_changes([made()]))
    assert [o for o in outcomes if o.excused] == []
    # With 64 rows there are too few errors to show that GPTQ passed them on. In bfloat16 levels are
    # themselves rounded: a group in a few thousand then seems to be off, and is reported.
    unproven = ("GPTQ, 4 bits", "GPTQ, 3 bits")
    accused = [o for o in outcomes if o.accused and o.name not in unproven]
    assert [o for o in accused if o.dtype != "bfloat16"] == []
    seen = {"quantised group with wrong values", "quantised and scaled"}
    assert all(set(o.found) <= seen for o in accused), accused


# ── What proves, and what does not ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [0.05, 0.01, 1e-3, 1e-6])
def test_a_small_error_excuses_nothing(size):
    x = drawn(64, 128)
    for y in (x * (1 + size), x * (1 + size * drawn(64, 128, seed=1) * 8)):
        assert told(x, y)[2] == "fault"
        assert quantised(x, y) is None


@pytest.mark.parametrize("levels", [SYMMETRIC, OFFSET])
@pytest.mark.parametrize("unit", [2.0**-24, 2.0**-8])
def test_arbitrary_values_stand_on_no_levels(levels, unit):
    x = drawn(800, 32)
    x = x.bfloat16().float() if unit == 2.0**-8 else x
    placed = levels.place(x.double(), unit)
    assert int((placed.fits & (placed.bits > 16)).sum()) == 0


def test_bfloat16_values_that_went_through_float16_are_rounded():
    """Below 2^-14 float16 holds fewer bits than bfloat16; every value has to be what it gives."""
    x = (drawn(64, 128) * 1e-4).bfloat16()
    y = x.half().bfloat16()
    assert told(x, y)[::2] == told(y, x)[::2] == ("rounded weights", "explained")
    y[3, 5] *= 2
    assert told(x, y)[2] == "fault"


def test_scattered_changes_are_not_those_of_some_rows():
    x = drawn(64, 128)
    y, z = x.clone(), x.clone()
    y.view(-1)[torch.randperm(64 * 128, generator=torch.Generator().manual_seed(1))[:20]] *= 1.5
    z[7:12] *= 1 + 0.1 * drawn(5, 128)
    assert told(x, y)[0] == "other weights" and told(x, z)[0] == "other rows"


@pytest.mark.parametrize("factor", [1.02, 0.97])
def test_codes_whose_scales_are_rounded_are_still_held_to_a_factor(factor):
    x = drawn(64, 512)
    y = FORMATS["NF4, scales in eight bits"](x)
    assert told(x, y)[2] == "explained" and told(x, y * factor)[2] == "fault"


def test_few_values_are_no_proof():
    """A vector, or rows shorter than a group, stand on few levels whatever they are."""
    assert on_levels(drawn(4), drawn(4, seed=1)) is None
    assert on_levels(drawn(30, 4), drawn(30, 4, seed=1)) is None
    bias = drawn(4)
    assert told(bias, bias * 1.05)[2] == "fault"


def test_the_same_levels_of_other_weights_are_not_as():
    x = drawn(64, 128)
    near = x + 0.02 * drawn(64, 128, seed=1)
    for through in (by_rows, with_offset(4, 32)):
        assert told(x, through(x))[2] == "explained"
        assert told(x, through(near))[2] == "fault"


@pytest.mark.parametrize("factor", [1.05, 0.97, 1.002])
def test_quantised_weights_that_were_scaled_afterwards(factor):
    x = drawn(64, 128)
    for through in (by_rows, FORMATS["Q4_0"]):
        assert told(x, through(x) * factor)[2] == "fault"


@pytest.mark.parametrize("name", ["Q4_1", "Q8_0", "NF4", "int4, ours", "float8 e4m3, one scale"])
def test_weights_that_were_quantised_already_are_not_rounded_once_more(name):
    """Levels moved a little are still nearest to the old ones: that excuses nothing."""
    x = FORMATS[name](drawn(96, 128))
    scales = 1 + 0.01 * torch.randn(96, 4, 1, generator=torch.Generator().manual_seed(1))
    for y in (x * 1.02, x * 1.001, (x.unflatten(1, (-1, 32)) * scales).flatten(1)):
        assert told(x, y)[2] == "fault", told(x, y)
        assert (quantised(x, y) or ("", "", "fault"))[2] == "fault"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, None])
def test_numbers_moved_a_little_still_round_to_what_they_were(stored, dtype):
    """That A has B's values rounded excuses B only where these lie anywhere between A's levels."""
    x = drawn(64, 128)
    a = x.to(dtype).to(stored or dtype)
    step = torch.finfo(dtype).eps / 2
    assert told(a, x)[2] == "explained"
    moved = 2 * torch.rand(64, 128, generator=torch.Generator().manual_seed(2)) - 1
    for y in (a.float() * (1 + 0.6 * step), a.float() * (1 - 0.7 * step)):
        assert told(a, y)[::2] == ("scaled weights", "fault")
    for size in (0.7, 0.9):  # of the largest relative error that rounding makes
        assert told(a, a.float() * (1 + size * step * moved))[::2] == ("noise", "fault")


@pytest.mark.parametrize(
    ("one", "other"),
    [("Q8_0", "int8, ours"), ("Q4_1", "Q8_0"), ("int8, ours", "NF4"), ("Q4_1", "Q4_0")],
)
def test_what_was_quantised_already_may_be_quantised_in_another_way(one, other):
    x = FORMATS[one](drawn(32, 128))
    assert told(x, FORMATS[other](x))[::2] == ("quantised weights", "explained")
    assert told(x, x * 1.001)[2] == told(x * 1.001, x)[2] == "fault"


def test_the_values_of_one_side_may_be_the_others_rounded():
    x = drawn(64, 128)
    cause, finding, kind = told(by_rows(x), x)
    assert (cause, kind) == ("quantised weights", "explained") and finding.startswith("A's values")
    assert told(x.bfloat16().float(), x)[::2] == ("rounded weights", "explained")


def test_rounded_towards_zero_is_rounded_and_one_other_value_is_not():
    x = drawn(64, 128)
    cut = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    cause, finding, kind = told(x, cut)
    assert (cause, kind) == ("rounded weights", "explained") and "cut off" in finding
    y = x.bfloat16().float()
    y[3, 5] *= 1.5
    cause, finding, kind = told(x, y)
    assert (cause, kind) == ("one value changed", "fault")
    assert "[3,5]" in finding and "rounded through bfloat16" in finding


def test_a_doubled_scale_in_a_file_that_declares_nothing():
    x = drawn(64, 128)
    y = by_rows(x)
    y[7] *= 2
    cause, finding, kind = told(x, y)
    assert (cause, kind) == ("quantised group with a wrong scale", "fault")
    assert "[7, 0:128]" in finding and "times 2" in finding


def test_compensated_errors_are_told_from_other_weights_by_their_covariance():
    x = drawn(256, 96)
    cause, finding, kind = told(x, gptq(x))
    assert (cause, kind) == ("quantised weights", "explained") and "GPTQ" in finding
    assert "times rounding's" in finding
    adapter = drawn(256, 1, seed=2) @ drawn(1, 96, seed=3)
    for other in (x + 0.02 * drawn(256, 96, seed=1), x + 0.5 * adapter):
        assert told(x, with_offset(4, 32)(other))[:1] + told(x, with_offset(4, 32)(other))[2:] in (
            ("quantised from other weights", "fault"),
            ("quantised group with wrong values", "fault"),
        )


@pytest.mark.parametrize("shape", [(32, 64), (48, 96), (64, 64)])
@pytest.mark.parametrize("bits", [3, 4])
def test_few_rows_prove_compensated_errors_column_by_column(shape, bits):
    x = drawn(*shape, seed=4)
    assert told(x, gptq(x, bits))[::2] == ("quantised weights", "explained")
    adapter = drawn(shape[0], 1, seed=2) @ drawn(1, shape[1], seed=3)
    other = gptq(x + 0.3 * adapter * x.std() / adapter.std(), bits)
    assert told(x, other)[::2] == ("quantised from other weights", "fault")


# ── Names ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("change", "cause", "words"),
    [
        (lambda x: x * 1.05, "scaled weights", "times 1.05"),
        (lambda x: x + 0.01, "shifted weights", "plus 0.01"),
        (lambda x: x + drawn(64, 3, seed=1) @ drawn(3, 128, seed=2), "low-rank change", "rank 3"),
        (lambda x: x.index_fill(0, torch.arange(3, 11), 0) + x * 0, "other rows", "rows 3…10"),
        (lambda x: x * (1 + drawn(1, 128, seed=1)), "scaled columns", "own factor"),
        (lambda x: x.roll(1, 0), "reordered rows", "64 moved"),
        (lambda x: (x * 1e3).round() / 1e3, "rounded to decimals", "3 decimals"),
        (lambda x: x * (1 + 0.08 * drawn(64, 128, seed=1)), "noise", "gaussian noise, in prop"),
    ],
)
def test_a_change_has_its_name(change, cause, words):
    x = drawn(64, 128)
    y = change(x)
    if cause == "other rows":
        y = torch.where(y == 0, drawn(64, 128, seed=4), x)
    found, finding = changed(x, y, 2.0**-24)
    assert found == cause and words in finding, finding


def test_heads_are_named_where_they_are():
    x = drawn(4 * LLAMA.head_dim, 36)
    y = x.clone()
    y[LLAMA.head_dim : 2 * LLAMA.head_dim] *= 1.1
    cause, finding = changed(x, y, 2.0**-24, (0, LLAMA.head_dim))
    assert cause == "scaled heads" and "heads 1 differ" in finding and "1.1" in finding
    assert spans([0, 1, 2, 7, 9, 10]) == "0…2, 7, 9…10"


def test_another_checkpoint_is_said_once():
    model = random_model(LLAMA, torch.float32)
    weights = {
        name: x + 0.01 * x.pow(2).mean().sqrt() * drawn(*x.shape, seed=5) * 8
        for name, x in model.state_dict().items()
    }
    other = build(LLAMA)
    other.load_state_dict(weights, assign=True)
    report = diff(model, other.eval(), [random_tokens(LLAMA, 9).tolist()])
    assert report.verdict == "diverged"
    matrices = [f for f in report.static if weights[f.name].ndim == 2]
    assert {f.cause for f in matrices} == {"another checkpoint of the same training"}
    assert sum("matrices differ by" in f.finding for f in report.static) == 1


# ── Overflow, hypotheses, shapes ─────────────────────────────────────────────────────────────────


def overflowing(layer=1):
    model = random_model(LLAMA, torch.float32)
    with torch.no_grad():
        model.layers[layer].mlp.up_proj.weight *= 600
        model.layers[layer].mlp.down_proj.weight *= 600
    return model


@pytest.mark.parametrize(("dtype_a", "side"), [("float32", "b"), ("float16", "b")])
def test_an_infinity_where_the_reference_is_finite_has_diverged(dtype_a, side):
    prompt = [random_tokens(LLAMA, 12).tolist()]
    report = diff(overflowing(), overflowing(), prompt, dtype_a=dtype_a, dtype_b="float16")
    assert report.verdict == "diverged"
    assert (report.first.name, report.first.side) == ("layers.1.mlp_out", side)
    assert report.cause.name == "float16 overflow"
    right = diff(overflowing(), overflowing(), prompt, dtype_b="bfloat16")
    assert right.verdict == "explained"


def test_equal_infinities_are_no_equality():
    a = torch.tensor([[[1.0, math.inf]]])
    exact = torch.tensor([[[1.0, 7e4]]], dtype=torch.float64)
    assert measure(exact, a, a.clone(), ("B", "T", "C"), 1e-7).verdict == "diverged"
    low = torch.tensor([[[1.0, -math.inf]]])
    masked = measure(low.double(), low, low.clone(), ("B", "T", "S"), 1e-7, masked=True)
    assert masked.verdict == "identical"


def _measured(verdict, error_a, error_b, ratio):
    return Measure(verdict=verdict, error_a=error_a, error_b=error_b, ratio=ratio)


def test_a_hypothesis_that_overflows_or_changes_nothing_explains_nothing():
    before = _measured("diverged", 1e-7, 1.0, 100.0)
    assert _explains(_measured("within-rounding", 1e-7, 1e-7, 0.3), before)
    assert not _explains(_measured("within-rounding", 1.0, 1.0, 0.4), before)
    assert not _explains(_measured("within-rounding", math.inf, 1e-7, 0.4), before)
    assert not _explains(_measured("within-rounding", 1e-7, math.nan, 0.4), before)
    assert not _explains(_measured("within-rounding", 0.01, 1.5, 60.0), before)


def widened(seen, keys, *leaves):
    pad = torch.nn.functional.pad
    return Trace({n: pad(x, (0, keys)) if n.endswith(leaves) else x for n, x in seen.items()})


def test_a_slot_of_the_cache_left_empty_is_told_by_the_positions_before_it():
    """Decoding that begins one position too far has a key more than there are tokens."""
    model = random_model(LLAMA, torch.float32)
    seen = dict(from_model(model, "B").observe([random_tokens(LLAMA, 12).tolist()], 1))
    for leaf in ("q_rotated", "k_rotated"):
        name = f"step.1.layers.0.attn.{leaf}"
        seen[name] = seen[name].roll(1, -1)
    del seen["step.1.mask"]
    wider = ("attn.scores", "attn.masked_scores", "attn.pattern")
    first = {name: x for name, x in seen.items() if not name.startswith("step.1.")}
    report = diff(model, Trace({**widened(seen, 1, *wider), **first}))
    assert report.first is not None and report.first.name == "step.1.layers.0.attn.q_rotated"


@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_a_pattern_as_wide_as_a_static_cache_is_one_line(config):
    model = random_model(config, torch.float32)
    seen = from_model(model, "m").observe([random_tokens(config, 9).tolist()], 1)
    for leaves in (("attn.pattern",), ("attn.scores", "attn.masked_scores", "attn.pattern")):
        with pytest.raises(ValueError) as error:
            diff(model, widened(seen, 20, *leaves))
        assert "\n" not in str(error.value)


def test_tensors_that_do_not_fit_each_other_are_one_line():
    """A side made by hand, whose shapes nobody has checked before."""
    inner = from_model(random_model(LLAMA, torch.float32), "B")

    def run(rows, steps):
        seen = inner.observe(rows, steps)
        seen["layers.0.attn.v"] = seen["layers.0.attn.v"][:, :, :-2]
        return seen

    rows = [random_tokens(LLAMA, 9).tolist()]
    side = replace(inner, run=run, weights=None, config=None, dialect=None)
    with pytest.raises(ValueError, match="does not fit the tensors"):
        compare(from_model(random_model(LLAMA, torch.float32), "A"), side, rows)
