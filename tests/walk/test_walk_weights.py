"""How the walk treats weights: one at a time, when a step needs it, and let go; and a real one."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from tiny import GPT, LLAMA, random_model, random_tokens
from torch import Tensor

from pellucid.checkpoints import load_model, open_checkpoint
from pellucid.numerics import dialect
from pellucid.trace import trace
from pellucid.walk import walk


class Spy(Mapping[str, Tensor]):
    """Reads a new tensor at every access, as a file does, and knows which of them still live."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = weights
        self.reads: Counter[str] = Counter()
        self.living: dict[str, weakref.ref] = {}
        self.alive_at_a_read: list[tuple[str, set[str]]] = []

    def __getitem__(self, name: str) -> Tensor:
        alive = {other for other, ref in self.living.items() if ref() is not None}
        self.alive_at_a_read.append((name, alive))
        self.reads[name] += 1
        tensor = self.weights[name].clone()
        # The storage outlives the tensor while a view of it is left anywhere.
        self.living[name] = weakref.ref(tensor.untyped_storage())
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights

    def __len__(self) -> int:
        return len(self.weights)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights[name].dtype


def spied(config, **more):
    spy = Spy(random_model(config, torch.float32).state_dict())
    tokens = random_tokens(config, 5)
    steps = walk(config, spy, tokens, dialect=dialect("hf", config.rounding), **more)
    assert not spy.reads  # nothing is read before the first step is asked for
    return spy, steps


SHOWN = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj"} | {
    f"mlp.{leaf}_proj" for leaf in ("gate", "up", "down")
}


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("config", [LLAMA, replace(LLAMA, tied=True), GPT])
def test_each_weight_is_read_once_per_use(config, everything):
    spy, steps = spied(config, everything=everything)
    for _ in steps:
        pass
    assert set(spy.reads) == set(spy.weights)
    for name, reads in spy.reads.items():
        leaf = name.removeprefix("layers.0.").removeprefix("layers.1.")
        unrolled = everything or name.startswith("layers.0.")
        shown = unrolled and leaf.removesuffix(".weight") in SHOWN and name.endswith("weight")
        uses = 2 if shown or (name == "embed.weight" and config.tied) else 1
        if name.endswith("_proj.bias") and leaf.startswith(("attn.q", "attn.k", "attn.v")):
            uses = config.n_heads  # a bias is small: read again for each head
        assert reads == uses, name


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_no_weight_is_kept(config, everything):
    """At any read, nothing lives but wq, wk and wv of the heads at work, and what is on show."""
    spy, steps = spied(config, everything=everything)
    while True:
        step = next(steps, None)
        if step is None:
            break
        del step  # what is shown lives as long as its reader wants it
    shared = {name for _, alive in spy.alive_at_a_read for name in alive}
    assert "layers.0.attn.q_proj.weight" in shared  # the spy sees what is kept for the heads
    for read, alive in spy.alive_at_a_read:
        alive = {name for name in alive if spy.weights[name].ndim == 2}
        alive.discard(read.removesuffix("bias") + "weight")  # a weight and its bias, for one step
        assert len({name.rpartition(".attn.")[0] for name in alive}) <= 1, alive
        leaves = {name.rpartition(".attn.")[2] for name in alive}
        assert leaves <= {"q_proj.weight", "k_proj.weight", "v_proj.weight"}, (read, alive)
    assert not any(ref() is not None for ref in spy.living.values())


def test_a_missing_weight_is_named():
    weights = random_model(LLAMA).state_dict()
    del weights["layers.1.mlp.gate_proj.weight"]
    steps = walk(LLAMA, weights, [1, 2], dialect=dialect("hf", "llama"))
    with pytest.raises(ValueError, match=r"needs the weight layers\.1\.mlp\.gate_proj\.weight"):
        list(steps)


@pytest.mark.parametrize("config", [LLAMA, GPT])
def test_everything_lies_where_the_weights_lie(config):
    """Tokens, positions, mask and angles too; the meta device stands for a GPU."""
    weights = {
        name: weight.to("meta") for name, weight in random_model(config).state_dict().items()
    }
    steps = walk(config, weights, [1, 2, 3], dialect=dialect("hf", config.rounding))
    for step in steps:
        assert step.value.device.type == "meta", step.address
        if step.name == "logits":
            return  # the next token is a number, and meta tensors have none


def test_parameters_can_be_walked_and_stay_as_they_are():
    model = random_model(LLAMA)
    weights = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in walk(LLAMA, weights, [1, 2, 3], dialect=dialect("hf", "llama")):
        assert not step.value.requires_grad, step.address
        step.stats()
    assert torch.is_grad_enabled()
    for name, weight in weights.items():
        assert torch.equal(before[name], weight)


def last(steps, *names):
    """The values of some steps of a walk."""
    return {step.name: step.value for step in steps if step.name in names}


@pytest.mark.assets
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_stories260k_walks_to_the_token_that_the_model_gives(assets, dtype):
    story = torch.tensor([1, 403, 407, 261, 378])
    ends = []
    for layout in ("meta", "hf"):
        checkpoint = open_checkpoint(assets / "stories260K" / layout)
        model = load_model(checkpoint, dtype=dtype, dialect="hf")
        steps = walk(
            checkpoint.config, checkpoint.weights, story, dialect=model.dialect, dtype=dtype
        )
        said = last(steps, "logits", "next_token")
        with trace(model) as seen:
            model(story[None])
        theirs = seen["logits"][0, -1]
        tolerance = 1e-12 if dtype == torch.float64 else 2**-6
        torch.testing.assert_close(said["logits"], theirs, rtol=tolerance, atol=tolerance)
        assert said["next_token"] == theirs.argmax()
        ends.append(said["logits"])
    assert torch.equal(*ends)  # half-split is half-split, whichever file it came from


@pytest.mark.assets
def test_stories260k_tells_a_story_step_by_step(assets):
    """Greedy: each next token of the walk is appended and walked again."""
    checkpoint = open_checkpoint(assets / "stories260K" / "meta")
    tokens = [1]
    for _ in range(12):
        steps = walk(
            checkpoint.config, checkpoint.weights, tokens, dialect=dialect("meta", "llama")
        )
        tokens.append(int(last(steps, "next_token")["next_token"]))
    sentencepiece = pytest.importorskip("sentencepiece")
    file = assets / "stories260K" / "meta" / "tokenizer.model"
    text = sentencepiece.SentencePieceProcessor(model_file=str(file)).decode(tokens)
    assert text.startswith("Once upon a time, there was"), text
