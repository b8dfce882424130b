"""The dialects: where each reference implementation rounds.

In float32 every implementation of a model agrees to a few units in the last place. In bfloat16
they differ by where they cast, and that is enough to change generated text. A dialect is the
frozen list of those places; the models and the walk read it, nothing else decides a cast.

Sources: ``meta`` is Meta's llama3 ``model.py``; ``hf`` is transformers' eager attention
(``modeling_llama.py``, ``modeling_gpt2.py``); ``notebook`` is the notebook "llama3 implemented from
scratch, one tensor and matrix multiplication at a time", and for GPT-2 the book's modules.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Cast points of one reference. ``x`` is the activation dtype (the dtype of the weights).

    norm      "float32": normalise in float32, cast to x, then times weight; "x": all in x
    norm_product
              "x": the weight multiplies after that cast; "float32": before it (Gemma, OLMo 2)
    rope      "float32": cos, sin and product in float32, cast to x; "x": cos and sin cast to x,
              product in x; "keep": as float32, and q, k stay float32 (so scores are float32)
    polar     RoPE in complex numbers, as Meta: cos and sin from ``torch.polar``, a complex product,
              and q · k summed over the interleaved order of its pairs
    scale     "divide": scores / sqrt(D); "multiply": scores * D**-0.5 (they round differently)
    mask      value added where a token may not look: "-inf", or "min", the dtype's lowest finite
    softmax   "float32": softmax in float32, cast to x; "x": softmax of x
    gelu      of gelu_new: "fused": one kernel; "composed": the tanh formula, each operation rounded
    logits    "float32": cast after the product; "x": as the product leaves them
    """

    name: str
    norm: Literal["float32", "x"] = "float32"
    norm_product: Literal["float32", "x"] = "x"
    rope: Literal["float32", "x", "keep"] = "float32"
    polar: bool = False
    scale: Literal["divide", "multiply"] = "divide"
    mask: Literal["-inf", "min"] = "-inf"
    softmax: Literal["float32", "x"] = "float32"
    gelu: Literal["fused", "composed"] = "fused"
    logits: Literal["float32", "x"] = "x"

    @property
    def fusible(self) -> bool:
        """Whether fused attention computes the same thing: q, k and v must share one dtype."""
        return self.rope != "keep"


_META = Dialect(name="meta", polar=True, logits="float32")
_HF = Dialect(name="hf", rope="x", scale="multiply", mask="min", gelu="composed")
_NOTEBOOK = Dialect(name="notebook", norm="x", rope="keep", polar=True)
# By whose model it is: what a config calls its `rounding`. transformers casts each family's norms
# and tables as that family's first code did; Meta and the notebook have a Llama and nothing else.
_DIALECTS: dict[str, dict[str, Dialect]] = {
    "llama": {"meta": _META, "hf": _HF, "notebook": _NOTEBOOK},
    "gemma": {  # modeling_gemma.py, GemmaRMSNorm: cast after × (1 + weight)
        "meta": replace(_META, norm_product="float32"),
        "hf": replace(_HF, norm_product="float32"),
        "notebook": _NOTEBOOK,
    },
    "olmo": {  # modeling_olmo2.py: as Gemma's norm; cos and sin stay float32, and so the product
        "meta": replace(_META, norm_product="float32"),
        "hf": replace(_HF, norm_product="float32", rope="float32"),
        "notebook": _NOTEBOOK,
    },
    "gpt2": {
        "meta": Dialect(name="meta", logits="float32"),
        "hf": Dialect(name="hf", scale="multiply", mask="min", softmax="x", gelu="composed"),
        "notebook": Dialect(name="notebook", softmax="x", gelu="composed"),
    },
}
NAMES = ("meta", "hf", "notebook")
ROUNDINGS = tuple(_DIALECTS)


def dialect(name: str, rounding: str) -> Dialect:
    """The cast points of reference `name` for a `rounding`; ValueError for an unknown name."""
    if name not in NAMES:
        raise ValueError(f"unknown dialect {name!r}: expected one of {', '.join(NAMES)}")
    if rounding not in _DIALECTS:
        raise ValueError(f"unknown rounding {rounding!r}: expected one of {', '.join(_DIALECTS)}")
    return _DIALECTS[rounding][name]
