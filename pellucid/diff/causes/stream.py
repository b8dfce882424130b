"""The residual stream and what reads and writes it: embedding, norms, MLP, head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pellucid import names
from pellucid.diff.causes.hypothesis import (
    Hypothesis,
    Wrong,
    from_sibling,
    given,
    in_setting,
    of_model,
    parameters,
    sibling,
    with_weights,
)
from pellucid.diff.replay.operations import Setting, leaf
from pellucid.diff.replay.replay import Replay
from pellucid.graph import inputs


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
        yield Hypothesis("token ids shifted", f"row of token {shift:+d}", moved)


def norm(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Other eps, missing, the other family's norm, other precision."""
    config, parameter = replay.setting.config, parameters(replay.setting, name)[0]
    stem = parameter.removesuffix(".weight")
    local = stem.split(".", 2)[-1] if stem.startswith("layers.") else stem
    for eps in (1e-6, 1e-5, 1e-8, 1e-12, 1e-3, 1e-4, 0.0):
        if eps != config.norm_eps:
            yield _eps(eps, config.norm_eps)
    yield Hypothesis("norm missing", "the input, not normalised", given(lambda s, x: x))

    def weighted(function: Callable[[Setting, Tensor], Tensor]) -> Wrong:
        return given(lambda s, x: function(s, x) * s.parameter(f"{local}.weight") + _bias(s, local))

    def unit(s: Setting, x: Tensor, unbiased: bool = False) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(x.var(-1, unbiased=unbiased, keepdim=True) + s.config.norm_eps)

    def scaled(s: Setting, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.config.norm_eps)

    if config.family == "llama":
        yield Hypothesis("LayerNorm for RMSNorm", "the mean is subtracted", weighted(unit))
    else:
        yield Hypothesis("RMSNorm for LayerNorm", "the mean is not subtracted", weighted(scaled))
        unbiased = weighted(lambda s, x: unit(s, x, True))
        yield Hypothesis("unbiased variance", "variance divided by C − 1", unbiased)
    ones = in_setting(
        lambda s: with_weights(s, {parameter: torch.ones_like(s.parameter_named(parameter))})
    )
    yield Hypothesis("norm weight missing", "weight of ones", ones)
    overflow = weighted(lambda s, x: _by_half_squares(s, x))
    yield Hypothesis("float16 overflow", "squares beyond 65,504, the largest of float16", overflow)
    for coarse in (torch.bfloat16, torch.float16):
        short = str(coarse).removeprefix("torch.")
        yield Hypothesis("norm cast order", f"computed in {short}", _norm_in(coarse, local))
    yield Hypothesis(
        "norm cast order", "weight applied before the cast back", _norm_late_cast(local)
    )
    for eps in _measured_eps(replay, name, observed):
        yield _eps(eps, config.norm_eps)


def _eps(eps: float, right: float) -> Hypothesis:
    changed = in_setting(lambda s: replace(s, config=replace(s.config, norm_eps=eps)))
    return Hypothesis("norm eps", f"eps {eps:g} instead of {right:g}", changed)


def _by_half_squares(s: Setting, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if s.config.family == "gpt2" else x
    squares = centred.half().square().to(x.dtype)
    return centred * torch.rsqrt(squares.mean(-1, keepdim=True) + s.config.norm_eps)


def _measured_eps(replay: Replay, name: str, observed: Tensor | None) -> Iterator[float]:
    """The eps that the observed size of the smallest tokens asks for, in one to three digits."""
    if observed is None or not observed.isfinite().all():
        return
    wide = Replay(replay.observed, replay.setting.wide(), replay.starts)
    x, right = wide.arguments(name)[0].double(), wide.compute(name).double()
    config = replay.setting.config
    centred = x - x.mean(-1, keepdim=True) if config.family == "gpt2" else x
    power = centred.pow(2).mean(-1).flatten()  # (B · T)
    setting = replace(wide.setting, layer=names.layer_of(name))
    stem = parameters(setting, name)[0].removesuffix(".weight")
    bias = setting.weights(f"{stem}.bias")
    shift = 0.0 if bias is None else bias.double()
    right, seen = (right - shift).flatten(0, -2), (observed.double() - shift).flatten(0, -2)
    gain = (right * seen).sum(-1) / (right * right).sum(-1)  # by which a token is smaller
    eps = (power + config.norm_eps) / gain.pow(2) - power
    smallest = eps[power.argsort()[: max(1, len(power) // 4)]].median()
    if 0 < float(smallest) < 0.1:
        yield from (float(f"{float(smallest):.{digits}e}") for digits in (0, 1, 2))


def _bias(s: Setting, local: str) -> Tensor | float:
    bias = s.weights(s.name(f"{local}.bias"))
    return 0.0 if bias is None else bias.to(s.dtype)


def _norm_in(coarse: torch.dtype, local: str) -> Wrong:
    """Everything in a coarse dtype, the casts of the run around it."""

    def compute(s: Setting, x: Tensor) -> Tensor:
        low = x.to(coarse)
        if s.config.family == "gpt2":
            weight = s.parameter(f"{local}.weight").to(coarse)
            bias = s.parameter(f"{local}.bias").to(coarse)
            return F.layer_norm(low, weight.shape, weight, bias, s.config.norm_eps).to(s.dtype)
        normed = low * torch.rsqrt(low.pow(2).mean(-1, keepdim=True) + s.config.norm_eps)
        return normed.to(s.dtype) * s.parameter(f"{local}.weight")

    return given(compute)


def _norm_late_cast(local: str) -> Wrong:
    def compute(s: Setting, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if s.config.family == "llama":
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + s.config.norm_eps)
            return (normed * s.parameter(f"{local}.weight").to(wide.dtype)).to(s.dtype)
        return s.norm(local, x)

    return given(compute)


def residual(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Added to the wrong stream, or not added."""
    parts = inputs(replay.setting.config, name)
    if len(parts) < 2:
        return
    normed = "attn_norm" if leaf(name) == "resid_mid" else "mlp_norm"
    if leaf(name) == "resid_pre":
        yield Hypothesis("position embedding missing", "", given(lambda s, x, y: x))
        return

    def after_norm(replay: Replay, name: str) -> Tensor:
        added = replay.value(parts[1]).to(replay.setting.dtype)
        return replay.value(sibling(name, normed)).to(replay.setting.dtype) + added

    yield Hypothesis("residual after the norm", f"{normed} + {leaf(parts[1])}", after_norm)
    yield Hypothesis("residual missing", f"{leaf(parts[1])} alone", given(lambda s, x, y: y))
    yield Hypothesis("branch missing", f"{leaf(parts[0])} alone", given(lambda s, x, y: x))
    yield Hypothesis("residual subtracted", "minus", given(lambda s, x, y: x - y))
    if leaf(name) == "resid_post":

        def parallel(replay: Replay, name: str) -> Tensor:
            added = replay.value(parts[1]).to(replay.setting.dtype)
            return replay.value(sibling(name, "resid_pre")).to(replay.setting.dtype) + added

        yield Hypothesis("residual from before attention", "resid_pre + mlp_out", parallel)


def act(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """Another function, or of the wrong branch."""
    for cause, evidence, function in (
        ("GELU form", "erf instead of tanh", F.gelu),
        ("GELU form", "tanh instead of erf", lambda x: F.gelu(x, approximate="tanh")),
        ("GELU form", "x · sigmoid(1.702 x)", lambda x: x * torch.sigmoid(1.702 * x)),
        ("activation", "SiLU", F.silu),
        ("activation", "ReLU", F.relu),
        ("activation", "none", lambda x: x),
    ):
        yield Hypothesis(cause, evidence, given(lambda s, x, f=function: f(x)))
    if replay.setting.config.family == "llama":
        wrong = from_sibling("mlp.up", lambda s, up: F.silu(up))
        yield Hypothesis("SwiGLU on the wrong branch", "SiLU of up instead of gate", wrong)


def hidden(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """The gate on the wrong branch, or left out."""

    def wrong_branch(replay: Replay, name: str) -> Tensor:
        gate = replay.value(sibling(name, "mlp.gate")).to(replay.setting.dtype)
        up = replay.value(sibling(name, "mlp.up")).to(replay.setting.dtype)
        return gate * F.silu(up)

    yield Hypothesis("SwiGLU on the wrong branch", "gate × SiLU(up)", wrong_branch)
    yield Hypothesis("branch missing", "act alone", given(lambda s, act, up: act))


def logits(replay: Replay, name: str, observed: Tensor | None) -> Iterator[Hypothesis]:
    """The final norm left out, or the embedding's table for the head's."""
    config = replay.setting.config
    last = of_model(name, f"layers.{config.n_layers - 1}.resid_post")
    head = "embed" if config.tied else "unembed"

    def without_norm(replay: Replay, name: str) -> Tensor:
        x = replay.value(last).to(replay.setting.dtype)
        return replay.setting.linear(head, x)

    yield Hypothesis("final norm missing", "the head reads the residual stream", without_norm)
    if not config.tied:
        tied = given(lambda s, x: s.linear("embed", x))
        yield Hypothesis("head tied", "the embedding for the head", tied)
