"""The MLP, with a gate (SwiGLU, GeGLU) or without one (GPT-2).

    T  tokens      C  width of the residual stream      F  hidden width of the MLP

with a gate      down(act(gate) × up), Shazeer, 2020; w1, w3 and w2 in Meta's code
without one      down(act(up))
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F

from pellucid.walk.arithmetic import linear
from pellucid.walk.finish import is_finished, of_mlp
from pellucid.walk.norms import norm_of
from pellucid.walk.steps import Script

script = Script()
script.chapter("the MLP")
script.include(
    norm_of(
        "resid_mid",
        "mlp_norm",
        "layer",
        "layers.N.mlp_norm",
        module="layers.N.mlp_norm",
        title="The stream, scaled again",
        layer="The stream, normalised again: the same four steps",
    ),
    when=lambda config, layer: config.norm_places != "after" and not config.parallel,
)


# ── The activation, written for `pre` of an MLP without a gate ────────────────────────────────────

activation = Script()
_act = partial(activation.step, "layer", "layers.N.mlp.act", called="act")


def _is(*forms: str):
    return lambda config, layer: config.activation in forms


@activation.step(
    "layer",
    "layers.N.mlp.inner",
    "√(2/π) × ({pre} + 0.044715 × {pre}³)",
    dims="T F",
    when=_is("gelu_tanh", "gelu_new"),
)
def inner(pre):
    """Inside the tanh of GELU"""
    return math.sqrt(2.0 / math.pi) * (pre + 0.044715 * torch.pow(pre, 3.0))


@_act("½ × {pre} × (1 + tanh {inner})", when=_is("gelu_tanh"))
def gelu_in_one_kernel(pre, inner):
    """What each hidden unit says: GELU, a soft switch (Hendrycks & Gimpel, 2016)"""
    return F.gelu(pre, approximate="tanh")  # the formula, rounded once


@_act("½ × {pre} × (1 + tanh {inner})", when=_is("gelu_new"))
def gelu_by_tanh(pre, inner, dialect):
    """What each hidden unit says: GELU, a soft switch (Hendrycks & Gimpel, 2016)"""
    if dialect.gelu == "fused":  # the same formula in one kernel, rounded once
        return F.gelu(pre, approximate="tanh")
    return 0.5 * pre * (1.0 + torch.tanh(inner))


@_act("½ × {pre} × (1 + erf({pre} / √2))", when=_is("gelu"))
def gelu(pre):
    """What each hidden unit says: GELU, a soft switch (Hendrycks & Gimpel, 2016)"""
    return F.gelu(pre)


@_act("{pre} × sigmoid({pre})", when=_is("silu"))
def silu(pre):
    """What each hidden unit says: SiLU, a soft switch (Elfwing et al., 2017)"""
    return F.silu(pre)


@_act("max({pre}, 0)²", when=_is("relu2"))
def squared_relu(pre):
    """What each hidden unit says: what lies above zero, squared (So et al., 2021)"""
    return F.relu(pre).square()


# ── Without a gate: down(act(up)) ─────────────────────────────────────────────────────────────────

plain = Script(
    {
        "w_up": "layers.N.mlp.up_proj.weight",  # (F, C)
        "w_down": "layers.N.mlp.down_proj.weight",  # (C, F)
    }
)
each_layer = partial(plain.step, "layer")
plain.show("w_up", "The weights that lead into the MLP", dims="F C")
plain.show("w_down", "The weights that lead back to the stream", dims="C F")


@each_layer("layers.N.mlp.pre", "{mlp_norm} · {w_up}ᵀ + {b_up}")
def pre(mlp_norm, w_up, b_up):
    """What each hidden unit is told"""
    return linear(mlp_norm, w_up, b_up)


plain.include(activation)


@each_layer(
    "layers.N.mlp_out",
    "{act} · {w_down}ᵀ + {b_down}",
    called="mlp_out",
    title="What the MLP adds to the stream",
    when=lambda config, layer: not is_finished(config, layer),
)
@each_layer(
    "layers.N.mlp.out",
    "{act} · {w_down}ᵀ + {b_down}",
    called="mlp_product",
    title="What the MLP found, led back to the width of the stream",
    when=is_finished,
)
def down(act, w_down, b_down):
    return linear(act, w_down, b_down)


script.include(plain, when=lambda config, layer: not config.gated)


# ── With a gate: down(act(gate) × up), the letters of Meta's code ─────────────────────────────────

gated = Script(
    {
        "w1": "layers.N.mlp.gate_proj.weight",  # (F, C)
        "w3": "layers.N.mlp.up_proj.weight",  # (F, C)
        "w2": "layers.N.mlp.down_proj.weight",  # (C, F)
    }
)
each_layer = partial(gated.step, "layer")
gated.show("w1", "The weights of the gate", dims="F C")
gated.show("w3", "The weights of what the gate lets through", dims="F C")
gated.show("w2", "The weights that lead back to the stream", dims="C F")


@each_layer("layers.N.mlp.gate", "{mlp_norm} · {w1}ᵀ + {b1}")
def gate(mlp_norm, w1, b1):
    """The gate of each hidden unit"""
    return linear(mlp_norm, w1, b1)


@each_layer(
    "layers.N.mlp.act", "silu({gate}) = gate × sigmoid(gate)", called="act", when=_is("silu")
)
def act_of_gate(gate):
    """How far each gate opens"""
    return F.silu(gate)


gated.include(
    activation,
    {"pre": "gate"},
    {
        t: t.replace("What each hidden unit says", "How far each gate opens")
        for t in activation.titles()
    },
    when=lambda config, layer: config.activation != "silu",
)


@each_layer("layers.N.mlp.up", "{mlp_norm} · {w3}ᵀ + {b3}")
def up(mlp_norm, w3, b3):
    """What stands before the gates"""
    return linear(mlp_norm, w3, b3)


@each_layer("layers.N.mlp.hidden", "{act} × {up}")
def hidden(act, up):
    """What gets through"""
    return act * up


@each_layer(
    "layers.N.mlp_out",
    "{hidden} · {w2}ᵀ + {b2}",
    called="mlp_out",
    title="What the MLP adds to the stream",
    when=lambda config, layer: not is_finished(config, layer),
)
@each_layer(
    "layers.N.mlp.out",
    "{hidden} · {w2}ᵀ + {b2}",
    called="mlp_product",
    title="What the MLP found, led back to the width of the stream",
    when=is_finished,
)
def down_from_gates(hidden, w2, b2):
    return linear(hidden, w2, b2)


script.include(gated, when=lambda config, layer: config.gated)
script.include(of_mlp)


# ── Back to the stream ────────────────────────────────────────────────────────────────────────────


@script.step(
    "layer",
    "layers.N.resid_post",
    "{resid_mid} + {mlp_out}",
    when=lambda config, layer: not config.parallel,
)
def resid_post(resid_mid, mlp_out):
    """The stream after the layer"""
    return resid_mid + mlp_out


@script.step(
    "layer",
    "layers.N.resid_post",
    "{resid_pre} + {attn_out} + {mlp_out}",
    called="resid_post",
    when=lambda config, layer: config.parallel,
)
def resid_post_of_both(resid_pre, attn_out, mlp_out):
    """The stream after the layer: attention and MLP read the same, and both add to it"""
    return resid_pre + attn_out + mlp_out
