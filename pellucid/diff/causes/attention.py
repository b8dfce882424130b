"""From queries and keys to what the heads read: scale, softmax, head mapping."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import names
from pellucid.diff.causes.cache import cached_keys, cached_values
from pellucid.diff.causes.hypothesis import Hypothesis, given, mask_of, sibling
from pellucid.diff.causes.positions import mask
from pellucid.diff.causes.rope import rotations
from pellucid.diff.replay.operations import Setting, leaf, scale_scores
from pellucid.diff.replay.replay import Replay
from pellucid.models.attention import last_of, repeat_heads, softmax


def _tiled(x: Tensor, heads: int) -> Tensor:
    return x.repeat(1, heads // x.shape[1], 1, 1)


def projected(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Heads cut out of a projection in the wrong order; values turned like queries and keys."""
    module = f"{leaf(name)}_proj"

    def unmoved(s: Setting, x: Tensor) -> Tensor:
        y = s.linear(module, x)  # (B, T, heads · D)
        return y.reshape(y.shape[0], -1, y.shape[1], s.config.head_dim)

    evidence = "heads not moved before the tokens: (B, T, H·D) read as (B, H, T, D)"
    yield Hypothesis("heads split wrongly", evidence, given(unmoved))
    if leaf(name) == "attn.v":
        for said, turn in rotations(replay, name):
            yield Hypothesis(
                "values rotated too", said, lambda r, n, t=turn: t(r.compute(n), r.setting)
            )


def scores(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Head mapping, scale, order of the key/value heads."""
    config = replay.setting.config

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return q @ repeat_heads(k, q.shape[1]).transpose(-1, -2)

    if config.n_heads != config.n_kv_heads:
        yield Hypothesis(
            "GQA heads tiled",
            "query head h reads key/value head h mod Hkv",
            given(lambda s, q, k: scale_scores(s, q @ _tiled(k, q.shape[1]).transpose(-1, -2))),
        )
    for evidence, factor in (
        ("not divided by √D", 1.0),
        (f"divided by D = {config.head_dim}", 1 / config.head_dim),
        (f"divided by √C = √{config.width}", config.width**-0.5),
        ("divided by √(D/2)", (config.head_dim / 2) ** -0.5),
        ("divided by √D twice", 1 / config.head_dim),
        (f"divided by √H = √{config.n_heads}", config.n_heads**-0.5),
        (
            f"divided by √(Hkv · D) = √{config.n_kv_heads * config.head_dim}",
            (config.n_kv_heads * config.head_dim) ** -0.5,
        ),
    ):
        wrong = given(lambda s, q, k, f=factor: plain(q, k) * f)
        yield Hypothesis("attention scale", evidence, wrong)
    layer = names.layer_of(name) or 0
    if layer:
        by_layer = given(lambda s, q, k: scale_scores(s, plain(q, k)) / (layer + 1))
        yield Hypothesis("attention scale", f"divided by layer + 1 = {layer + 1} too", by_layer)
    if config.n_heads == config.n_kv_heads:
        turned = given(lambda s, q, k: scale_scores(s, plain(q, k).transpose(-1, -2)))
        yield Hypothesis("q and k exchanged", "queries read as keys and keys as queries", turned)
    if config.n_kv_heads > 1:
        flipped = given(lambda s, q, k: scale_scores(s, plain(q, k.flip(1))))
        yield Hypothesis("heads reordered", "key/value heads in reverse order", flipped)
        rolled = given(lambda s, q, k: scale_scores(s, plain(q, k.roll(1, 1))))
        yield Hypothesis("heads reordered", "key/value heads moved by one", rolled)
    yield from cached_keys(replay, name)


def masked_scores(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Whatever goes wrong with a mask, whether or not the mask was observed."""
    config = replay.setting.config
    window = config.window if mask_of(config, name).endswith("window_mask") else 0
    yield from _after_softmax(replay, name)
    zero = given(lambda s, x, allowed: x.masked_fill(~allowed, 0.0))
    yield Hypothesis("masked with 0", "hidden scores are 0 instead of −∞", zero)
    for hypothesis in mask(replay, sibling(name, "mask"), observed):

        def masked(r: Replay, n: str, h: Hypothesis = hypothesis) -> Tensor:
            allowed = h.compute(r, sibling(n, "mask"))
            allowed = last_of(allowed, window) if window else allowed
            return r.arguments(n)[0].to(r.setting.dtype).masked_fill(~allowed, float("-inf"))

        yield Hypothesis(hypothesis.cause, hypothesis.evidence, masked)


def _after_softmax(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """Scores that nothing masks, where the pattern shows that a mask came later."""
    seen = replay.observed.get(sibling(name, "attn.pattern"))
    allowed = replay.arguments(name)[1]
    if seen is None or seen.shape[-2:] != allowed.shape[-2:] or allowed.all():
        return
    if not (seen * ~allowed).any():
        evidence = "scores are not masked, the pattern is 0 where they should have been"
        yield Hypothesis("mask after the softmax", evidence, given(lambda s, x, allowed: x))


def pattern(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Softmax in a coarse dtype, over the wrong axis, with a one added; sinks not cut off."""
    if replay.setting.config.sinks:

        def uncut(s: Setting, x: Tensor) -> Tensor:
            column = s.parameter("attn.sinks").view(1, -1, 1, 1).expand(*x.shape[:3], 1)
            return softmax(torch.cat((x, column), -1), None, s.dialect).to(s.dtype)

        yield Hypothesis("sinks not cut", "a column more than there are keys", given(uncut))
    for coarse in (torch.bfloat16, torch.float16):
        short = str(coarse).removeprefix("torch.")
        yield Hypothesis(
            "softmax precision",
            f"softmax in {short}",
            given(lambda s, x, c=coarse: torch.softmax(x.to(c), -1).to(s.dtype)),
        )

        def late(s: Setting, x: Tensor, c: torch.dtype = coarse) -> Tensor:
            low = x.to(c)
            powers = (low - low.amax(-1, keepdim=True)).exp()
            return (powers / powers.sum(-1, keepdim=True)).to(s.dtype)

        yield Hypothesis("softmax precision", f"each step of the softmax in {short}", given(late))
    yield Hypothesis(
        "softmax axis", "over the queries", given(lambda s, x: torch.softmax(x, -2).to(s.dtype))
    )
    # where every key is seen, or sinks take their part of the sum, it is no other operation
    late_mask = (
        not replay.setting.config.sinks
        and not replay.arguments(sibling(name, "attn.masked_scores"))[1].all()
    )
    for renewed, said in ((False, ""), (True, ", then divided by the sum")) if late_mask else ():

        def masked_late(replay: Replay, name: str, renewed: bool = renewed) -> Tensor:
            x, allowed = replay.arguments(sibling(name, "attn.masked_scores"))
            part = torch.softmax(x.to(replay.setting.dtype), -1) * allowed
            return part / part.sum(-1, keepdim=True) if renewed else part

        yield Hypothesis("mask after the softmax", f"the pattern set to 0{said}", masked_late)
    yield Hypothesis(
        "softmax plus one",
        "a one added to the sum",
        given(lambda s, x: F.softmax(F.pad(x, (0, 1)), -1)[..., :-1].to(s.dtype)),
    )


def z(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Head mapping and order of the values, heads not moved, values rotated."""
    config = replay.setting.config

    def unmoved(replay: Replay, name: str) -> Tensor:
        right = replay.compute(name)  # (B, H, T, D)
        flat = right.reshape(right.shape[0], right.shape[2], -1)
        return flat.unflatten(-1, (right.shape[1], -1)).transpose(1, 2)

    evidence = "heads not moved behind the tokens before joining"
    yield Hypothesis("heads joined wrongly", evidence, unmoved)
    for said, turn in rotations(replay, name):
        turned = given(lambda s, p, v, t=turn: p @ repeat_heads(t(v, s), p.shape[1]))
        yield Hypothesis("values rotated too", said, turned)
    if config.n_heads != config.n_kv_heads:
        tiled = given(lambda s, p, v: p @ _tiled(v, p.shape[1]))
        yield Hypothesis("GQA heads tiled", "query head h reads value head h mod Hkv", tiled)
    if config.n_kv_heads > 1:
        flipped = given(lambda s, p, v: p @ repeat_heads(v.flip(1), p.shape[1]))
        yield Hypothesis("heads reordered", "value heads in reverse order", flipped)
    yield from cached_values(replay, name)


def joined(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Heads put side by side in the wrong order."""
    yield Hypothesis(
        "heads joined wrongly",
        "heads not moved behind the tokens before joining",
        given(lambda s, z: s.linear("attn.o_proj", z.reshape(z.shape[0], z.shape[2], -1))),
    )
    yield Hypothesis(
        "heads joined wrongly",
        "components of all heads side by side",
        given(lambda s, z: s.linear("attn.o_proj", z.permute(0, 2, 3, 1).flatten(2))),
    )
