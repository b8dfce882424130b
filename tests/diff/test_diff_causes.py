"""From a wrong tensor alone to what was done: measured constants, unobserved inputs, healing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import GPT, LLAMA, random_model, random_tokens

import pellucid
from pellucid.diff import compare, from_model
from pellucid.diff.causes.rope_angles import fitting
from pellucid.diff.selftest.catalogue import FAULTS
from pellucid.diff.selftest.run import run_fault
from pellucid.diff.selftest.subjects import from_language_model
from pellucid.models import RopeConfig, build
from pellucid.models.rope import frequencies

ROWS = [random_tokens(LLAMA, 40).tolist()]


def _pair(config, change=None, other=None, dtype=torch.float32, hides=()):
    """A healthy model, and a side that shows only the tensors of a broken one."""
    model = random_model(config, dtype)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if change:
        change(weights)
    broken = build(other or config)
    broken.load_state_dict(weights, assign=True)
    inner = from_model(broken.eval(), "B")

    def run(rows, steps):
        seen = inner.observe(rows, steps)
        for name in list(seen):
            if name.endswith(hides):
                del seen[name]
        return seen

    side = replace(inner, run=run, config=None, weights=None, dialect=None)
    return compare(from_model(model, "A"), side, ROWS)


@pytest.mark.parametrize("theta", [20000.0, 123456.0, 777.0, 31415.9])
@pytest.mark.parametrize("hides", [(), ("rope.cos", "rope.sin")])
def test_any_theta_is_read_off_the_angles(theta, hides):
    other = replace(LLAMA, rope=replace(LLAMA.rope, theta=theta))
    report = _pair(LLAMA, other=other, hides=hides)
    assert report.first is not None and report.cause is not None
    assert report.first.name == ("layers.0.attn.q_rotated" if hides else "rope.cos")
    assert report.cause.name == "RoPE theta" and f"{theta:g}" in report.cause.evidence


@pytest.mark.parametrize("eps", [7e-4, 2.5e-3])
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_any_eps_is_read_off_the_smallest_tokens(config, eps):
    report = _pair(config, other=replace(config, norm_eps=eps))
    assert report.first is not None and report.cause is not None
    assert report.first.name == "layers.0.attn_norm"
    assert report.cause.name == "norm eps" and f"eps {eps:g}" in report.cause.evidence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("layers.1.mlp.down_proj.weight", "layers.1.mlp_out"),
        ("layers.0.attn.o_proj.weight", "layers.0.attn_out"),
        ("layers.1.attn_norm.weight", "layers.1.attn_norm"),
        ("embed.weight", "embed"),
    ],
)
def test_one_changed_weight_is_solved_for(name, first, dtype):
    token = ROWS[0][7]

    def change(weights):
        place = (token, 3) if name == "embed.weight" else (3, 5)[: weights[name].ndim]
        weights[name][place] *= 4  # two steps of the exponent

    report = _pair(LLAMA, change, dtype=dtype)
    assert report.first is not None and report.cause is not None
    assert report.first.name == first
    assert report.cause.name in ("one bit flipped", "one value changed")
    place = f"{name}[{token},3]" if name == "embed.weight" else f"{name}[3"
    assert place in report.cause.evidence


def test_several_independent_faults_are_all_found():
    """One does not hide the next: each tensor is judged from the side's own inputs."""

    def change(weights):
        weights["layers.0.attn.v_proj.weight"].mul_(1.5)
        weights["layers.1.mlp_norm.weight"].add_(1)
        weights["layers.1.mlp.up_proj.weight"].copy_(weights["layers.0.mlp.up_proj.weight"])

    report = _pair(LLAMA, change)
    assert [fault.name for fault in report.faults] == [
        "layers.0.attn.v",
        "layers.1.mlp_norm",
        "layers.1.mlp.up",
    ]
    causes = [fault.cause.name if fault.cause else None for fault in report.faults]
    assert causes[1:] == ["norm weight plus one", "tensor of another layer"]


@pytest.mark.parametrize(
    ("hides", "first"),
    [
        (("attn.q", "attn.k", "attn.v"), "layers.0.attn.scores"),
        (("attn.q", "attn.k", "attn.v", "scores", "pattern"), "layers.0.attn.z"),
    ],
)
def test_a_mistake_in_tensors_that_were_not_observed(hides, first):
    """The wrong weights of k show only in what follows from them."""

    def change(weights):
        weights["layers.0.attn.k_proj.weight"] = weights["layers.1.attn.k_proj.weight"]

    report = _pair(GPT, change, hides=hides)
    assert report.first is not None and report.cause is not None
    assert report.first.name == first
    assert report.cause.name == "tensor of another layer"
    assert "k_proj.weight" in report.cause.evidence


def test_where_no_hypothesis_fits_none_is_named():
    def run(rows, steps):
        seen = inner.observe(rows, steps)
        x = seen["layers.0.attn_out"]
        seen["layers.0.attn_out"] = x + x.roll(1, 1) * x.roll(3, 2)
        return seen

    inner = from_model(random_model(LLAMA, torch.float32), "B")
    side = replace(inner, run=run, config=None, weights=None, dialect=None)
    report = compare(from_model(random_model(LLAMA, torch.float32), "A"), side, ROWS)
    assert report.first is not None and report.first.name == "layers.0.attn_out"
    assert report.first.cause is None and "no known cause" in report.summary()
    assert len(report.first.tried) > 10


@pytest.mark.parametrize("unit", [0.0, 2.0**-8])  # of float64, of bfloat16
@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(theta=2e4),
        RopeConfig(theta=2e4, type="linear", factor=4.0),
        RopeConfig(type="yarn", factor=16.0, original_context=2048),
        RopeConfig(type="yarn", factor=4.0, original_context=256, attention_factor=1.0),
        RopeConfig(type="llama3", factor=8.0, original_context=64),
    ],
    ids=str,
)
def test_a_scaling_is_among_the_few_that_fit_the_measured_angles(rope, unit):
    """Angles of 20 tokens, known up to whole turns, with the noise that is left of the roundoff."""
    doubt = unit / 8
    turns = frequencies(rope, 32, length=0, dtype=torch.float64)
    random = torch.Generator().manual_seed(0)
    angles = torch.arange(20)[:, None] * turns
    angles += doubt * torch.randn(angles.shape, generator=random)
    wrapped = torch.atan2(angles.sin(), angles.cos())
    found = list(fitting(RopeConfig(), wrapped, torch.arange(20), replace(LLAMA), doubt))
    assert rope in [changed for changed, _, _ in found], found
    assert len(found) <= 8


def test_a_fault_of_all_layers_begins_where_it_is_smaller_than_one_rounding():
    """Another original context changes layer 0 of the demo by half a bfloat16 rounding."""
    fault = next(f for f in FAULTS if f.name == "another original context, hooks only")
    subject = from_language_model(pellucid.load("demo"))
    report = run_fault(fault, subject, "bfloat16", shown=False)
    assert report.first is not None and report.first.name == "layers.0.attn.z"
    assert report.cause is not None and report.cause.name == "RoPE original context"
    assert "within rounding by its size" in report.first.measure.note
    later = next(each for each in report.faults if each.name == "layers.1.attn.z")
    assert later.measure.verdict == "diverged"


def test_a_fault_of_one_layer_does_not_begin_before_it():
    """Zeroed values in layer 1, in bfloat16: layer 0 stays as it is."""
    a = from_model(random_model(LLAMA, torch.bfloat16), "A")
    model = random_model(LLAMA, torch.bfloat16)
    with torch.no_grad():
        model.state_dict()["layers.1.attn.v_proj.weight"][:4] = 0
    b = replace(from_model(model, "B"), config=None, weights=None, dialect=None)
    report = compare(a, b, ROWS)
    assert report.first is not None and report.first.name == "layers.1.attn.v"
    assert not [f for f in report.faults if f.name.startswith("layers.0")]
