"""`tap` and `trace`: recording, edits, gradients, and that neither changes a run."""

from __future__ import annotations

import threading
from fnmatch import fnmatchcase

import pytest
import torch
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from pellucid import graph
from pellucid.models import Cache
from pellucid.numerics import NAMES
from pellucid.trace import Trace, is_open, set_step, tap, trace
from pellucid.trace_plan import estimated_bytes

TOKENS = random_tokens(LLAMA, 1, 8)


class Doubler(nn.Module):
    """The smallest module with taps."""

    def forward(self, x):
        """x -> 2x + 1."""
        x = tap(self, "double", 2 * x)
        return tap(self, "plus_one", x + 1)


def test_tap_without_a_trace_returns_the_very_tensor():
    x = torch.ones(3)
    assert tap(nn.Module(), "leaf", x) is x
    assert not is_open()


def test_a_trace_holds_the_tensors_themselves():
    model, x = Doubler(), torch.ones(3)
    with trace(model) as seen:
        assert is_open()
        result = model(x)
    assert not is_open()
    assert list(seen) == ["double", "plus_one"]
    assert seen["plus_one"].data_ptr() == result.data_ptr()
    assert torch.equal(seen["double"], 2 * x)


def test_neighbouring_names_share_their_memory():
    model = random_model(LLAMA)
    with trace(model) as seen:
        logits = model(TOKENS)
    assert seen["logits"].data_ptr() == logits.data_ptr()
    assert seen["layers.0.resid_post"].data_ptr() == seen["layers.1.resid_pre"].data_ptr()
    assert seen["tokens"].data_ptr() == TOKENS.data_ptr()
    assert seen["layers.0.resid_pre"].data_ptr() == seen["embed"].data_ptr()


def test_modules_outside_the_traced_model_are_not_recorded():
    model, other = Doubler(), Doubler()
    with trace(model) as seen:
        other(torch.ones(3))
    assert not seen


@pytest.mark.parametrize(
    "only",
    ["logits", "layers.*.attn.pattern", ["embed", "layers.1.*"], ["layers.[0]*"], "no.such", []],
)
def test_only_keeps_what_matches_in_order(only):
    model = random_model(LLAMA)
    globs = [only] if isinstance(only, str) else only
    with trace(model, only=only) as seen:
        model(TOKENS)
    expected = [n for n in graph.expand(LLAMA) if any(fnmatchcase(n, glob) for glob in globs)]
    assert list(seen) == expected


def test_a_value_does_not_depend_on_what_else_is_recorded():
    model = random_model(LLAMA, torch.float32)
    with trace(model) as everything:
        model(TOKENS)
    with trace(model, only="logits") as one:
        model(TOKENS)
    assert torch.equal(everything["logits"], one["logits"])


# ── Edits ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_an_edit_of_any_name_feeds_the_rest_and_nothing_before(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    tokens = random_tokens(config, 1, 8)
    with trace(model) as plain:
        model(tokens)
    order = list(plain)
    for name in (n for n in order if plain[n].is_floating_point() and "masked" not in n):
        with trace(model, edit={name: lambda x: x * 1.5 + 0.25}) as edited:
            logits = model(tokens)
        torch.testing.assert_close(edited[name], plain[name] * 1.5 + 0.25)
        for before in order[: order.index(name)]:
            assert torch.equal(edited[before], plain[before]), f"{name} reached back to {before}"
        assert not torch.allclose(logits, plain["logits"]), f"the edit of {name} fed nothing"


def test_an_edit_equals_a_forward_patched_by_hand(monkeypatch):
    model = random_model(LLAMA)
    edit = {"layers.0.mlp_out": lambda x: x * 0, "layers.1.attn.z": lambda z: z.flip(1)}
    with trace(model, edit=edit) as seen:
        model(TOKENS)

    zeroed, projected = model.layers[0].mlp, model.layers[1].attn.o_proj
    monkeypatch.setattr(zeroed, "forward", lambda x: torch.zeros_like(x))
    into = projected.forward

    def heads_reversed(z):
        return into(z.unflatten(-1, (LLAMA.n_heads, LLAMA.head_dim)).flip(2).flatten(2))

    monkeypatch.setattr(projected, "forward", heads_reversed)
    with torch.no_grad():
        by_hand = model(TOKENS)
    torch.testing.assert_close(seen["logits"], by_hand, rtol=0, atol=1e-12)


def test_swapping_in_another_run_carries_its_answer_over():
    model = random_model(GPT)
    one, other = random_tokens(GPT, 1, 6), random_tokens(GPT, 1, 6, seed=1)
    with trace(model) as donor:
        model(other)
    with trace(
        model, edit={"layers.1.resid_pre": lambda _: donor["layers.1.resid_pre"]}
    ) as patched:
        model(one)
    assert torch.equal(patched["logits"], donor["logits"])


def test_an_edit_in_place_reaches_nothing_before_it():
    model = random_model(LLAMA)
    with trace(model) as plain:
        model(TOKENS)
    with trace(model, edit={"layers.1.resid_pre": lambda x: x.zero_()}) as edited:
        model(TOKENS)
    assert not edited["layers.1.resid_pre"].any()
    assert torch.equal(edited["layers.0.resid_post"], plain["layers.0.resid_post"])


def test_an_edit_keeps_the_dtype_of_the_run():
    model = random_model(LLAMA, torch.bfloat16)
    with trace(model, edit={"embed": lambda x: x.double()}) as seen:
        assert model(TOKENS).dtype == torch.bfloat16
    assert seen["embed"].dtype == torch.bfloat16


def test_an_edit_works_on_names_that_are_not_kept():
    model = random_model(LLAMA)
    with trace(model, only="logits", edit={"embed": torch.zeros_like}) as seen:
        model(TOKENS)
    assert list(seen) == ["logits"]
    assert not seen["logits"].any()  # a Llama without biases makes nothing of nothing


def test_an_edit_that_meets_no_tensor_is_an_error():
    model = random_model(LLAMA)
    for name in ("layers.*.attn.zz", "layers.0.attn.zz[0]", "z", "layers.2.attn.z"):
        with (
            pytest.raises(KeyError, match="no such tensor; did you mean|no such tensor; `"),
            trace(model, edit={name: lambda z: z}),
        ):
            model(TOKENS)


def test_an_edit_that_returns_the_wrong_thing_is_named():
    model = random_model(LLAMA)
    with (
        pytest.raises(ValueError, match=r"layers.0.attn.z returned shape \(1, 4, 8\), .*10\)"),
        trace(model, edit={"layers.0.attn.z": lambda z: z[..., 0]}),
    ):
        model(TOKENS)
    with (
        pytest.raises(TypeError, match=r"embed returned NoneType, expected a tensor"),
        trace(model, edit={"embed": lambda x: None}),
    ):
        model(TOKENS)
    assert not is_open()


def test_an_edited_key_is_what_the_cache_remembers():
    model = random_model(LLAMA)
    replacement = torch.full((1, 2, 8, 10), 0.5, dtype=torch.float64)
    cache = Cache(LLAMA.n_layers)
    with trace(model, edit={"layers.0.attn.k_rotated": lambda _: replacement}):
        model(TOKENS, cache=cache)
    with trace(model) as seen:
        model(random_tokens(LLAMA, 1, 1), cache=cache)
    remembered = cache.layers[0].k[:, :, :9]
    assert torch.equal(remembered[:, :, :8], replacement)
    assert torch.equal(remembered[:, :, 8:], seen["layers.0.attn.k_rotated"])


# ── Gradients ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_equal_autograd_on_the_same_tensors(kind):
    config = CONFIGS[kind]
    model = random_model(config)
    tokens = random_tokens(config, 2, 6)
    with trace(model, gradients=True) as seen:
        model(tokens).logsumexp(-1).sum().backward()
    with trace(model, gradients=True) as again:
        loss = model(tokens).logsumexp(-1).sum()
    differentiable = [name for name, tensor in again.items() if tensor.requires_grad]
    expected = torch.autograd.grad(loss, [again[name] for name in differentiable])
    assert "layers.0.attn.pattern" in differentiable
    assert "tokens" not in differentiable
    for name, gradient in zip(differentiable, expected, strict=True):
        assert torch.equal(seen.grad(name), gradient), name


@pytest.mark.parametrize("name", ["layers.0.attn.pattern", "layers.1.mlp.act", "rope.cos"])
def test_a_gradient_is_the_slope_of_the_loss(name):
    model = random_model(LLAMA)

    def loss(nudge=None):
        with trace(model, edit={name: lambda x: x + nudge} if nudge is not None else None):
            return model(TOKENS).logsumexp(-1).sum()

    edit = {name: lambda x: x.detach().requires_grad_() * 1}  # rope.cos has no graph of its own
    with trace(model, gradients=True, edit=edit) as seen:
        model(TOKENS).logsumexp(-1).sum().backward()
    generator = torch.Generator().manual_seed(1)
    way = torch.randn(seen[name].shape, generator=generator, dtype=torch.float64)
    slope = (loss(1e-5 * way) - loss(-1e-5 * way)) / 2e-5
    torch.testing.assert_close((seen.grad(name) * way).sum(), slope, rtol=1e-7, atol=1e-7)


def test_a_gradient_has_addresses_too():
    model = random_model(LLAMA)
    with trace(model, gradients=True) as seen:
        model(TOKENS).sum().backward()
    assert torch.equal(seen.grad("layers.0.attn.q[1,2]"), seen.grad("layers.0.attn.q")[0, 1, 2])


def test_a_missing_gradient_says_how_to_get_one():
    model = random_model(LLAMA)
    with trace(model) as seen:
        model(TOKENS)
    with pytest.raises(ValueError, match="gradients=True"):
        seen.grad("logits")
    with pytest.raises(KeyError, match="no tensor 'logit'.*did you mean logits"):
        seen.grad("logit")


def test_a_plain_trace_needs_no_graph():
    model = random_model(LLAMA)
    with trace(model) as seen:
        logits = model(TOKENS)
    assert logits.grad_fn is None
    assert not any(tensor.requires_grad for tensor in seen.values())
    assert torch.is_grad_enabled()


# ── What a trace refuses ─────────────────────────────────────────────────────────────────────────


def test_two_passes_in_one_trace_are_refused():
    model = random_model(LLAMA)
    with pytest.raises(RuntimeError, match="tokens was seen twice"), trace(model):
        model(TOKENS)
        model(TOKENS)


def test_activation_checkpointing_is_refused():
    model = random_model(LLAMA)
    for block in model.layers:
        inside = block.forward
        block.forward = lambda *inputs, inside=inside: checkpoint(
            inside, *inputs, use_reentrant=False
        )
    with (
        pytest.raises(RuntimeError, match="seen twice.*activation checkpointing"),
        trace(model, gradients=True),
    ):
        model(TOKENS).sum().backward()


def test_a_trace_inside_a_trace_is_refused_and_the_outer_goes_on():
    model = random_model(LLAMA)
    with trace(model, only="logits") as seen:
        with pytest.raises(RuntimeError, match="already open"), trace(model):
            pass
        model(TOKENS)
    assert list(seen) == ["logits"]


def test_an_error_in_the_run_closes_the_trace():
    model = random_model(LLAMA)
    with pytest.raises(IndexError), trace(model, edit={"logits": lambda x: x}):
        model(torch.tensor([[LLAMA.vocab_size]]))
    assert not is_open()
    assert torch.is_grad_enabled()


def test_a_trace_sees_nothing_of_other_threads():
    model = random_model(LLAMA)
    elsewhere: list[bool] = []

    def run():
        elsewhere.append(is_open())
        model(TOKENS)

    with trace(model) as seen:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not seen
        model(TOKENS)
    assert elsewhere == [False]
    assert list(seen) == list(graph.expand(LLAMA))


# ── Decoding steps, sizes ────────────────────────────────────────────────────────────────────────


def test_steps_of_decoding_prefix_their_names():
    model = random_model(LLAMA)
    cache = Cache(LLAMA.n_layers)
    with trace(model, only=["layers.1.attn.pattern", "step.2.logits"]) as seen:
        for step, part in enumerate(TOKENS.split([4, 1, 3], dim=1)):
            set_step(step)
            model(part, cache=cache)
    assert {name: tuple(tensor.shape) for name, tensor in seen.items()} == {
        "layers.1.attn.pattern": (1, 4, 4, 4),
        "step.1.layers.1.attn.pattern": (1, 4, 1, 5),
        "step.2.layers.1.attn.pattern": (1, 4, 3, 8),
        "step.2.logits": (1, 3, 97),
    }
    with trace(model, only="layers.1.attn.pattern") as whole:
        model(TOKENS)
    pattern = whole["layers.1.attn.pattern"]
    torch.testing.assert_close(
        seen["step.2.layers.1.attn.pattern"], pattern[:, :, 5:], rtol=0, atol=1e-12
    )


def test_an_edit_with_a_step_meets_that_step_only():
    model = random_model(LLAMA)
    cache = Cache(LLAMA.n_layers)
    edit = {"step.1.embed": torch.zeros_like, "layers.0.mlp_out": lambda x: x + 1}
    with trace(model, only=["embed", "layers.0.mlp_out"], edit=edit) as seen:
        for step, part in enumerate(TOKENS.split([4, 4], dim=1)):
            set_step(step)
            model(part, cache=cache)
    assert seen["embed"].any()
    assert not seen["step.1.embed"].any()
    with trace(model, only="layers.0.mlp_out") as plain:
        model(TOKENS[:, :4])
    torch.testing.assert_close(seen["layers.0.mlp_out"], plain["layers.0.mlp_out"] + 1)


def test_set_step_without_a_trace_is_nothing():
    set_step(5)
    with trace(Doubler()) as seen:
        pass
    assert not seen


def test_a_crop_of_the_cache_leaves_the_trace_alone():
    model = random_model(LLAMA)
    cache = Cache(LLAMA.n_layers)
    with trace(model) as seen:
        model(TOKENS, cache=cache)
    before = {name: tensor.clone() for name, tensor in seen.items()}
    cache.crop(2)
    with torch.no_grad():
        model(random_tokens(LLAMA, 1, 5, seed=3), cache=cache)
    for name, tensor in seen.items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
def test_the_estimate_is_the_size_to_the_byte(kind, name, dtype):
    config = CONFIGS[kind]
    model = random_model(config, dtype, name)
    cache = Cache(config.n_layers)
    tokens = random_tokens(config, 2, 9)
    model(tokens[:, :3], cache=cache)
    for only in ("*", "layers.*.attn.*"):
        with trace(model, only=only) as seen:
            model(tokens[:, 3:], cache=cache)
        cache.crop(3)
        estimate = estimated_bytes(config, 2, 6, 9, dtype.itemsize, only, model.dialect)
        assert estimate == seen.nbytes


def test_a_trace_is_an_ordered_mapping():
    seen = Trace({"b": torch.ones(2), "a": torch.zeros(3)}, {"model": "x"})
    assert list(seen) == ["b", "a"]
    assert len(seen) == 2
    assert repr(seen) == "Trace(2 tensors, 0.0 MB)"
    seen["c"] = torch.ones(1)
    del seen["b"]
    assert list(seen) == ["a", "c"]
    assert "b" not in seen
    with pytest.raises(KeyError, match="no tensor 'b' among the 2"):
        seen["b"]
