"""Any module in one call: what is recorded, what it is taken for, and which mistake is found."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign_modules import Bare, ByHead, Cached, Grouped
from tiny import GPT, LLAMA, random_model
from torch import nn

import pellucid
from pellucid.diff.sides.maps import read_map

TOKENS = list(range(3, 23))
KINDS = {"grouped": (Grouped, LLAMA), "bare": (Bare, GPT), "cached": (Cached, LLAMA),
         "by head": (ByHead, LLAMA)}  # fmt: skip


def pair(kind, wrong=""):
    make, config = KINDS[kind]
    ours = random_model(config, torch.float32)
    return ours, make(config, ours.state_dict(), wrong).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_module_has_no_fault_and_needs_no_map(kind, tmp_path):
    ours, theirs = pair(kind)
    report = pellucid.diff(ours, theirs, TOKENS, map_out=tmp_path / "found.yaml")
    assert report.verdict == "within-rounding", report.summary()
    assert not report.static and not report.faults
    seen = {row.name for row in report.tensors}
    for layer in (0, 1):
        leaves = ("resid_pre", "attn.v", "attn.z", "attn_out", "resid_mid", "mlp_norm", "mlp_out")
        assert {f"layers.{layer}.{leaf}" for leaf in leaves} <= seen
    assert "logits" in seen and report.sides[1].parameters == len(ours.state_dict())
    told = read_map((tmp_path / "found.yaml").read_text(), "found")
    again = pellucid.diff(ours, pellucid.record(theirs, torch.tensor([TOKENS]), *given(kind)),
                          TOKENS, name_map=tmp_path / "found.yaml")  # fmt: skip
    assert told.entries and {row.name for row in again.tensors} == seen
    assert again.verdict == "within-rounding"


def test_a_mask_that_adds_ten_thousand_is_a_mask():
    report = pellucid.diff(*pair("bare", "added"), TOKENS)
    assert "layers.1.attn.masked_scores" in {row.name for row in report.tensors}
    assert report.verdict == "within-rounding", report.summary()


def given(kind):
    return (0,) if kind == "cached" else ()


FAULTS = {
    ("grouped", "eps"): ("layers.0.attn_norm", "norm eps"),
    ("grouped", "mask"): ("mask", "mask missing"),
    ("grouped", "scale"): ("layers.0.attn.z", "attention scale"),
    ("grouped", "branch"): ("layers.0.mlp.act", "SwiGLU on the wrong branch"),
    ("grouped", "tiled"): ("layers.0.attn.z", "GQA heads tiled"),
    ("grouped", "theta"): ("layers.0.attn.q_rotated", "RoPE theta"),
    ("grouped", "pairs"): ("layers.0.attn.q_rotated", "RoPE pairing"),
    ("bare", "places"): ("layers.0.resid_pre", "position embedding missing"),
    ("bare", "norm"): ("layers.0.mlp_norm", "swapped weights"),
    ("bare", "stream"): ("layers.0.resid_post", "residual after the norm"),
    ("bare", "mask"): ("layers.0.attn.masked_scores", "mask one too wide"),
    ("bare", "scale"): ("layers.0.attn.masked_scores", "attention scale"),
    ("bare", "axis"): ("layers.0.attn.pattern", "softmax axis"),
    ("bare", "join"): ("layers.0.attn_out", "heads joined wrongly"),
    ("bare", "erf"): ("layers.0.mlp.act", "GELU form"),
    ("cached", "halves"): ("layers.0.attn.q_rotated", "RoPE pairing"),
    ("cached", "values"): ("layers.0.attn.v", "values rotated too"),
    ("cached", "gelu"): ("layers.0.mlp.act", "activation"),
    ("cached", "norms"): ("layers.0.attn_norm", "swapped weights"),
    ("cached", "keys"): ("layers.0.attn.k", "swapped weights"),
    ("grouped", "behind"): ("layers.0.attn_norm", "norm behind its branch"),
    ("grouped", "skipped"): ("layers.1.resid_post", "layer skipped"),
    ("grouped", "both"): ("layers.0.mlp.hidden", "activation of the wrong product"),
    ("grouped", "parallel"): ("layers.0.resid_mid", "attention and MLP in parallel"),
    ("grouped", "scaled"): ("layers.0.resid_pre", "embedding scaled"),
    ("grouped", "clamped"): ("layers.0.attn.q_rotated", "other positions"),
    ("bare", "constant"): ("layers.0.mlp.act", "GELU constants"),
    ("by head", "scale"): ("layers.0.attn.z", "attention scale"),
    ("grouped", "sign"): ("layers.0.attn.q_rotated", "RoPE direction"),
    ("grouped", "written"): ("layers.0.attn.q_rotated", "RoPE pairing"),
    ("by head", "q"): ("layers.0.attn.q", "reordered values"),
    ("grouped", "exchanged"): ("layers.0.attn.q_rotated", "q and k exchanged"),
    ("bare", "shift"): ("layers.0.attn_out", "other bias"),
}


@pytest.mark.parametrize(("kind", "wrong"), FAULTS)
def test_a_mistake_is_found_without_a_map(kind, wrong):
    ours, theirs = pair(kind, wrong)
    report = pellucid.diff(ours, theirs, TOKENS)
    assert report.first is not None and report.cause is not None
    assert (report.first.name, report.cause.name) == FAULTS[kind, wrong]


def test_wrong_weights_are_named_by_their_values():
    ours, theirs = pair("cached")
    first, second = theirs.parts
    second.wo.weight.data = first.wo.weight.data
    first.w1.weight.data[3, 5] *= -1
    report = pellucid.diff(ours, theirs, TOKENS)
    assert {found.name: found.cause for found in report.static} == {
        "layers.0.mlp.gate_proj.weight": "one bit flipped",
        "layers.1.attn.o_proj.weight": "tensor of another layer",
    }
    assert report.first.name == "layers.0.mlp.gate"


def test_a_saved_recording_brings_its_weights_and_says_the_same(tmp_path):
    ours, theirs = pair("grouped", "eps")
    pellucid.record(theirs, torch.tensor([TOKENS])).save(tmp_path / "seen.safetensors")
    report = pellucid.diff(ours, tmp_path / "seen.safetensors")
    assert (report.first.name, report.cause.name) == FAULTS["grouped", "eps"]
    assert report.sides[1].parameters == len(ours.state_dict())


@pytest.mark.parametrize("wrong", ["", "restart"])
def test_decoding_steps_of_a_method_that_calls_the_module(wrong):
    ours, theirs = pair("cached", wrong)
    seen = pellucid.record(theirs.continued, torch.tensor([TOKENS]), 2)
    assert seen["step.2.tokens"].shape == (1, 1)
    report = pellucid.diff(ours, seen)
    assert "step.2.layers.1.attn.k_rotated" in {row.name for row in report.tensors}
    if not wrong:
        assert report.verdict == "within-rounding", report.summary()
        return
    assert report.first.name == "step.1.layers.0.attn.q_rotated", report.summary()


def test_what_is_recorded():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)

        def forward(self, x, scale):
            y = self.a(x)
            z = torch.softmax(y, -1)
            y *= scale  # written over after it was recorded
            return self.a(y), z

    module, x = Doubled(), torch.randn(1, 4)
    seen = pellucid.record(module, x, scale=2.0)
    first = x @ module.a.weight.T
    assert torch.equal(seen["given.0"], x) and torch.allclose(seen["a"], first)
    assert torch.allclose(seen["softmax()"], first.softmax(-1))
    assert torch.allclose(seen["a(2).input"], 2 * first)
    assert torch.equal(seen["returned"], seen["a(2)"])
    assert torch.equal(seen["weights.a.weight"], module.a.weight)
    hooks = [h for m in module.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    assert not any(hooks)


@pytest.mark.filterwarnings("ignore")
def test_compiled_and_distributed_wrappers_are_taken_off(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    ours, theirs = pair("bare", "erf")
    wrapped = [torch.compile(theirs), torch.compile(copy.deepcopy(theirs).blocks[0])]
    assert pellucid.diff(ours, wrapped[0], TOKENS).first.name == "layers.0.mlp.act"
    inner = copy.deepcopy(theirs)
    inner.blocks[0] = wrapped[1]
    assert pellucid.diff(ours, inner, TOKENS).first.name == "layers.0.mlp.act"
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        flat = [
            FullyShardedDataParallel(
                copy.deepcopy(theirs), device_id=torch.device("cpu"), use_orig_params=kept
            )
            for kept in (True, False)
        ]
        for model in (DistributedDataParallel(theirs), *flat, fully_shard(copy.deepcopy(theirs))):
            report = pellucid.diff(ours, model, TOKENS)
            assert report.first.name == "layers.0.mlp.act", report.summary()
            assert not report.static
    finally:
        dist.destroy_process_group()


def test_what_cannot_be_recorded_is_one_line():
    ours, theirs = pair("bare")
    with pytest.raises(TypeError, match="record was given a int"):
        pellucid.record(3)
    with pytest.raises(ValueError, match="both sides are modules of no known make"):
        pellucid.diff(theirs, theirs, TOKENS)
    with pytest.raises(ValueError, match="steps are for models whose cache is known"):
        pellucid.diff(ours, theirs, TOKENS, steps=2)
    with pytest.raises(ValueError, match="neither side has a tokenizer"):
        pellucid.diff(ours, theirs, "text")
    with pytest.raises(ValueError, match=r"Bilinear could not be called with token ids \(1, 20\)"):
        pellucid.diff(ours, nn.Bilinear(3, 3, 3), TOKENS)
    with pytest.raises(ValueError, match="give a name_map"):
        pellucid.diff(ours, nn.Embedding(97, 5), TOKENS)


def test_a_report_shows_itself_as_text_and_as_a_page():
    report = pellucid.diff(*pair("bare", "erf"), TOKENS)
    told = str(report)
    assert "FIRST" in told and "layers.0.mlp.act" in told and "DIVERGED" in told
    page = report._repr_html_()
    assert page.startswith("<iframe srcdoc=") and "GELU form" in page and "<h1" not in page
