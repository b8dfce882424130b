"""The residual stream and what reads and writes it: embedding, MLP, head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import graph, names
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
    if leaf(name) == "resid_post":
        yield from _skipped(replay, name)
    if len(parts) < 2:
        if leaf(name) == "resid_pre" and observed is not None:
            yield from _scaled(replay, name, observed)
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

    if leaf(name) == "resid_mid":
        yield from _beside(replay, name)
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


def _skipped(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """The stream as it left an earlier block: blocks that were not computed."""
    layer = names.layer_of(name) or 0
    for last in reversed(range(layer)):
        before = of_model(name, f"layers.{last}.resid_post")
        if before in replay.observed:
            missed = f"layer {layer}" if last + 1 == layer else f"layers {last + 1} to {layer}"
            yield Hypothesis(
                "layer skipped",
                f"the stream of layers.{last}.resid_post, without {missed}",
                lambda r, n, source=before: r.value(source),
            )


def _scaled(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """What the first block reads times a factor that A does not have."""
    right = replay.compute(name).double()
    if right.shape != observed.shape:
        return
    factor = float((right * observed.double()).sum() / right.square().sum().clamp(min=1e-30))
    root = replay.setting.config.width**0.5
    near = abs(factor / root - 1) < 1e-2
    said = f"times √{replay.setting.config.width}" if near else f"times {factor:.6g}"
    for by in (root if near else factor, factor):
        yield Hypothesis("embedding scaled", said, lambda r, n, by=by: r.compute(n) * by)


def _beside(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """The MLP reads what attention reads, and both are added at the end: a parallel block."""
    parts = [sibling(name, part) for part in ("resid_pre", "attn_out", "mlp_out")]
    after = replay.observed.get(sibling(name, "resid_post"))
    if after is None or any(part not in replay.observed for part in parts[2:]):
        return
    total = _total([replay.value(part).double() for part in parts])
    if total.shape == after.shape and torch.allclose(total, after.double(), rtol=1e-2, atol=1e-2):
        said = "the MLP reads resid_pre; resid_post is the sum of all three"
        yield Hypothesis(
            "attention and MLP in parallel", said, lambda r, n, source=parts[0]: r.value(source)
        )


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
    if observed is not None and "gelu" in config.activation:
        yield from _other_constants(replay, name, observed)
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


def _other_constants(replay: Replay, name: str, observed: Tensor) -> Iterator[Hypothesis]:
    """The two numbers of GELU's tanh, by least squares: atanh(2 y / x − 1) = k (x + c x³)."""
    x, y = replay.arguments(name)[0].double(), observed.double()
    if x.shape != y.shape:
        return
    x, ratio = x.flatten(), (2 * y / x - 1).flatten()
    told = (x.abs() > 0.3) & (x.abs() < 2.5) & (ratio.abs() < 0.999)
    if int(told.sum()) < 16:
        return
    powers = torch.stack((x[told], x[told] ** 3), 1)
    first, third = torch.linalg.lstsq(powers, ratio[told].atanh()[:, None]).solution[:, 0].tolist()
    if abs(third / first) < 1e-3:
        return  # a sigmoid's: SiLU, or the third form above
    root = (2 / torch.pi) ** 0.5
    for digits in (2, 3, 4, 5, 6):
        k = float(f"{first:.{digits}g}")
        c = float(f"{third / first:.{digits}g}")
        for inner in {k, root} if abs(first / root - 1) < 1e-3 else {k}:
            if (inner, c) != (root, 0.044715):
                said = f"x/2 · (1 + tanh({inner:.7g} (x + {c:g} x³)))"
                yield Hypothesis("GELU constants", said, given(partial(_gelu, k=inner, c=c)))


def _gelu(s: Setting, x: Tensor, k: float, c: float) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(k * (x + c * x**3)))


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

    word = _WORDS[replay.setting.config.activation]
    yield Hypothesis("SwiGLU on the wrong branch", f"gate × {word}(up)", wrong_branch)
    for said, function in (
        (f"{word}(gate × up)", lambda s, gate, up: _activated(s, gate * up)),
        (f"{word}(gate) × {word}(up)", lambda s, gate, up: _activated(s, gate) * _activated(s, up)),
        ("gate × up", lambda s, gate, up: gate * up),
        (f"{word}(gate) + up", lambda s, gate, up: _activated(s, gate) + up),
    ):

        def of_both(replay: Replay, name: str, function=function) -> Tensor:
            parts = (replay.value(sibling(name, f"mlp.{x}")) for x in ("gate", "up"))
            gate, up = (part.to(replay.setting.dtype) for part in parts)
            return function(replay.setting, gate, up)

        yield Hypothesis("activation of the wrong product", said, of_both)
    yield Hypothesis("branch missing", "act alone", given(lambda s, act, up: act))


def logits(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """The final norm left out, or the embedding's table for the head's."""
    config = replay.setting.config
    head = "embed" if config.tied else "unembed"
    if config.logit_cap:
        cap = config.logit_cap

        def early(replay: Replay, name: str) -> Tensor:
            x = replay.value(of_model(name, "final_norm")).to(replay.setting.dtype)
            y = replay.setting.linear(head, cap * torch.tanh(x / cap))
            return y if leaf(name) == "raw_logits" else y * config.logit_scale

        yield Hypothesis("logit cap before the head", f"what the head reads, up to ±{cap:g}", early)
    if leaf(name) == "logits" and graph.has(config, "raw_logits"):
        return  # a factor and a cap: the head's product has its own row
    last = of_model(name, f"layers.{config.n_layers - 1}.resid_post")

    def without_norm(replay: Replay, name: str) -> Tensor:
        x = replay.value(last).to(replay.setting.dtype)
        return replay.setting.linear(head, x)

    yield Hypothesis("final norm missing", "the head reads the residual stream", without_norm)
    if not config.tied:
        tied = given(lambda s, x: s.linear("embed", x))
        yield Hypothesis("head tied", "the embedding for the head", tied)
