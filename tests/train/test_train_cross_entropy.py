"""The loss without its logits against the plain one, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid.models import GPTConfig, LlamaConfig, build, initialise
from pellucid.train import (
    IGNORED,
    Batch,
    cross_entropy,
    next_token_objective,
    plain_next_token_objective,
)
from pellucid.train.cross_entropy import linear_cross_entropy
from pellucid.train.objective import document_starts
from pellucid.train.parallel import vocabulary


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (3, 7, 5), weight (11, 5), targets (3, 7) of which some are ignored."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (3, 7), generator=generator)
    targets[1, 2:5] = IGNORED
    targets[2] = IGNORED
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = (hidden @ weight.t()).flatten(0, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize("chunk", [1, 2, 4, 20, 21, 100, None])
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk: int | None):
    hidden, weight, targets = problem(torch.float64)
    wanted = plain(hidden, weight, targets)
    wanted_grads = torch.autograd.grad(wanted * 0.25, (hidden, weight))
    loss = linear_cross_entropy(hidden, weight, targets, chunk=chunk)
    grads = torch.autograd.grad(loss * 0.25, (hidden, weight))
    torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=1e-12)
    for got, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def test_in_one_piece_the_loss_is_that_of_pytorch_to_the_bit():
    hidden, weight, targets = problem(torch.float32)
    logits = F.linear(hidden.detach().flatten(0, 1), weight.detach())
    wanted = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    assert linear_cross_entropy(hidden, weight, targets).equal(wanted)


def test_a_second_backward_pass_is_refused_and_not_wrong():
    hidden, weight, targets = problem(torch.float64)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


def test_without_a_gradient_and_for_one_side_alone():
    hidden, weight, targets = problem(torch.float64)
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert not alone.requires_grad
    torch.testing.assert_close(alone, plain(hidden, weight, targets).detach(), rtol=1e-12, atol=0)
    for frozen in (hidden, weight):
        frozen.requires_grad_(False)
        other = weight if frozen is hidden else hidden
        (got,) = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), other)
        (want,) = torch.autograd.grad(plain(hidden, weight, targets), other)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        frozen.requires_grad_(True)


def test_bfloat16_products_under_autocast_stay_within_their_rounding():
    hidden, weight, targets = problem(torch.float32)
    wanted = plain(hidden, weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets, chunk=4)
    assert loss.dtype == torch.float32
    assert loss.item() != wanted.item()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)
    got = torch.autograd.grad(loss, (hidden, weight))
    want = torch.autograd.grad(wanted, (hidden, weight))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=3e-2, rtol=3e-2)


def test_a_probability_of_zero_is_a_large_loss_and_no_infinity():
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[1.0], [-1.0]])
    assert linear_cross_entropy(hidden, weight, torch.tensor([1])).item() == 400.0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_the_objective_of_a_model_equals_the_plain_one(family: str, tied: bool, masked: bool):
    if family == "gpt2":
        config = GPTConfig(
            vocab_size=13, context_length=6, width=8, n_layers=2, n_heads=2, tied=tied
        )
    else:
        config = LlamaConfig(
            vocab_size=13,
            width=8,
            n_layers=2,
            n_heads=2,
            n_kv_heads=1,
            head_dim=4,
            hidden_width=16,
            tied=tied,
        )
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(13, (3, 7), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, :3] = IGNORED
    documents = torch.tensor([[0, 0, 0, 1, 1, 2]] * 3) if masked else None
    batch = Batch(tokens[:, :-1], targets, documents)
    results = []
    for objective in (next_token_objective, plain_next_token_objective):
        model = build(config, "meta")
        initialise(model, torch.Generator().manual_seed(0))
        model.double()
        loss, count = objective(model, batch)
        loss.backward()
        assert count == 15
        results.append((loss.detach(), [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], atol=1e-12, rtol=1e-12)


def test_documents_say_where_each_token_s_text_begins():
    tokens = torch.zeros(2, 6, dtype=torch.long)
    assert document_starts(Batch(tokens, tokens)) is None
    numbers = torch.tensor([[0, 0, 0, 1, 1, 2], [4, 4, 5, 5, 5, 5]])
    starts = document_starts(Batch(tokens, tokens, numbers))
    assert starts is not None
    assert starts.tolist() == [[0, 0, 0, 3, 3, 5], [0, 0, 2, 2, 2, 2]]


def test_a_vocabulary_that_ranks_share_has_a_loss_of_its_own(monkeypatch):
    hidden, weight, targets = problem(torch.float32)
    weight.device_mesh = "several ranks"  # as a DTensor has
    taken = []
    monkeypatch.setattr(
        vocabulary, "split_linear_cross_entropy", lambda *given: taken.extend(given)
    )
    linear_cross_entropy(hidden, weight, targets)
    rows, same, flat, most = taken
    assert torch.equal(rows, hidden.view(21, 5)) and same is weight
    assert torch.equal(flat, targets.view(21)) and most == 2**26


def test_as_many_rows_at_a_time_as_keep_the_logits_small(monkeypatch):
    hidden, weight, targets = problem(torch.float32)
    taken = []
    monkeypatch.setattr(
        cross_entropy._LinearCrossEntropy, "apply", lambda *given: taken.append(given[-1])
    )
    large = torch.zeros(1).expand(2**13, 1)  # 4,096 rows of logits of 32 KB each: 128 MB, not 64
    linear_cross_entropy(torch.zeros(1).expand(2**12, 1), large, torch.zeros(2**12).long())
    assert taken.pop() == 2**11
    whole = 21 * 11 * 4  # bytes of all logits: 21 rows, 11 tokens, float32
    for most, rows in ((whole, 21), (whole - 1, 11), (11 * 4 * 5, 5), (11 * 4, 1)):
        monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", most)
        linear_cross_entropy(hidden, weight, targets)
        assert taken.pop() == rows
