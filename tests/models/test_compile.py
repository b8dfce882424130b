"""Taps are free: the compiler sees the graph of a model without them, and one block, not twelve."""

from __future__ import annotations

import contextvars
from dataclasses import replace

import pytest
import torch
from tiny import CONFIGS, GPT, LLAMA, random_model, random_tokens

from pellucid import graph
from pellucid.models import attention, decoder, parts, rope
from pellucid.trace import is_open, trace


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A compiler backend that keeps each graph's operations and runs it as it is."""

    def __init__(self) -> None:
        self.graphs: list[list[tuple]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs):
        """The operations of `graph`, arguments by name."""
        operations = [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in graph.graph.nodes]
        self.graphs.append(operations)
        return graph.forward


@pytest.mark.parametrize(
    ("kind", "name"), [("gpt2", "hf"), ("llama-gqa", "hf"), ("llama-mqa", "meta")]
)
def test_the_compiled_graph_equals_an_untapped_twins(kind, name, monkeypatch):
    config = CONFIGS[kind]
    model = random_model(config, torch.float32, name)
    tokens = random_tokens(config, 1, 8)
    tapped, untapped = Recorder(), Recorder()
    with torch.no_grad():
        logits = torch.compile(model, backend=tapped, fullgraph=True)(tokens)
        for module in (decoder, parts, rope, attention):
            monkeypatch.setattr(module, "tap", lambda module, leaf, tensor: tensor)
        monkeypatch.setattr(attention.trace, "names_steps", lambda: False)
        torch._dynamo.reset()
        twin = torch.compile(model, backend=untapped, fullgraph=True)(tokens)
    assert len(tapped.graphs) == len(untapped.graphs) == 1
    assert tapped.graphs == untapped.graphs
    assert len(tapped.graphs[0]) > 20
    assert torch.equal(logits, twin)


@pytest.mark.parametrize("config", [replace(GPT, n_layers=12), replace(LLAMA, n_layers=12)])
def test_twelve_blocks_compiled_in_place_are_one_graph(config):
    model = random_model(config, torch.float32)
    tokens = random_tokens(config, 1, 8)
    with torch.no_grad():
        expected = model(tokens)
        recorder = Recorder()
        for block in model.layers:
            block.compile(backend=recorder, fullgraph=True)
        logits = model(tokens)
    assert len(recorder.graphs) == 1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("how", ["whole", "whole, in place", "blocks", "blocks, in place"])
def test_a_trace_of_a_compiled_model_sees_everything(kind, how):
    config = CONFIGS[kind]
    model = random_model(config, torch.float32)
    tokens = random_tokens(config, 1, 8)
    with trace(model) as plain:
        model(tokens)
    recorder = Recorder()
    if how == "whole":
        model = torch.compile(model, backend=recorder)
    elif how == "whole, in place":
        model.compile(backend=recorder)
    else:
        for i, block in enumerate(model.layers):
            if how == "blocks":
                model.layers[i] = torch.compile(block, backend=recorder)
            else:
                block.compile(backend=recorder)
    for _ in range(2):  # before anything is compiled, and after
        with trace(model) as seen:
            model(tokens)
        assert list(seen) == list(graph.expand(config))
        for name in seen:
            assert torch.equal(seen[name], plain[name]), name
        with torch.no_grad():
            model(tokens)
    assert recorder.graphs, "outside the trace the model runs compiled"


def test_the_model_runs_compiled_again_after_traces_that_overlap():
    """Traces of two threads end in any order; the last one gives the compiler back."""
    model = random_model(LLAMA, torch.float32)
    tokens = random_tokens(LLAMA, 1, 8)
    recorder = Recorder()
    compiled = torch.compile(model, backend=recorder)
    first, second = trace(model), trace(model)
    one, two = contextvars.copy_context(), contextvars.copy_context()
    one.run(first.__enter__)
    two.run(second.__enter__)
    one.run(first.__exit__, None, None, None)
    two.run(second.__exit__, None, None, None)
    torch.set_grad_enabled(True)  # ended out of order, they leave this thread's switch off
    assert not is_open()
    with torch.no_grad():
        compiled(tokens)
    assert len(recorder.graphs) == 1


def logits_and_gradient(config, name, backend=None):
    model = random_model(config, torch.float32, name)
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    logits = run(random_tokens(config, 1, 8))
    logits.logsumexp(-1).mean().backward()
    return logits.detach(), model.layers[0].attn.q_proj.weight.grad


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "hf"), ("llama-gqa", "meta")])
def test_compiled_training_gives_the_same_logits_and_gradients(kind, name):
    eager = logits_and_gradient(CONFIGS[kind], name)
    compiled = logits_and_gradient(CONFIGS[kind], name, "aot_eager")
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_the_compiled_meta_dialect_has_no_complex_numbers():
    """The default compiler generates no code for them: it would warn and fall back."""
    recorder = Recorder()
    model = random_model(LLAMA, torch.float32, "meta")
    tokens = random_tokens(LLAMA, 1, 8)
    with torch.no_grad():
        compiled = torch.compile(model, backend=recorder, fullgraph=True)(tokens)
        eager = model(tokens)
    assert not [operation for operation in recorder.graphs[0] if "complex" in str(operation)]
    assert not [operation for operation in recorder.graphs[0] if "polar" in str(operation)]
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
