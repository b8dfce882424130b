"""A feature taken for another: what a port computes that reads the config wrongly.

Each misreading is a changed config. The tensor is computed again from the same observations along
the graph of the changed config, so that a norm in another place or a mask of another kind also
shows through tensors that were not observed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pellucid import names
from pellucid.diff.causes.hypothesis import Hypothesis, Wrong
from pellucid.diff.replay.operations import Setting, leaf
from pellucid.diff.replay.replay import Replay

ALIKE = 1e-2  # relative difference up to which another layer's tensor is a witness
_BEFORE = {"attn_norm": "attn_out_norm", "mlp_norm": "mlp_out_norm"}
_AFTER = {after: before for before, after in _BEFORE.items()}
_ROTATED = ("attn.q_rotated", "attn.k_rotated")
_NORMED = ("attn.q_normed", "attn.k_normed")
_MASKED = ("attn.masked_scores",)
_HEADS = ("attn.q", "attn.k", "attn.v")
_MLP = ("mlp.pre", "mlp.gate", "mlp.up")
_OTHER_ROPE = {"rope": "second_rope", "second_rope": "rope"}


@dataclass(frozen=True, kw_only=True)
class Misreading:
    """One way to read a config wrongly.

    leaves   in whose operations it shows
    config   what the config is taken for
    weights  modules whose weights are taken for others': {"attn_out_norm": "attn_norm"}
    witness  other tensors, of which the first that was observed must come out so too
    """

    cause: str
    evidence: str
    leaves: Sequence[str]
    config: Any
    weights: Mapping[str, str] = field(default_factory=dict)
    witness: tuple[str, ...] = ()


def misread(replay: Replay, name: str, unseen: Sequence[str]) -> Iterator[Hypothesis]:
    """Misreadings that show in a tensor, or in the `unseen` ones that it is computed from."""
    layer = names.layer_of(name)
    here = {leaf(name), *map(leaf, unseen)}
    for reading in _readings(replay.setting.config, layer or 0):
        if here & set(reading.leaves):
            yield Hypothesis(reading.cause, reading.evidence, _along(reading))


def _along(reading: Misreading) -> Wrong:
    """The tensor along the graph of the misread config; KeyError where a witness contradicts."""

    def compute(replay: Replay, name: str) -> Tensor:
        setting = _taking(replace(replay.setting, config=reading.config), reading.weights)
        other = Replay(replay.observed, setting, replay.starts)
        if reading.witness:
            _demand_alike(replay, other, [_beside(name, each) for each in reading.witness])
        return other.compute(name)

    return compute


def _taking(setting: Setting, weights: Mapping[str, str]) -> Setting:
    """The setting with some modules' weights found under other modules' names."""
    plain = setting.weights

    def found(asked: str) -> Tensor | None:
        stem, _, kind = asked.rpartition(".")
        block, _, local = stem.rpartition(".")
        if local in weights:
            return plain(f"{block}.{weights[local]}.{kind}")
        return plain(asked)

    return replace(setting, weights=found) if weights else setting


def _beside(name: str, witness: str) -> str:
    step, layer = names.step_of(name), names.layer_of(name)
    full = witness if witness.startswith("layers.") else f"layers.{layer}.{witness}"
    return f"step.{step}.{full}" if step else full


def _demand_alike(replay: Replay, other: Replay, witnesses: Sequence[str]) -> None:
    """KeyError unless the misreading gives the witness, and the right reading does not."""
    witness = next((each for each in witnesses if each in replay.observed), None)
    if witness is None:
        raise KeyError(f"none of {', '.join(witnesses)} was observed")
    seen = replay.observed[witness]
    if _distance(other.compute(witness), seen) > ALIKE or (
        _distance(replay.compute(witness), seen) < ALIKE
    ):
        raise KeyError(f"{witness} says otherwise")


def _distance(x: Tensor, y: Tensor) -> float:
    """Relative difference; scores that are switched off count alike, whatever the number."""
    x, y = (value.double().clamp(min=-1e4) for value in (x, y))
    return float((x - y).norm() / y.norm().clamp(min=1e-30))


def _readings(config: Any, layer: int) -> Iterator[Misreading]:
    yield from _head_norms(config)
    yield from _norms(config)
    yield from _kinds(config, layer)
    yield from _caps(config)
    yield from _factors(config)
    yield from _blocks(config)


def _head_norms(c: Any) -> Iterator[Misreading]:
    if not c.qk_norm:
        return
    for last in (not c.qk_norm_last,) if any(kind.rope for kind in c.kinds) else ():
        place = "after" if last else "before"
        yield Misreading(
            cause=f"q/k norm {place} RoPE",
            evidence=f"queries and keys normalised {place} RoPE",
            leaves=_NORMED if last else _ROTATED,
            config=replace(c, qk_norm_last=last),
            witness=("attn.scores", "attn.pattern", "attn.z"),
        )
    yield Misreading(
        cause="q/k norm missing",
        evidence="queries and keys not normalised",
        leaves=("attn.scores",) if c.qk_norm_last else (*_ROTATED, "attn.scores"),
        config=replace(c, qk_norm=""),
    )


def _norms(c: Any) -> Iterator[Misreading]:
    every = ("embed_normed", "attn_norm", "mlp_norm", "final_norm", *_NORMED)
    after = ("attn_out", "mlp_out") if c.norm_places != "before" else ()
    if c.norm_weight:
        missing = " missing" if c.norm_offset else ""
        yield Misreading(
            cause=f"norm weight plus one{missing}",
            evidence="weight for 1 + weight" if missing else "1 + weight for weight",
            leaves=(*every, *after),
            config=replace(c, norm_offset=not c.norm_offset),
        )
    if c.embed_norm:
        yield Misreading(
            cause="norm of the embedding missing",
            evidence="embedding not normalised",
            leaves=("resid_pre", "embed_scaled"),
            config=replace(c, embed_norm=False),
        )
    if c.norm_places == "before":
        yield Misreading(
            cause="norms after instead of before",
            evidence="attention's output normalised instead of its input",
            leaves=(*_HEADS, *_MLP),
            config=replace(c, norm_places="after"),
            weights=_AFTER,
            witness=("attn_out",),
        )
    if c.norm_places == "after":
        yield Misreading(
            cause="norms before instead of after",
            evidence="attention's input normalised instead of its output",
            leaves=(*_HEADS, *_MLP),
            config=replace(c, norm_places="before"),
            weights=_BEFORE,
        )
    if c.norm_places != "after":
        yield Misreading(
            cause="norm missing",
            evidence="what reads the stream reads it as it is, not normalised",
            leaves=(*_HEADS, *_MLP),
            config=replace(c, norm_places="after"),
        )
    if c.norm_places != "before":
        yield Misreading(
            cause="norm missing",
            evidence="what is added to the stream is not normalised",
            leaves=("attn_out", "mlp_out"),
            config=replace(c, norm_places="before"),
        )


def _kinds(c: Any, layer: int) -> Iterator[Misreading]:
    """The layer taken for one of another kind."""
    kind = c.layer(layer)
    if c.has_windows:
        other = next((i for i, k in enumerate(c.kinds) if k.window != kind.window), None)
        said = "sees a window only" if not kind.window else "sees all tokens"
        changed = replace(c, layers=tuple(k._replace(window=not k.window) for k in c.kinds))
        if not kind.window or other is not None:
            shown = ("attn.masked_scores", "attn.pattern", "attn.z") if kind.window else ()
            witness = tuple(f"layers.{other}.{each}" for each in shown)
            yield Misreading(
                cause="window on the wrong layers",
                evidence=f"layer {layer} {said}" + (", and the others a window" if witness else ""),
                leaves=_MASKED,
                config=changed,
                witness=witness,
            )
        if kind.window:
            yield Misreading(
                cause="window missing",
                evidence=f"layer {layer} {said}",
                leaves=_MASKED,
                config=changed,
            )
            for by, word in ((1, "wide"), (-1, "narrow")):
                yield Misreading(
                    cause=f"window one too {word}",
                    evidence=f"a token sees {c.window + by} instead of {c.window}, itself included",
                    leaves=_MASKED,
                    config=replace(c, window=c.window + by),
                )
    if kind.rope:
        if getattr(c, _OTHER_ROPE[kind.rope]) is not None:
            yield Misreading(
                cause="RoPE of the other kind of layer",
                evidence=f"layer {layer} turned by {_OTHER_ROPE[kind.rope]}, not {kind.rope}",
                leaves=_ROTATED,
                config=_with_kind(c, rope=_OTHER_ROPE[kind.rope]),
            )
        yield Misreading(
            cause="RoPE missing",
            evidence=f"queries and keys of layer {layer} not turned",
            leaves=("attn.scores", *_NORMED) if c.qk_norm_last else ("attn.scores",),
            config=_with_kind(c, rope=""),
        )
        return
    for which in ("rope", "second_rope"):
        if getattr(c, which) is not None:
            yield Misreading(
                cause="NoPE layer turned",
                evidence=f"queries and keys of layer {layer} turned by {which}",
                leaves=("attn.scores", *_NORMED) if c.qk_norm_last else ("attn.scores",),
                config=_with_kind(c, rope=which),
            )


def _with_kind(c: Any, **fields: Any) -> Any:
    """The config with every layer's kind changed so."""
    return replace(c, layers=tuple(kind._replace(**fields) for kind in c.kinds))


def _caps(c: Any) -> Iterator[Misreading]:
    if c.score_cap:
        yield Misreading(
            cause="score cap missing",
            evidence=f"scores not cut softly at {c.score_cap:g}",
            leaves=_MASKED,
            config=replace(c, score_cap=0.0),
        )
    if c.logit_cap:
        yield Misreading(
            cause="logit cap missing",
            evidence=f"logits not cut softly at {c.logit_cap:g}",
            leaves=("logits",),
            config=replace(c, logit_cap=0.0),
        )
    if c.query_growth:
        yield Misreading(
            cause="query growth missing",
            evidence="queries not multiplied by a factor that grows with the position",
            leaves=("attn.scores",),
            config=replace(c, query_growth=0.0),
        )
    if c.sinks:
        yield Misreading(
            cause="sinks missing",
            evidence="softmax over the keys alone",
            leaves=("attn.pattern",),
            config=replace(c, sinks=False),
        )
    if c.qkv_clip:
        yield Misreading(
            cause="clip missing",
            evidence=f"not cut to ± {c.qkv_clip:g}",
            leaves=_HEADS,
            config=replace(c, qkv_clip=0.0),
        )


def _factors(c: Any) -> Iterator[Misreading]:
    for what, attribute, nothing, leaves in (
        ("embedding scale", "embed_scale", 1.0, ("resid_pre",)),
        ("residual multiplier", "residual_scale", 1.0, ("attn_out", "mlp_out")),
        ("logit multiplier", "logit_scale", 1.0, ("logits",)),
        ("score multiplier", "score_scale", 0.0, ("attn.scores",)),
    ):
        value = getattr(c, attribute)
        if value == nothing:
            continue
        yield Misreading(
            cause=f"{what} missing",
            evidence=f"not times {value:g}",
            leaves=leaves,
            config=replace(c, **{attribute: nothing}),
        )
        if value == 1:
            continue  # divided by 1 it is the same
        where = ("embed_scaled",) if attribute == "embed_scale" else leaves
        yield Misreading(
            cause=f"{what} inverted",
            evidence=f"divided by {value:g} instead of multiplied",
            leaves=where,
            config=replace(c, **{attribute: 1 / value}),
        )
    if c.embed_scale != 1:
        for coarse in (torch.bfloat16, torch.float16):
            short, value = str(coarse).removeprefix("torch."), torch.tensor(c.embed_scale)
            rounded = float(value.to(coarse))
            yield Misreading(
                cause="embedding scale rounded",
                evidence=f"times {rounded:g}, {c.embed_scale:.6g} as {short} holds it",
                leaves=("embed_scaled",),
                config=replace(c, embed_scale=rounded),
            )


def _blocks(c: Any) -> Iterator[Misreading]:
    if c.parallel:
        yield Misreading(
            cause="parallel block in sequence",
            evidence="the MLP reads the stream after attention",
            leaves=_MLP,
            config=replace(c, parallel=False),
            weights={"mlp_norm": "attn_norm"},
        )
    else:
        yield Misreading(
            cause="block in parallel",
            evidence="the MLP reads what attention reads",
            leaves=_MLP,
            config=replace(c, parallel=True),
        )
