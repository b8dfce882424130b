"""The vocabulary: every named tensor between a prompt and its next token, as data.

One vocabulary for both families; the head is an axis, never part of a name. Letters of the dims:

    B  batch                       C  width of the residual stream
    T  tokens in this pass         H  query heads        Hkv  key/value heads
    S  tokens seen so far          D  head width         D/2  pairs rotated by RoPE
    F  hidden width of the MLP     V  vocabulary

An address is a name with an optional index, ``layers.3.attn.scores[5,7,3]``; the batch axis is left
out when B is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

_BOTH = ("gpt2", "llama")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One name: its dims, the families that have it, one sentence, and what others call it."""

    leaf: str  # "attn.q" of a layer, or a name of the whole model
    dims: tuple[str, ...]
    sentence: str
    families: tuple[str, ...] = _BOTH
    layer: bool = True
    transformerlens: str | None = None  # hook name, after "blocks.N." for a layer; its RMSNorm
    # hooks hook_normalized before the weight, its LayerNorm after it
    hf: str | None = None  # transformers' Llama module whose output it is
    ggml: str | None = None  # llama.cpp's graph node, before "-N" for a layer

    @property
    def name(self) -> str:
        """Full name, with N standing for the layer."""
        return f"layers.N.{self.leaf}" if self.layer else self.leaf


def _row(leaf: str, dims: str, sentence: str, **more: Any) -> Row:
    return Row(leaf=leaf, dims=tuple(dims.split()), sentence=sentence, **more)


_LLAMA = {"families": ("llama",)}
_GPT2 = {"families": ("gpt2",)}
_MODEL = {"layer": False}

# In the order of the forward pass. The table is the contract; a test holds it against a real trace.
ROWS: tuple[Row, ...] = (
    _row("tokens", "B T", "Token ids of this pass.", **_MODEL, ggml="inp_tokens"),
    _row("positions", "T", "Position of each token (B, T with left padding).", **_MODEL),
    _row("mask", "T S", "True where a token may look (B, 1, T, S with left padding).", **_MODEL),
    _row(
        "embed",
        "B T C",
        "Token embedding: one row of the table per token.",
        **_MODEL,
        transformerlens="hook_embed",
        hf="model.embed_tokens",
        ggml="inp_embd",
    ),
    _row(
        "pos_embed",
        "T C",
        "Learned embedding of each position.",
        **_MODEL,
        **_GPT2,
        transformerlens="hook_pos_embed",
    ),
    _row("rope.cos", "T D/2", "Cosine of position × frequency.", **_MODEL, **_LLAMA),
    _row("rope.sin", "T D/2", "Sine of position × frequency.", **_MODEL, **_LLAMA),
    _row(
        "resid_pre",
        "B T C",
        "Residual stream entering the block.",
        transformerlens="hook_resid_pre",
    ),
    _row(
        "attn_norm",
        "B T C",
        "Normalised input of attention.",
        transformerlens="ln1.hook_normalized",
        hf="input_layernorm",
        ggml="attn_norm",
    ),
    _row("attn.q", "B H T D", "Queries.", transformerlens="attn.hook_q", ggml="Qcur"),
    _row("attn.k", "B Hkv T D", "Keys.", transformerlens="attn.hook_k", ggml="Kcur"),
    _row("attn.v", "B Hkv T D", "Values.", transformerlens="attn.hook_v", ggml="Vcur"),
    _row(
        "attn.q_rotated",
        "B H T D",
        "Queries after RoPE.",
        **_LLAMA,
        transformerlens="attn.hook_rot_q",
    ),
    _row(
        "attn.k_rotated",
        "B Hkv T D",
        "Keys after RoPE.",
        **_LLAMA,
        transformerlens="attn.hook_rot_k",
    ),
    _row("attn.scores", "B H T S", "q · kᵀ / √D, before the mask."),
    _row(
        "attn.masked_scores",
        "B H T S",
        "Scores with the future masked off.",
        transformerlens="attn.hook_attn_scores",
    ),
    _row(
        "attn.pattern",
        "B H T S",
        "Softmax over S: where each token looks.",
        transformerlens="attn.hook_pattern",
        ggml="kq_soft_max",
    ),
    _row("attn.z", "B H T D", "pattern · v: what each head read.", transformerlens="attn.hook_z"),
    _row(
        "attn_out",
        "B T C",
        "Attention's addition to the residual stream.",
        transformerlens="hook_attn_out",
        hf="self_attn",
        ggml="attn_out",
    ),
    _row(
        "resid_mid",
        "B T C",
        "Residual stream between attention and MLP.",
        transformerlens="hook_resid_mid",
        ggml="ffn_inp",
    ),
    _row(
        "mlp_norm",
        "B T C",
        "Normalised input of the MLP.",
        transformerlens="ln2.hook_normalized",
        hf="post_attention_layernorm",
        ggml="ffn_norm",
    ),
    _row("mlp.pre", "B T F", "Hidden layer before GELU.", **_GPT2, transformerlens="mlp.hook_pre"),
    _row(
        "mlp.gate",
        "B T F",
        "w1 · x, before SiLU.",
        **_LLAMA,
        transformerlens="mlp.hook_pre",
        hf="mlp.gate_proj",
        ggml="ffn_gate",
    ),
    _row(
        "mlp.up",
        "B T F",
        "w3 · x.",
        **_LLAMA,
        transformerlens="mlp.hook_pre_linear",
        hf="mlp.up_proj",
        ggml="ffn_up",
    ),
    _row("mlp.act", "B T F", "GELU of pre, or SiLU of gate.", ggml="ffn_silu"),
    _row(
        "mlp.hidden",
        "B T F",
        "act × up.",
        **_LLAMA,
        transformerlens="mlp.hook_post",
        ggml="ffn_gate_par",
    ),
    _row(
        "mlp_out",
        "B T C",
        "The MLP's addition to the residual stream.",
        transformerlens="hook_mlp_out",
        hf="mlp",
        ggml="ffn_out",
    ),
    _row(
        "resid_post",
        "B T C",
        "Residual stream leaving the block.",
        transformerlens="hook_resid_post",
        ggml="l_out",
    ),
    _row(
        "final_norm",
        "B T C",
        "Normalised residual stream after the last block.",
        **_MODEL,
        transformerlens="ln_final.hook_normalized",
        hf="model.norm",
        ggml="result_norm",
    ),
    _row(
        "logits",
        "B T V",
        "One score per token of the vocabulary.",
        **_MODEL,
        hf="lm_head",
        ggml="result_output",
    ),
)
_BY_NAME = {row.name: row for row in ROWS}
_STEP = re.compile(r"step\.(\d+)\.")
_LAYER = re.compile(r"layers\.(\d+)\.")


def without_step(name: str) -> str:
    """`name` without the ``step.i.`` of a decoding step."""
    return _STEP.sub("", name, count=1) if name.startswith("step.") else name


def step_of(name: str) -> int:
    """Decoding step of a name; 0 for the first pass, whose names have no prefix."""
    found = _STEP.match(name)
    return int(found[1]) if found else 0


def layer_of(name: str) -> int | None:
    """Layer of a name, or None for a tensor of the whole model."""
    found = _LAYER.match(without_step(name))
    return int(found[1]) if found else None


def row(name: str) -> Row:
    """The table's row for a full name; KeyError with advice for a name that is not in it."""
    plain = _LAYER.sub("layers.N.", without_step(name))
    if plain not in _BY_NAME:
        raise KeyError(f"{name!r} is no tensor name; names look like layers.0.attn.q or logits")
    return _BY_NAME[plain]


def known(name: str) -> bool:
    """Whether `name` is in the vocabulary; a trace file may hold other tensors besides."""
    return _LAYER.sub("layers.N.", without_step(name)) in _BY_NAME


def dims(name: str) -> tuple[str, ...]:
    """Letters of a name's dims, for example ("B", "H", "T", "S")."""
    return row(name).dims


def has_batch(name: str) -> bool:
    """Whether the first axis of a name is the batch."""
    return not known(name) or dims(name)[0] == "B"


def expand(config: Any) -> Iterator[str]:
    """Every name of one pass of a model with `config`, in the order of the forward pass."""
    rows = [row for row in ROWS if config.family in row.families]
    tail = ("final_norm", "logits")
    yield from (row.name for row in rows if not row.layer and row.name not in tail)
    for layer in range(config.n_layers):
        yield from (f"layers.{layer}.{row.leaf}" for row in rows if row.layer)
    yield from tail


def sizes(config: Any, *, batch: int, tokens: int, seen: int) -> dict[str, int]:
    """Size of each letter for a pass of `tokens` tokens with `seen` in view."""
    return {
        "B": batch,
        "T": tokens,
        "S": seen,
        "C": config.width,
        "H": config.n_heads,
        "Hkv": config.n_kv_heads,
        "D": config.head_dim,
        "D/2": config.head_dim // 2,
        "F": config.hidden_width,
        "V": config.vocab_size,
    }


def elements(name: str, sizes: dict[str, int]) -> int:
    """Number of elements of a named tensor."""
    return prod(sizes[letter] for letter in dims(name))


Index = tuple[int | slice, ...]


def parse(address: str) -> tuple[str, Index]:
    """Name and index of an address: ``"mask[0,:3]"`` -> ``("mask", (0, slice(None, 3)))``."""
    name, bracket, inside = address.partition("[")
    if not bracket:
        return name, ()
    if not inside.endswith("]"):
        raise ValueError(f"address {address!r}: the index has no closing bracket")
    return name, tuple(_parse_one(part.strip(), address) for part in inside[:-1].split(","))


def _parse_one(part: str, address: str) -> int | slice:
    try:
        if ":" not in part:
            return int(part)
        fields = [int(field) if field.strip() else None for field in part.split(":")]
        return slice(*fields)
    except (ValueError, TypeError):
        raise ValueError(
            f"address {address!r}: {part!r} is no index; expected a number or a slice such as 2:5"
        ) from None
