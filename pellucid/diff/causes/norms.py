"""Norms: of the stream, of queries and keys, before a block and behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import names
from pellucid.diff.causes.hypothesis import (
    Hypothesis,
    Wrong,
    given,
    in_setting,
    parameters,
    sibling,
    with_weights,
)
from pellucid.diff.causes.rope import rotations
from pellucid.diff.replay.operations import Setting, leaf
from pellucid.diff.replay.replay import Replay

How = Callable[[Setting, str, Tensor], Tensor]  # of (setting, local name of the norm, x)
_BLOCK = ("attn_norm", "attn_out_norm", "mlp_norm", "mlp_out_norm")


@dataclass(frozen=True, kw_only=True)
class OtherNorm(Setting):
    """A setting whose norms are computed another way; all around them stays as it is."""

    how: How

    def norm(self, name: str, x: Tensor) -> Tensor:
        """x (…, C) -> (…, C), the other way."""
        return self.how(self, name, x)


def _by(how: How) -> Wrong:
    def changed(s: Setting) -> Setting:
        return OtherNorm(**{each.name: getattr(s, each.name) for each in fields(s)}, how=how)

    return in_setting(changed)


def norm(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Other eps, missing, the other kind of norm, other precision, another norm's weight."""
    config = replay.setting.config
    for eps in (1e-6, 1e-5, 1e-8, 1e-12, 1e-3, 1e-4, 0.0):
        if eps != config.norm_eps:
            yield _eps(eps, config.norm_eps)
    of_heads = leaf(name) in ("attn.q_normed", "attn.k_normed")
    cause = "q/k norm missing" if of_heads else "norm missing"
    yield Hypothesis(cause, "the input, not normalised", _by(lambda s, n, x: x))
    if of_heads:
        yield from _other_heads(config.qk_norm, name)
        if not config.qk_norm_last:
            for said, turn in rotations(replay, name):
                later = _by(lambda s, n, x, turn=turn: Setting.norm(s, n, turn(x, s)))
                yield Hypothesis("q/k norm after RoPE", f"turned {said} first", later)
    if config.norm == "rms":
        yield Hypothesis("LayerNorm for RMSNorm", "the mean is subtracted", _by(_centred))
    else:
        yield Hypothesis("RMSNorm for LayerNorm", "the mean is not subtracted", _by(_scaled))
        unbiased = _by(lambda s, n, x: _centred(s, n, x, unbiased=True))
        yield Hypothesis("unbiased variance", "variance divided by C − 1", unbiased)
    yield from _weights(replay, name)
    yield from _behind(replay, name)
    overflow = "squares beyond 65,504, the largest of float16"
    yield Hypothesis("float16 overflow", overflow, _by(_by_half_squares))
    for coarse in (torch.bfloat16, torch.float16):
        short = str(coarse).removeprefix("torch.")
        yield Hypothesis("norm cast order", f"computed in {short}", _by(_in(coarse)))
        weighted = f"computed and weighted in {short}"
        yield Hypothesis("norm cast order", weighted, _by(_in(coarse, weighted=True)))
    each = "each step rounded to the run's dtype"
    yield Hypothesis("norm cast order", each, _by(_step_by_step))
    yield Hypothesis("norm cast order", "weight applied before the cast back", _by(_late_cast))
    yield Hypothesis("norm cast order", "multiplied by a scale that was rounded", _by(_early_cast))
    for eps in _measured_eps(replay, name, observed):
        yield _eps(eps, config.norm_eps)


def _eps(eps: float, right: float) -> Hypothesis:
    changed = in_setting(lambda s: replace(s, config=replace(s.config, norm_eps=eps)))
    return Hypothesis("norm eps", f"eps {eps:g} instead of {right:g}", changed)


def _weights(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """No weight, or that of another norm of the block."""
    found = parameters(replay.setting, name)
    if not found or not replay.setting.config.norm_weight:
        return
    parameter = found[0]
    neutral = 0.0 if replay.setting.config.norm_offset else 1.0
    ones = in_setting(
        lambda s: with_weights(
            s, {parameter: torch.full_like(s.parameter_named(parameter), neutral)}
        )
    )
    yield Hypothesis("norm weight missing", "weight of ones", ones)
    stem = parameter.rpartition(".")[0]
    block, _, local = stem.rpartition(".")
    if local not in _BLOCK:
        return
    for other in _BLOCK:
        exchanged = {
            f"{stem}.{kind}": tensor
            for kind in ("weight", "bias")
            if (tensor := replay.setting.weights(f"{block}.{other}.{kind}")) is not None
        }
        if other != local and exchanged:
            yield Hypothesis(
                "swapped weights",
                f"{stem}: the weights of {other}",
                in_setting(lambda s, e=exchanged: with_weights(s, e)),
            )


def _behind(replay: Replay, name: str) -> Iterator[Hypothesis]:
    """The norm of the stream with the branch added already, as the first Transformers had it."""
    branch = {"attn_norm": "attn_out", "mlp_norm": "mlp_out"}.get(leaf(name))
    if branch is None or sibling(name, branch) not in replay.observed:
        return
    local = leaf(name)

    def behind(replay: Replay, name: str) -> Tensor:
        stream = replay.arguments(name)[0].to(replay.setting.dtype)
        total = stream + replay.value(sibling(name, branch)).to(replay.setting.dtype)
        return replace(replay.setting, layer=names.layer_of(name)).norm(local, total)

    yield Hypothesis("norm behind its branch", f"{local} of the stream plus {branch}", behind)


def _other_heads(kind: str, name: str) -> Iterator[Hypothesis]:
    """Heads normalised one by one instead of together, together instead of one by one, or all by
    the weight of the first, which each should have of its own."""
    local = "attn.q_norm" if leaf(name).endswith("q_normed") else "attn.k_norm"

    def each(s: Setting, x: Tensor) -> Tensor:
        weight = s.parameter(f"{local}.weight") if s.config.norm_weight else None
        parts = None if weight is None else weight.unflatten(0, (x.shape[1], -1)).unsqueeze(1)
        return _plain(s, x) if parts is None else _plain(s, x) * _offset(s, parts)

    def together(s: Setting, x: Tensor) -> Tensor:
        y = _plain(s, x.transpose(1, 2).flatten(2))
        times = 1 if kind == "each" else x.shape[1]
        if s.config.norm_weight:
            y = y * _offset(s, s.parameter(f"{local}.weight").repeat(times))
        bias = s.weights(s.name(f"{local}.bias"))
        y = y if bias is None else y + bias.to(y.dtype).repeat(times)
        return y.unflatten(-1, (x.shape[1], -1)).transpose(1, 2)

    def by_the_first(s: Setting, x: Tensor) -> Tensor:
        return _plain(s, x) * _offset(s, s.parameter(f"{local}.weight")[: x.shape[-1]])

    if kind == "whole":
        yield Hypothesis("q/k norm of each head", "heads normalised one by one", given(each))
        return
    yield Hypothesis("q/k norm over all heads", "heads normalised together", given(together))
    if kind == "each":
        said = "every head by the weight of head 0"
        yield Hypothesis("q/k norm of one head for all", said, given(by_the_first))


def _offset(s: Setting, weight: Tensor) -> Tensor:
    return 1 + weight if s.config.norm_offset else weight


def _plain(s: Setting, x: Tensor) -> Tensor:
    """The norm of a config without its weight and bias, over the last axis."""
    if s.config.norm == "layer":
        return F.layer_norm(x, x.shape[-1:], None, None, s.config.norm_eps)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.config.norm_eps)


def _weighted(s: Setting, local: str, x: Tensor) -> Tensor:
    """Times the weight of a norm, plus its bias."""
    weight, bias = (s.weights(s.name(f"{local}.{kind}")) for kind in ("weight", "bias"))
    if weight is not None and s.config.norm_weight:
        x = x * _offset(s, weight.to(x.dtype))
    return x if bias is None else x + bias.to(x.dtype)


def _centred(s: Setting, local: str, x: Tensor, unbiased: bool = False) -> Tensor:
    middle = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.var(-1, unbiased=unbiased, keepdim=True) + s.config.norm_eps)
    return _weighted(s, local, middle * scale)


def _scaled(s: Setting, local: str, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.config.norm_eps)
    return _weighted(s, local, x * scale)


def _about(s: Setting, x: Tensor) -> Tensor:
    """x about what its norm measures it from: its mean, or zero."""
    return x - x.mean(-1, keepdim=True) if s.config.norm == "layer" else x


def _step_by_step(s: Setting, local: str, x: Tensor) -> Tensor:
    middle = _about(s, x)
    scale = torch.rsqrt(middle.square().mean(-1, keepdim=True) + s.config.norm_eps)
    return _weighted(s, local, middle * scale)


def _by_half_squares(s: Setting, local: str, x: Tensor) -> Tensor:
    middle = _about(s, x)
    squares = middle.half().square().to(x.dtype)
    if bool(squares.isfinite().all()):
        raise ValueError("no square overflows: that float16 rounds them is another cause")
    scale = torch.rsqrt(squares.mean(-1, keepdim=True) + s.config.norm_eps)
    return _weighted(s, local, middle * scale)


def _in(coarse: torch.dtype, weighted: bool = False) -> How:
    """Everything in a coarse dtype, maybe the weight's product too; the run's casts around it."""

    def compute(s: Setting, local: str, x: Tensor) -> Tensor:
        low = x.to(coarse)
        if s.config.norm == "layer":
            weight, bias = (s.weights(s.name(f"{local}.{kind}")) for kind in ("weight", "bias"))
            weight = None if weight is None else _offset(s, weight.to(coarse))
            bias = None if bias is None else bias.to(coarse)
            return F.layer_norm(low, low.shape[-1:], weight, bias, s.config.norm_eps).to(s.dtype)
        normed = low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + s.config.norm_eps)
        return _weighted(s, local, normed if weighted else normed.to(s.dtype)).to(s.dtype)

    return compute


def _late_cast(s: Setting, local: str, x: Tensor) -> Tensor:
    """The weight multiplies what has not been cast back yet."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if s.config.norm == "layer":
        return Setting.norm(s, local, x)
    return _scaled(s, local, wide).to(s.dtype)


def _early_cast(s: Setting, local: str, x: Tensor) -> Tensor:
    """The mean is in float32; what x is multiplied by is rounded before."""
    wide = _about(s, x.to(torch.promote_types(x.dtype, torch.float32)))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + s.config.norm_eps)
    return _weighted(s, local, wide.to(s.dtype) * scale.to(s.dtype)).to(s.dtype)


def _measured_eps(replay: Replay, name: str, observed: Tensor | None) -> Iterator[float]:
    """The eps that the observed size of the smallest tokens asks for, in one to three digits."""
    if observed is None or not observed.isfinite().all():
        return
    wide = Replay(replay.observed, replay.setting.wide(), replay.starts)
    x, right = wide.arguments(name)[0].double(), wide.compute(name).double()
    seen, config = observed.double(), replay.setting.config
    if leaf(name) in ("attn.q_normed", "attn.k_normed") and config.qk_norm == "whole":
        x, right, seen = (value.transpose(1, 2).flatten(2) for value in (x, right, seen))
    power = _about(wide.setting, x).pow(2).mean(-1).flatten()  # (B · T)
    biases = [p for p in parameters(wide.setting, name) if p.endswith(".bias")]
    added = config.residual_scale if leaf(name) in ("attn_out", "mlp_out") else 1.0
    shift = added * wide.setting.parameter_named(biases[0]).double() if biases else 0.0
    right, seen = (right - shift).flatten(0, -2), (seen - shift).flatten(0, -2)
    gain = (right * seen).sum(-1) / (right * right).sum(-1)  # by which a token is smaller
    eps = (power + config.norm_eps) / gain.pow(2) - power
    smallest = eps[power.argsort()[: max(1, len(power) // 4)]].median()
    trust = power.clamp(min=1e-30).pow(-2)  # a token says it the better the smaller it is
    for found in (smallest, (trust * eps).sum() / trust.sum()):
        if 0 < float(found) < 0.1:
            yield from (float(f"{float(found):.{digits}e}") for digits in (0, 1, 2))
