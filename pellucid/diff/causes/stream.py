"""The residual stream and what reads and writes it: embedding, MLP, head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import graph
from pellucid.diff.causes.hypothesis import Hypothesis, from_sibling, given, of_model, sibling
from pellucid.diff.replay.operations import Setting, leaf
from pellucid.diff.replay.replay import Replay
from pellucid.graph import inputs
from pellucid.models.parts import activation


def embed(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Scaled, or rows of the neighbouring ids."""
    width = replay.setting.config.width
    yield Hypothesis(
        "embedding scaled",
        f"times √{width}",
        lambda r, n: r.compute(n) * width**0.5,
    )
    for shift in (1, -1):
        moved = given(
            lambda s, tokens, by=shift: F.embedding(
                (tokens + by) % s.config.vocab_size, s.weights("embed.weight")
            ).to(s.dtype)
        )
        yield Hypothesis("embedding rows shifted", f"row of token {shift:+d}", moved)


def embed_scaled(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Written down before the factor."""
    yield Hypothesis("embedding scale missing", "the input as it is", given(lambda s, x: x))


def residual(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Added to the wrong stream, or not added."""
    parts = inputs(replay.setting.config, name)
    if len(parts) < 2:
        return
    if leaf(name) == "resid_pre":
        yield Hypothesis("position embedding missing", "", given(lambda s, x, y: x))
        root = replay.setting.config.width**0.5
        scaled = given(lambda s, x, y: x * root + y)
        evidence = f"token embedding times √{replay.setting.config.width}"
        yield Hypothesis("embedding scaled", evidence, scaled)
        return
    config = replay.setting.config
    after_attention = leaf(name) == "resid_mid" or config.parallel
    normed = "attn_norm" if after_attention else "mlp_norm"

    def after_norm(replay: Replay, name: str) -> Tensor:
        stream = replay.value(sibling(name, normed)).to(replay.setting.dtype)
        for part in parts[1:]:
            stream = stream + replay.value(part).to(replay.setting.dtype)
        return stream

    added = " + ".join(map(leaf, parts[1:]))
    yield Hypothesis("residual after the norm", f"{normed} + {added}", after_norm)
    yield Hypothesis("residual missing", f"{added} alone", given(lambda s, x, *y: _total(y)))
    yield Hypothesis("branch missing", f"{leaf(parts[0])} alone", given(lambda s, x, *y: x))
    yield Hypothesis("residual subtracted", "minus", given(lambda s, x, *y: x - _total(y)))
    for place, part in enumerate(parts[1:]) if len(parts) > 2 else ():
        yield Hypothesis(
            "branch missing",
            f"without {leaf(part)}",
            given(lambda s, x, *y, left_out=place: x + y[1 - left_out]),
        )
    if leaf(name) == "resid_post" and not config.parallel:

        def parallel(replay: Replay, name: str) -> Tensor:
            added = replay.value(parts[1]).to(replay.setting.dtype)
            return replay.value(sibling(name, "resid_pre")).to(replay.setting.dtype) + added

        yield Hypothesis("residual from before attention", "resid_pre + mlp_out", parallel)


def _total(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def act(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Another function, or of the wrong branch."""
    config = replay.setting.config
    for evidence, function in (
        ("erf instead of tanh", F.gelu),
        ("tanh instead of erf", lambda x: F.gelu(x, approximate="tanh")),
        ("x · sigmoid(1.702 x)", lambda x: x * torch.sigmoid(1.702 * x)),
    ):
        own = "gelu" in config.activation
        said = evidence if own else f"GELU ({evidence.split(' instead')[0]})"
        yield Hypothesis(
            "GELU form" if own else "activation", said, given(lambda s, x, f=function: f(x))
        )
    for evidence, function in (
        ("SiLU", F.silu),
        ("ReLU", F.relu),
        ("squared ReLU", lambda x: F.relu(x).square()),
        ("none", lambda x: x),
    ):
        yield Hypothesis("activation", evidence, given(lambda s, x, f=function: f(x)))
    if config.gated:
        wrong = from_sibling("mlp.up", lambda s, up: _activated(s, up))
        evidence = f"{_WORDS[config.activation]} of up instead of gate"
        yield Hypothesis("SwiGLU on the wrong branch", evidence, wrong)


_WORDS = {
    "silu": "SiLU",
    "gelu_tanh": "GELU",
    "gelu_new": "GELU",
    "gelu": "GELU",
    "relu2": "squared ReLU",
}


def _activated(s: Setting, x: Tensor) -> Tensor:
    return activation(s.config.activation, s.dialect)(x)


def hidden(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """The gate on the wrong branch, or left out."""

    def wrong_branch(replay: Replay, name: str) -> Tensor:
        gate = replay.value(sibling(name, "mlp.gate")).to(replay.setting.dtype)
        up = replay.value(sibling(name, "mlp.up")).to(replay.setting.dtype)
        return gate * _activated(replay.setting, up)

    evidence = f"gate × {_WORDS[replay.setting.config.activation]}(up)"
    yield Hypothesis("SwiGLU on the wrong branch", evidence, wrong_branch)
    yield Hypothesis("branch missing", "act alone", given(lambda s, act, up: act))


def logits(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """The final norm left out, or the embedding's table for the head's."""
    config = replay.setting.config
    if leaf(name) == "logits" and graph.has(config, "raw_logits"):
        return  # a factor and a cap: the head's product has its own row
    last = of_model(name, f"layers.{config.n_layers - 1}.resid_post")
    head = "embed" if config.tied else "unembed"

    def without_norm(replay: Replay, name: str) -> Tensor:
        x = replay.value(last).to(replay.setting.dtype)
        return replay.setting.linear(head, x)

    yield Hypothesis("final norm missing", "the head reads the residual stream", without_norm)
    if not config.tied:
        tied = given(lambda s, x: s.linear("embed", x))
        yield Hypothesis("head tied", "the embedding for the head", tied)
