"""Faults below one rounding of bfloat16 and float16, told by which bits the values have."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny import GPT, LLAMA, random_model, random_tokens

from pellucid.diff import compare, from_model
from pellucid.diff.replay.bits import read_bits, unlikeliness
from pellucid.diff.replay.operations import Setting
from pellucid.diff.replay.replay import Replay
from pellucid.models import build
from pellucid.numerics import dialect

ROWS = [random_tokens(LLAMA, 64).tolist()]


def _report(change=None, edit=None, config=LLAMA, dtype=torch.bfloat16, shown=False):
    """A model against its copy with a `change` of weights or config, or an `edit` of its trace."""
    model = random_model(config, dtype)
    weights, theirs = dict(model.state_dict()), config
    if change is not None:
        theirs = change(weights, config) or config
    other = build(theirs)
    other.load_state_dict(weights, assign=True)
    inner = from_model(other.eval(), "B")

    def run(rows, steps):
        seen = inner.observe(rows, steps)
        for name, made in (edit or {}).items():
            seen[name] = made(seen)
        return seen

    b = replace(inner, run=run)
    b = b if shown else replace(b, weights=None, config=None, dialect=None)
    return compare(from_model(model, "A"), b, ROWS)


def test_the_bound_on_the_binomials_tail_holds_and_is_sharp():
    for n, p in ((50, 0.01), (1000, 0.002), (400, 0.5)):
        tail = 0.0
        for k in range(n, int(n * p), -1):
            log = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
            tail += math.exp(log + k * math.log(p) + (n - k) * math.log1p(-p))
            told = float(unlikeliness(*(torch.tensor([float(x)]) for x in (k, n, p))))
            assert tail <= math.exp(-told) * (1 + 1e-5)
            if 1e-30 < tail < 1e-6:
                assert told > -math.log(tail) - 5
    few = unlikeliness(torch.tensor([3.0]), torch.tensor([1000.0]), torch.tensor([0.01]))
    assert float(few) == 0  # fewer than expected are no surprise


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt2"])
def test_an_eps_too_small_to_move_a_norm_by_one_rounding_is_named(config, dtype):
    times = 20 if dtype == torch.bfloat16 else 3

    def change(weights, config):
        return replace(config, norm_eps=config.norm_eps * times)

    report = _report(change, config=config, dtype=dtype)
    assert report.first is not None and report.first.name == "layers.0.attn_norm"
    assert report.first.measure.error_b < 2 * report.first.measure.error_a  # sizes say nothing
    assert report.cause is not None and report.cause.name == "norm eps"
    assert "have its bits" in report.cause.evidence


def test_one_weight_of_a_product_is_seen_in_its_channel():
    def change(weights, config):
        weight = weights["layers.1.mlp.up_proj.weight"].clone()
        weight[5] *= 1.004
        weights["layers.1.mlp.up_proj.weight"] = weight

    report = _report(change)
    assert report.first is not None and report.first.name == "layers.1.mlp.up"
    assert report.first.measure.where == "channel 5" and "bits" in report.first.measure.note


def _permuted(seen, weights, stem, source, dims):
    """A product with its terms in another order, in float32, rounded once."""
    x, weight = seen[source].float(), weights[stem].float()
    order = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(9))
    y = x[..., order] @ weight[:, order].T
    return (y if dims is None else y.unflatten(-1, dims).transpose(1, 2)).bfloat16()


def test_sums_in_another_order_are_within_rounding():
    weights = random_model(LLAMA, torch.bfloat16).state_dict()
    stem = "layers.1.mlp.down_proj.weight"

    def other(seen):
        return _permuted(seen, weights, stem, "layers.1.mlp.hidden", None)

    report = _report(edit={"layers.1.mlp_out": other})
    assert [f for f in report.faults if f.name == "layers.1.mlp_out"] == []


def _norm(seen, name, source, how):
    weight = random_model(LLAMA, torch.bfloat16).state_dict()[f"{name}.weight"]
    return how(seen[source], weight)


def test_a_norm_that_rounds_later_than_ours_is_as_good():
    """torch's own RMSNorm rounds once, after the weight; ours twice."""

    def once(x, weight):
        y = F.rms_norm(x.float(), weight.shape, weight.float(), LLAMA.norm_eps)
        return y.to(torch.bfloat16)

    name, source = "layers.1.mlp_norm", "layers.1.resid_mid"
    report = _report(edit={name: lambda seen: _norm(seen, name, source, once)})
    assert [f for f in report.faults if f.name == name] == []


def test_a_norm_that_multiplies_by_a_rounded_scale_is_named():
    def early(x, weight):
        scale = (x.float().pow(2).mean(-1, keepdim=True) + LLAMA.norm_eps).rsqrt()
        return x * scale.to(x.dtype) * weight

    name, source = "layers.1.mlp_norm", "layers.1.resid_mid"
    report = _report(edit={name: lambda seen: _norm(seen, name, source, early)})
    fault = next(f for f in report.faults if f.name == name)
    assert fault.cause is not None and fault.cause.name == "norm cast order"


def test_inputs_that_were_used_before_they_were_rounded_are_no_fault():
    """A kernel that adds and normalises writes the sum down rounded, and reads it as it was."""
    weights = random_model(GPT, torch.bfloat16).state_dict()

    def fused(seen):
        whole = seen["layers.1.resid_pre"].float() + seen["layers.1.attn_out"].float()
        shape = whole.shape[-1:]
        held = (weights[f"layers.1.mlp_norm.{kind}"].float() for kind in ("weight", "bias"))
        return F.layer_norm(whole, shape, *held, GPT.norm_eps).bfloat16()

    report = _report(edit={"layers.1.mlp_norm": fused}, config=GPT)
    assert [f for f in report.faults if f.name == "layers.1.mlp_norm"] == []


def test_a_bias_that_is_added_after_rounding_is_no_fault():
    weights = random_model(GPT, torch.bfloat16).state_dict()
    stem = "layers.0.mlp.up_proj"

    def twice(seen):
        y = _permuted(seen, weights, f"{stem}.weight", "layers.0.mlp_norm", None)
        return y + weights[f"{stem}.bias"]

    report = _report(edit={"layers.0.mlp.pre": twice}, config=GPT)
    assert [f for f in report.faults if f.name == "layers.0.mlp.pre"] == []


def test_a_side_in_bfloat16_is_held_to_the_bits_of_its_own_arithmetic():
    """Against a float32 model: what bfloat16 explains is explained, and an eps is not."""
    a = from_model(random_model(LLAMA, torch.float32), "A")
    for eps, verdict in ((LLAMA.norm_eps, "explained"), (LLAMA.norm_eps * 20, "diverged")):
        model = random_model(LLAMA, torch.bfloat16)
        other = build(replace(LLAMA, norm_eps=eps))
        other.load_state_dict(model.state_dict(), assign=True)
        b = replace(from_model(other.eval(), "B"), config=None)
        assert compare(a, b, ROWS).verdict == verdict


def test_scores_may_be_multiplied_or_divided_by_their_scale():
    """Products are rounded first, and one mantissa of a thousand is then near a tie: where all keys
    are alike, so that a token has it in all its scores, the two ways differ in every one."""
    config, dtype = replace(LLAMA, head_dim=8), torch.float16
    products = torch.arange(1024, 2048).to(dtype) / 64
    ways = {"divide": products / config.head_dim**0.5, "multiply": products * config.head_dim**-0.5}
    tie = products[ways["divide"] != ways["multiply"]][0]
    q = torch.zeros(1, config.n_heads, 32, config.head_dim, dtype=dtype)
    k = torch.zeros(1, config.n_kv_heads, 32, config.head_dim, dtype=dtype)
    q[..., 0], k[..., 0] = tie, 1
    name = "layers.0.attn.scores"
    held = {"layers.0.attn.q_rotated": q, "layers.0.attn.k_rotated": k}
    setting = Setting(
        config=config, dialect=dialect("hf", "llama"), weights=lambda _: None, dtype=dtype
    )
    replay = Replay(held, setting)
    near, exact = replay.compute(name), Replay(held, setting.wide()).compute(name)
    for way in (tie / config.head_dim**0.5, tie * config.head_dim**-0.5):
        assert read_bits(replay, name, near, exact, way.expand_as(near)) is None
    wrong = near.clone()
    wrong[0, 0, 7] += 2.0**-7  # the same rounding in all keys is one
    assert read_bits(replay, name, near, exact, wrong) is None
    wrong[0, 0, 7] += 2.0**-7 * torch.arange(32)
    assert read_bits(replay, name, near, exact, wrong) is not None
