"""LoRA against the formula written out, bits of merge and unmerge, and what the rest sees of it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens
from torch import Tensor, nn

from pellucid.models import Model
from pellucid.models import adapters as lora
from pellucid.models.adapters import LoraConfig
from pellucid.trace import trace

ALL = LoraConfig(rank=3, alpha=5.0, targets=("all",))


def adapted(model: Model, config: LoraConfig = ALL, seed: int = 1) -> Model:
    """`model` with adapters whose B is no longer zero."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in lora.inject(model, config).values():
        adapter.b.data = torch.randn(adapter.b.shape, generator=generator).to(adapter.b) / 10
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_an_adapted_model_is_the_model_with_other_weights(config):
    plain, model = random_model(config), adapted(random_model(config))
    tokens = random_tokens(config, 2, 9)
    with torch.no_grad():
        for path, adapter in lora.adapters(model).items():
            weight = plain.get_submodule(path).weight
            weight += 5.0 / 3 * (adapter.b @ adapter.a)  # W + α/r · B A, Hu et al. (3)
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=1e-11)
        lora.merge(model)
        torch.testing.assert_close(model(tokens), plain(tokens), rtol=0, atol=1e-11)


def test_a_new_adapter_changes_nothing():
    plain, model = random_model(LLAMA), random_model(LLAMA)
    lora.inject(model, ALL)
    tokens = random_tokens(LLAMA, 1, 7)
    assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merging_comes_undone_to_the_bit(dtype):
    model = adapted(random_model(GPT, dtype))
    tokens = random_tokens(GPT, 2, 9)
    before, logits = deepcopy(model.state_dict()), model(tokens)
    lora.merge(model)
    lora.merge(model)  # merging twice is merging once
    merged = model.state_dict()
    assert not same(before, merged)
    assert merged.keys() == before.keys()
    lora.unmerge(model)
    assert same(before, model.state_dict())
    assert torch.equal(model(tokens), logits)
    with lora.folded(model):
        assert model.state_dict().keys() == random_model(GPT).state_dict().keys()
        inside = model(tokens)
    assert same(before, model.state_dict())
    assert (inside - logits).abs().max() < (1e-10 if dtype == torch.float64 else 1.0)


def test_extract_gives_the_model_back_and_attach_the_adapters():
    plain, model = random_model(GPT), adapted(random_model(GPT))
    tokens = random_tokens(GPT, 2, 9)
    logits = model(tokens)
    lora.merge(model)
    taken = lora.extract(model)
    assert same(model.state_dict(), plain.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    lora.attach(model, taken)
    assert torch.equal(model(tokens), logits)


def test_fold_leaves_a_plain_model():
    model = adapted(random_model(LLAMA))
    tokens = random_tokens(LLAMA, 2, 9)
    logits = model(tokens)
    lora.fold(model)
    assert not lora.adapters(model)
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-11)
    assert model.state_dict().keys() == random_model(LLAMA).state_dict().keys()


def test_only_adapters_are_trained():
    model = random_model(LLAMA, torch.float32).train()
    before = deepcopy(model.state_dict())
    made = lora.inject(model, ALL)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{path}.{part}" for path in made for part in "ab"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # A has a gradient only once B is no longer zero
        model(random_tokens(LLAMA, 2, 9)).square().mean().backward()
        optimizer.step()
    assert all(adapter.a.grad.abs().max() > 0 for adapter in made.values())
    lora.extract(model)
    assert same(before, model.state_dict())


def test_switched_off_is_the_model_before_even_if_merged():
    plain, model = random_model(LLAMA), adapted(random_model(LLAMA))
    tokens = random_tokens(LLAMA, 2, 9)
    logits = model(tokens)
    with lora.switched_off(model):
        assert torch.equal(model(tokens), plain(tokens))
    assert torch.equal(model(tokens), logits)
    lora.merge(model)
    with lora.switched_off(model):
        assert torch.equal(model(tokens), plain(tokens))


@pytest.mark.parametrize("config", [GPT, LLAMA], ids=["gpt2", "llama"])
def test_a_trace_has_the_names_it_always_had(config):
    model, tokens = random_model(config), random_tokens(config, 1, 5)
    with trace(model) as before:
        model(tokens)
    adapted(model)
    with trace(model) as after:
        logits = model(tokens)
    assert list(before) == list(after)
    assert torch.equal(after["logits"], logits) or (after["logits"] - logits).abs().max() < 1e-11
    assert not torch.equal(before["layers.0.attn.q"], after["layers.0.attn.q"])


@pytest.mark.parametrize(
    ("a", "b"), [((3, 8), (6, 3)), ((3, 7), (5, 3)), ((3, 7), (6, 4)), ((3, 8), (5, 4))]
)
def test_matrices_that_do_not_fit_a_layer_are_refused(a, b):
    fits = lora.Adapter(nn.Linear(7, 6), torch.zeros(3, 7), torch.zeros(6, 3), alpha=6.0)
    assert (fits.rank, fits.scale) == (3, 2.0)
    with pytest.raises(ValueError, match=r"7 to 6: expected \(r, 7\) and \(6, r\)"):
        lora.Adapter(nn.Linear(7, 6), torch.zeros(a), torch.zeros(b), alpha=1.0)


def test_a_new_adapter_begins_as_in_peft_and_asks_for_room_for_its_training(monkeypatch):
    asked = []
    monkeypatch.setattr(lora, "check_room", lambda bytes_, *_: asked.append(bytes_))
    model = random_model(LLAMA, torch.float32)
    made = lora.inject(model, LoraConfig(rank=40, targets=("layers.*.attn.q_proj",)))
    for adapter in made.values():
        bound = 36**-0.5  # 36 inputs
        assert -bound <= adapter.a.min() < -0.95 * bound
        assert 0.95 * bound < adapter.a.max() <= bound
        assert (adapter.b == 0).all()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 40 * (36 + 40)
    assert asked == [16 * trained]  # float32: the number, its gradient and two of AdamW


def test_dropout_is_for_training_and_scales_what_is_left():
    linear = nn.Linear(400, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    one = torch.ones(1, 400, dtype=torch.float64)
    adapter = lora.Adapter(linear, one, one[:, :1].clone(), alpha=1.0, dropout=0.5)
    assert adapter.eval()(one).item() == 400
    torch.manual_seed(0)
    kept = adapter.train()(one).item()
    assert 300 < kept < 500
    assert kept != 400
    assert kept % 2 == 0  # an element that is kept counts twice


def test_adapters_of_a_bfloat16_model_are_float32():
    model = random_model(LLAMA, torch.bfloat16)
    made = lora.inject(model, ALL)
    assert {adapter.a.dtype for adapter in made.values()} == {torch.float32}
    assert model(random_tokens(LLAMA, 1, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (("attention",), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (("mlp",), {"gate_proj", "up_proj", "down_proj"}),
        (("layers.*.attn.[qv]_proj", "layers.1.mlp.up_proj"), {"q_proj", "v_proj", "up_proj"}),
    ],
)
def test_targets(targets, leaves):
    made = lora.inject(random_model(LLAMA), LoraConfig(targets=targets))
    assert {path.split(".")[-1] for path in made} == leaves
    assert [path.split(".")[1] for path in made].count("1") == len(leaves)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"targets": ("attn",)}, "'attn' matches no layer: expected attention, mlp, all, or a"),
        ({"targets": ("unembed",)}, "'unembed' matches no layer"),
        ({"targets": ()}, "no targets"),
        ({"rank": 0}, "rank is 0: expected 1 or more"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_what_cannot_be_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        lora.inject(random_model(LLAMA), LoraConfig(**config))


def test_a_second_set_of_adapters_is_refused():
    model = adapted(random_model(LLAMA))
    with pytest.raises(ValueError, match="has adapters already"):
        lora.inject(model, ALL)


def test_the_same_seed_gives_the_same_adapters():
    first, again, other = (
        lora.inject(random_model(replace(LLAMA, n_layers=1)), ALL, seed) for seed in (3, 3, 4)
    )
    path = "layers.0.attn.q_proj"
    assert torch.equal(first[path].a, again[path].a)
    assert not torch.equal(first[path].a, other[path].a)


@pytest.mark.parametrize("inside", [lora.folded, lora.switched_off])
def test_a_merged_model_is_merged_again_afterwards(inside):
    model = adapted(random_model(GPT))
    lora.merge(model)
    before = deepcopy(model.state_dict())
    with inside(model):
        pass
    assert all(adapter.merged for adapter in lora.adapters(model).values())
    assert same(model.state_dict(), before)
    with pytest.raises(RuntimeError), inside(model):
        raise RuntimeError
    assert same(model.state_dict(), before)


def test_lora_begins_with_a_within_one_over_the_root_of_its_inputs():
    made = lora.inject(random_model(LLAMA), LoraConfig(rank=64))
    for adapter in made.values():
        bound = adapter.a.shape[1] ** -0.5
        assert 0.9 * bound < adapter.a.detach().abs().max() <= bound
