"""A walk over a checkpoint as one call: its result, its adapter, its device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pellucid
from pellucid.prompt_walk import CODE_PROMPT, LLAMA3_PROMPT, WeightsOnDevice, walk_prompt

FROZEN = Path(__file__).parents[1] / "frozen"


def test_the_steps_are_those_of_the_model_in_memory():
    walk = walk_prompt("demo", "import os", layer=1, head=2)
    assert walk.result == {}
    steps = {step.name: step.value for step in walk}
    lm = pellucid.load("demo")
    again = {step.name: step.value for step in lm.walk("import os", layer=1, head=2)}
    assert list(steps) == list(again)
    assert torch.equal(steps["logits"], again["logits"])
    assert walk.tokens == lm.encode("import os")
    assert walk.result["next_token"] == int(steps["logits"].argmax())
    assert walk.result["top"][0]["token"] == walk.result["next_token"]
    assert list(walk.to_json()) == [
        "model", "prompt", "tokens", "token_strings", "steps", "top", "next_token", "next_text",
    ]  # fmt: skip


def test_an_adapter_is_walked_through_too():
    source, adapter = str(FROZEN / "models" / "llama-wide"), FROZEN / "weights" / "adapter"
    with_adapter, without = (_logits(source, given) for given in (adapter, None))
    lm = pellucid.load(source, adapter=adapter, dtype="float32")
    with torch.no_grad():
        logits = lm.model(torch.tensor([lm.encode("ab")]))[0, -1]
    torch.testing.assert_close(with_adapter, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(with_adapter, without, rtol=1e-2, atol=1e-2)


def _logits(source: str, adapter: Path | None) -> torch.Tensor:
    """Of the last token (V), by the walk."""
    walk = walk_prompt(source, "ab", adapter=adapter, dtype="float32")
    return next(step.value for step in walk if step.name == "logits")


def test_without_a_prompt_there_is_an_example():
    assert walk_prompt("stdlib").prompt == CODE_PROMPT
    assert walk_prompt("demo").prompt == LLAMA3_PROMPT
    with pytest.raises(ValueError, match="the prompt is empty"):
        walk_prompt("demo", "")


def test_weights_are_moved_one_at_a_time():
    read = []

    class Weights(dict):
        def __getitem__(self, name):
            read.append(name)
            return super().__getitem__(name)

    weights = WeightsOnDevice(Weights(a=torch.ones(2), b=torch.ones(3)), torch.device("meta"))
    assert "a" in weights and "c" not in weights
    assert (list(weights), len(weights), read) == (["a", "b"], 2, [])
    assert weights["b"].device.type == "meta" and weights["b"].shape == (3,)
    assert read == ["b", "b"]
