"""The dialects: where each reference implementation rounds.

In float32 every implementation of a model agrees to a few units in the last place. In bfloat16
they differ by where they cast, and that is enough to change generated text. A dialect is the
frozen list of those places; the models and the walk read it, nothing else decides a cast.

Sources: ``meta`` is Meta's llama3 ``model.py``; ``hf`` is transformers' eager attention
(``modeling_llama.py``, ``modeling_gpt2.py``); ``notebook`` is the notebook "llama3 implemented from
scratch, one tensor and matrix multiplication at a time", and for GPT-2 the book's modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Family = Literal["llama", "gpt2"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """Cast points of one reference. ``x`` is the activation dtype (the dtype of the weights).

    norm      "float32": normalise in float32, cast to x, then times weight; "x": all in x
    rope      "float32": cos, sin and product in float32, cast to x; "x": cos and sin cast to x,
              product in x; "keep": as float32, and q, k stay float32 (so scores are float32)
    polar     RoPE in complex numbers, as Meta: cos and sin from ``torch.polar``, a complex product,
              and q · k summed over the interleaved order of its pairs
    scale     "divide": scores / sqrt(D); "multiply": scores * D**-0.5 (they round differently)
    mask      value added where a token may not look: "-inf", or "min", the dtype's lowest finite
    softmax   "float32": softmax in float32, cast to x; "x": softmax of x
    gelu      "fused": one kernel; "composed": the tanh formula, each operation rounded
    logits    "float32": cast after the product; "x": as the product leaves them
    """

    name: str
    norm: Literal["float32", "x"] = "float32"
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


_DIALECTS: dict[tuple[str, Family], Dialect] = {
    ("meta", "llama"): Dialect(name="meta", polar=True, logits="float32"),
    ("meta", "gpt2"): Dialect(name="meta", logits="float32"),
    ("hf", "llama"): Dialect(name="hf", rope="x", scale="multiply", mask="min"),
    ("hf", "gpt2"): Dialect(name="hf", scale="multiply", mask="min", softmax="x", gelu="composed"),
    ("notebook", "llama"): Dialect(name="notebook", norm="x", rope="keep", polar=True),
    ("notebook", "gpt2"): Dialect(name="notebook", softmax="x", gelu="composed"),
}
NAMES = ("meta", "hf", "notebook")


def dialect(name: str, family: Family) -> Dialect:
    """The cast points of reference `name` for `family`; ValueError for a name that is none."""
    if name not in NAMES:
        raise ValueError(f"unknown dialect {name!r}: expected one of {', '.join(NAMES)}")
    return _DIALECTS[name, family]
