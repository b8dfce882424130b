"""The fixed-shape step that CUDA graphs replay, as far as the CPU goes: one graph, same logits."""

from __future__ import annotations

import pytest
import torch
from tiny import CONFIGS, FEATURES, few_features, random_model, random_tokens

from pellucid.generate.compiled import CompiledSteps
from pellucid.models import Cache

KINDS = ["gpt2", "gpt2-book", "llama-mha", "llama-gqa", "llama-mqa"]


# In bfloat16 the tolerance is wide: two of the kinds tell whether its graph runs at all.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float64) for kind in KINDS), *((k, torch.bfloat16) for k in KINDS[::3])],
)
def test_steps_equal_the_models_own(kind, dtype):
    torch._dynamo.reset()
    model = random_model(CONFIGS[kind], dtype)
    tokens = random_tokens(model.config, 2, 11)
    starts = torch.tensor([0, 3])
    plain, fixed = Cache(model.config.n_layers), Cache(model.config.n_layers)
    with torch.no_grad():
        for cache in (plain, fixed):
            model(tokens[:, :6], cache=cache, starts=starts)
        # "eager" captures the graph, whole or not at all, and runs its operations one by one.
        steps = CompiledSteps(model, fixed, 16, backend="eager")
        for place in range(6, 11):
            expected = model(tokens[:, place : place + 1], cache=plain, starts=starts)[:, -1]
            seen = steps.step(tokens[:, place].tolist(), fixed, starts.tolist())
            tolerance = 1e-12 if dtype == torch.float64 else 0.05
            torch.testing.assert_close(seen, expected, rtol=tolerance, atol=tolerance)
    assert fixed.length == plain.length == 11


def test_all_steps_are_one_graph():
    torch._dynamo.reset()
    model = random_model(CONFIGS["llama-gqa"], torch.float32)
    tokens = random_tokens(model.config, 1, 9)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    cache = Cache(model.config.n_layers)
    with torch.no_grad():
        model(tokens[:, :4], cache=cache)
        steps = CompiledSteps(model, cache, 12, backend=count)
        for place in range(4, 9):
            steps.step(tokens[:, place].tolist(), cache, [0])
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", few_features())
def test_every_feature_is_one_graph_with_the_models_own_logits(kind):
    torch._dynamo.reset()
    model = random_model(FEATURES[kind])
    tokens, starts, graphs = random_tokens(model.config, 2, 13), [0, 3], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, fixed = Cache(model.config.n_layers), Cache(model.config.n_layers)
    with torch.no_grad():
        for cache in (plain, fixed):
            model(tokens[:, :4], cache=cache, starts=torch.tensor(starts))
        steps = CompiledSteps(model, fixed, 16, backend=count)
        expected, seen = [], []
        for column in tokens[:, 4:].T:
            logits = model(column[:, None], cache=plain, starts=torch.tensor(starts))
            expected.append(logits[:, -1])
            seen.append(steps.step(column.tolist(), fixed, starts))
    assert len(graphs) == 1
    assert (torch.stack(seen) - torch.stack(expected)).abs().max() <= 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_as_a_cuda_graph():
    model = random_model(CONFIGS["llama-gqa"], torch.float32).to("cuda")
    tokens = random_tokens(model.config, 2, 11).to("cuda")
    plain, fixed = Cache(model.config.n_layers), Cache(model.config.n_layers)
    with torch.no_grad():
        for cache in (plain, fixed):
            model(tokens[:, :6], cache=cache)
        steps = CompiledSteps(model, fixed, 16)
        for place in range(6, 11):
            expected = model(tokens[:, place : place + 1], cache=plain)[:, -1]
            seen = steps.step(tokens[:, place].tolist(), fixed, [0, 0])
            torch.testing.assert_close(seen, expected, rtol=1e-3, atol=1e-3)
