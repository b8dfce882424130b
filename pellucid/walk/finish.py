"""What a model does to the result of attention or the MLP before it is added to the stream.

Nothing in most; a norm in some (OLMo 2, Gemma 2), a constant factor in others (Granite).
"""

from __future__ import annotations

from functools import partial

from pellucid.walk.norms import norm_of
from pellucid.walk.steps import Script


def is_finished(config, layer):
    """Whether there is a norm or a factor behind attention and the MLP."""
    return _normed(config, layer) or _scaled(config, layer)


def _normed(config, layer):
    return config.norm_places != "before"


def _scaled(config, layer):
    return config.residual_scale != 1


of_attention = Script()
_norm = partial(norm_of, "attn_product", per="layer", module="layers.N.attn_out_norm")
of_attention.include(
    _norm(
        "attn_out",
        name="layers.N.attn_out",
        title="What attention adds to the stream: scaled to the same size for every token",
        layer="What attention adds to the stream: every token centred and of spread 1",
    ),
    when=lambda config, layer: _normed(config, layer) and not _scaled(config, layer),
)
of_attention.include(
    _norm(
        "attn_out_normed",
        name="layers.N.attn.out_normed",
        dims=("T", "C"),
        title="The same, scaled to the same size for every token",
        layer="The same, every token centred and of spread 1",
    ),
    when=lambda config, layer: _normed(config, layer) and _scaled(config, layer),
)


@of_attention.step(
    "layer",
    "layers.N.attn_out",
    "{attn_out_normed} × {residual_scale}",
    called="attn_out",
    when=_scaled,
)
def attn_out_scaled(attn_out_normed, residual_scale):
    """What attention adds to the stream: every number times the same constant"""
    return attn_out_normed * residual_scale


of_mlp = Script()
of_mlp.include(
    of_attention,
    {word: word.replace("attn", "mlp") for word in of_attention.words()},
    {title: title.replace("attention", "the MLP") for title in of_attention.titles()},
)
