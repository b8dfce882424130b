"""Products that keep no weight's copy: autocast's numbers, bit for bit, and less held."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pellucid.models import Config, GPTConfig, LlamaConfig, Model, build, initialise
from pellucid.train import Batch, next_token_objective
from pellucid.train.lean_products import LeanProducts
from pellucid.train.precision import training_precision

GPT2 = GPTConfig(
    vocab_size=128, context_length=16, width=32, n_layers=2, n_heads=4, resid_dropout=0.1
)
LLAMA = LlamaConfig(
    vocab_size=128, width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_width=48
)


def model_of(config: Config) -> Model:
    model = build(config, "meta")
    initialise(model, torch.Generator().manual_seed(0))
    return model


def batch() -> Batch:
    tokens = torch.randint(128, (4, 17), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_loss_and_gradients_are_autocast_s_to_the_bit(config: Config):
    results: list[tuple[Tensor, dict[str, Tensor | None]]] = []
    for lean in (False, True):
        model = model_of(config)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            if lean:
                with LeanProducts():
                    loss, _ = next_token_objective(model, batch())
            else:
                loss, _ = next_token_objective(model, batch())
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    (plain, wanted), (ours, gradients) = results
    assert torch.equal(plain, ours)
    for name, gradient in wanted.items():
        assert gradient is not None
        assert torch.equal(gradients[name], gradient), name


def test_no_weight_is_saved_twice_and_activations_are_cast_once():
    model = model_of(GPT2)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
        LeanProducts(),
    ):
        hidden = model.hidden(batch().inputs)
    shapes = {tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim == 2}
    shapes |= {(columns, rows) for rows, columns in shapes}
    others = [tensor for place, tensor in held.items() if place not in parameters]
    assert others
    assert not [tensor for tensor in others if tuple(tensor.shape) in shapes]
    assert hidden.requires_grad


def test_without_a_gradient_and_in_another_dtype_it_stays_away():
    layer = torch.nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with torch.no_grad(), LeanProducts():
        assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    with LeanProducts():
        assert layer.double()(x.double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler's own looking
@pytest.mark.parametrize("forward_alone", [False, True])
def test_it_does_not_cut_the_graph_of_a_compiled_block(forward_alone: bool):
    graphs, model = [], model_of(LLAMA)

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in model.layers:
        if forward_alone:  # as where a block is sharded, whose hooks stay outside
            block.forward = torch.compile(block.forward, backend=backend)
        else:
            block.compile(backend=backend)
    with training_precision(model, bfloat16=True):
        next_token_objective(model, batch())
    assert len(graphs) == 1
    torch._dynamo.reset()
