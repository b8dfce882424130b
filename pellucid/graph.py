"""Every named tensor between a prompt and its next token, as data.

One table. Which names a model has and in which order, what a tensor is computed from and whose
weight it reads all follow from it; the model, the walk and the replay are held against it by tests.
The head is an axis, never part of a name. Letters of the dims:

    B  batch                       C  width of the residual stream
    T  tokens in this pass         H  query heads        Hkv  key/value heads
    S  tokens seen so far          D  head width         D/2  pairs rotated by RoPE
    F  hidden width of the MLP     V  vocabulary

What a row reads: names of its own block; ``^`` begins a name of the whole model; ``a|b|c`` is
whichever of a, b and c comes last before this tensor in this model. Three names stand for what depends on the
layer: ``^stream`` for the residual stream as the block before left it, ``^cos`` and ``^sin`` for
the tables of the layer's RoPE, ``^seen`` for its mask.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from pellucid.names import general, layer_of, step_of

When = Callable[[Any, Any], bool]  # of a `ModelConfig` and the `Layer` that asks


def _always(config: Any, layer: Any) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Row:
    """One name: its dims, what it is computed from, whose weight it reads, and one sentence."""

    leaf: str  # "attn.q" of a layer, or a name of the whole model
    dims: tuple[str, ...]
    sentence: str
    reads: tuple[str, ...] = ()
    weight: str = ""  # module, "a|b": the first of them that the model has
    when: When = _always  # whether a model has it, in a layer of this kind
    layer: bool = True

    @property
    def name(self) -> str:
        """Full name, with N standing for the layer."""
        return f"layers.N.{self.leaf}" if self.layer else self.leaf


def _row(leaf: str, dims: str, reads: str, weight: str, sentence: str, when: When = _always) -> Row:
    parts: dict[str, Any] = {"dims": tuple(dims.split()), "reads": tuple(reads.split())}
    return Row(leaf=leaf, weight=weight, sentence=sentence, when=when, **parts)


def _whole(
    leaf: str, dims: str, reads: str, weight: str, sentence: str, when: When = _always
) -> Row:
    return replace(_row(leaf, dims, reads, weight, sentence, when), layer=False)


def _learned(c: Any, layer: Any) -> bool:
    return c.rope is None


def _rope(name: str) -> When:
    return lambda c, layer: any(kind.rope == name for kind in c.kinds)


def _turned(c: Any, layer: Any) -> bool:
    return bool(layer.rope)


def _normed_before(c: Any, layer: Any) -> bool:
    return c.norm_places != "after"


def _in_turn(c: Any, layer: Any) -> bool:
    return not c.parallel


def _finished(c: Any, layer: Any) -> bool:
    return c.norm_places != "before" or c.residual_scale != 1


def _heads_normed(last: bool) -> When:
    return lambda c, layer: bool(c.qk_norm) and c.qk_norm_last == last


def _rescaled(c: Any, layer: Any) -> bool:
    return bool(c.logit_cap) or c.logit_scale != 1


def _growing(c: Any, layer: Any) -> bool:
    return c.query_growth != 0


def _gated(c: Any, layer: Any) -> bool:
    return c.gated


_Q = "attn.q|attn.q_normed|attn.q_rotated|attn.q_scaled"
_K = "attn.k|attn.k_normed|attn.k_rotated"
_INTO_ATTENTION = "resid_pre|attn_norm"
_INTO_MLP = "resid_pre|attn_norm|resid_mid|mlp_norm"

# fmt: off
# In the order of the forward pass: leaf, dims, reads, weight, sentence, when.
ROWS: tuple[Row, ...] = (
    _whole("tokens", "B T", "", "", "Token ids of this pass."),
    _whole("positions", "T", "", "", "Position of each token (B, T with left padding)."),
    _whole("mask", "T S", "", "", "True where a token may look (B, 1, T, S with left padding)."),
    _whole("embed", "B T C", "^tokens", "embed", "Token embedding: one row of the table per token."),
    _whole("pos_embed", "T C", "^positions", "pos_embed", "Learned embedding of each position.", _learned),
    _whole("embed_normed", "B T C", "^embed", "embed_norm", "Embedding, normalised.", lambda c, layer: c.embed_norm),
    _whole("embed_scaled", "B T C", "^embed|^embed_normed", "", "Embedding times a constant.", lambda c, layer: c.embed_scale != 1),
    _whole("rope.cos", "T D/2", "^positions", "", "Cosine of position × frequency.", _rope("rope")),
    _whole("rope.sin", "T D/2", "^positions", "", "Sine of position × frequency.", _rope("rope")),
    _whole("second_rope.cos", "T D/2", "^positions", "", "Cosine of the second RoPE.", _rope("second_rope")),
    _whole("second_rope.sin", "T D/2", "^positions", "", "Sine of the second RoPE.", _rope("second_rope")),
    _whole("query_growth", "T", "^positions", "", "Factor on queries, which grows with the position.", _growing),
    _whole("window_mask", "T S", "^mask", "", "The mask of layers that see a window only.", lambda c, layer: c.has_windows),
    _row("resid_pre", "B T C", "^stream", "", "Residual stream entering the block."),
    _row("attn_norm", "B T C", "resid_pre", "attn_norm", "Normalised input of attention.", _normed_before),
    _row("attn.q", "B H T D", _INTO_ATTENTION, "attn.q_proj", "Queries."),
    _row("attn.k", "B Hkv T D", _INTO_ATTENTION, "attn.k_proj", "Keys."),
    _row("attn.v", "B Hkv T D", _INTO_ATTENTION, "attn.v_proj", "Values."),
    _row("attn.q_normed", "B H T D", "attn.q", "attn.q_norm", "Normalised queries.", _heads_normed(last=False)),
    _row("attn.k_normed", "B Hkv T D", "attn.k", "attn.k_norm", "Normalised keys.", _heads_normed(last=False)),
    _row("attn.q_rotated", "B H T D", "attn.q|attn.q_normed ^cos ^sin", "", "Queries after RoPE.", _turned),
    _row("attn.k_rotated", "B Hkv T D", "attn.k|attn.k_normed ^cos ^sin", "", "Keys after RoPE.", _turned),
    _row("attn.q_normed", "B H T D", "attn.q|attn.q_rotated", "attn.q_norm", "Normalised queries.", _heads_normed(last=True)),
    _row("attn.k_normed", "B Hkv T D", "attn.k|attn.k_rotated", "attn.k_norm", "Normalised keys.", _heads_normed(last=True)),
    _row("attn.q_scaled", "B H T D", "attn.q|attn.q_normed|attn.q_rotated ^query_growth", "", "Queries times their factor.", _growing),
    _row("attn.scores", "B H T S", f"{_Q} {_K}", "", "q · kᵀ / √D, before the mask."),
    _row("attn.capped_scores", "B H T S", "attn.scores", "", "Scores, cut softly: c · tanh(scores / c).", lambda c, layer: c.score_cap > 0),
    _row("attn.masked_scores", "B H T S", "attn.scores|attn.capped_scores ^seen", "", "Scores with the future masked off."),
    _row("attn.pattern", "B H T S", "attn.masked_scores", "", "Softmax over S: where each token looks."),
    _row("attn.z", "B H T D", "attn.pattern attn.v", "", "pattern · v: what each head read."),
    _row("attn.out", "B T C", "attn.z", "attn.o_proj", "Attention's output before the norm or factor behind it.", _finished),
    _row("attn_out", "B T C", "attn.z|attn.out", "attn_out_norm|attn.o_proj", "Attention's addition to the residual stream."),
    _row("resid_mid", "B T C", "resid_pre attn_out", "", "Residual stream between attention and MLP.", _in_turn),
    _row("mlp_norm", "B T C", "resid_mid", "mlp_norm", "Normalised input of the MLP.", lambda c, layer: c.norm_places != "after" and not c.parallel),
    _row("mlp.pre", "B T F", _INTO_MLP, "mlp.up_proj", "Hidden layer before GELU.", lambda c, layer: not c.gated),
    _row("mlp.gate", "B T F", _INTO_MLP, "mlp.gate_proj", "w1 · x, before SiLU.", _gated),
    _row("mlp.up", "B T F", _INTO_MLP, "mlp.up_proj", "w3 · x.", _gated),
    _row("mlp.act", "B T F", "mlp.pre|mlp.gate", "", "GELU of pre, or SiLU of gate."),
    _row("mlp.hidden", "B T F", "mlp.act mlp.up", "", "act × up.", _gated),
    _row("mlp.out", "B T C", "mlp.act|mlp.hidden", "mlp.down_proj", "The MLP's output before the norm or factor behind it.", _finished),
    _row("mlp_out", "B T C", "mlp.act|mlp.hidden|mlp.out", "mlp_out_norm|mlp.down_proj", "The MLP's addition to the residual stream."),
    _row("resid_post", "B T C", "resid_mid mlp_out", "", "Residual stream leaving the block.", _in_turn),
    _row("resid_post", "B T C", "resid_pre attn_out mlp_out", "", "Residual stream leaving the block.", lambda c, layer: c.parallel),
    _whole("final_norm", "B T C", "^stream", "norm", "Normalised residual stream after the last block."),
    _whole("raw_logits", "B T V", "^final_norm", "unembed", "Logits before their factor or cap.", _rescaled),
    _whole("logits", "B T V", "^final_norm|^raw_logits", "unembed", "One score per token of the vocabulary."),
)
# fmt: on
_BY_NAME = {row.name: row for row in reversed(ROWS)}
_TAIL = ("final_norm", "raw_logits", "logits")


def row(name: str) -> Row:
    """The table's row for a full name; KeyError with advice for a name that is not in it."""
    if not known(name):
        raise KeyError(f"{name!r} is no tensor name; names look like layers.0.attn.q or logits")
    return _BY_NAME[general(name)]


def known(name: str) -> bool:
    """Whether `name` is in the vocabulary; a trace file may hold other tensors besides."""
    return general(name) in _BY_NAME


def leaf(name: str) -> str:
    """A name without its step and layer: ``step.2.layers.3.attn.q`` -> ``attn.q``."""
    return row(name).leaf


def dims(name: str) -> tuple[str, ...]:
    """Letters of a name's dims, for example ("B", "H", "T", "S")."""
    return row(name).dims


def has_batch(name: str) -> bool:
    """Whether the first axis of a name is the batch."""
    return not known(name) or dims(name)[0] == "B"


@lru_cache(maxsize=256)
def rows(config: Any, kind: Any = None) -> dict[str, Row]:
    """Leaf -> row, in the order of the forward pass: of the whole model, or of a `Layer` kind."""
    inside = kind is not None
    return {r.leaf: r for r in ROWS if r.layer == inside and r.when(config, kind)}


def has(config: Any, leaf: str, layer: int = 0) -> bool:
    """Whether a model has a leaf, in this layer."""
    return leaf in rows(config) or leaf in rows(config, config.layer(layer))


def expand(config: Any) -> Iterator[str]:
    """Every name of one pass of a model with `config`, in the order of the forward pass."""
    whole = rows(config)
    yield from (leaf for leaf in whole if leaf not in _TAIL)
    for layer, kind in enumerate(config.kinds):
        yield from (f"layers.{layer}.{leaf}" for leaf in rows(config, kind))
    yield from (leaf for leaf in whole if leaf in _TAIL)


@lru_cache(maxsize=1 << 14)
def inputs(config: Any, name: str) -> tuple[str, ...]:
    """Full names of the tensors `name` is computed from, in the order of the table.

    Keys and values are named by the pass that computed them; with a KV cache the caller joins the
    passes before. ``()`` for tokens, positions and mask, and for a name that the model has not.
    """
    step, layer = step_of(name), layer_of(name)
    prefix = f"step.{step}." if step else ""
    table = rows(config) if layer is None else rows(config, config.layer(layer))
    found = table.get(leaf(name))
    if found is None:
        return ()
    resolved = (_resolved(config, layer, found, read) for read in found.reads)
    return tuple(f"{prefix}{full}" for names in resolved for full in names)


def _resolved(config: Any, layer: int | None, reader: Row, read: str) -> tuple[str, ...]:
    """The names without a step that one entry of `Row.reads` stands for."""
    if read == "^stream":
        blocks = config.n_layers if layer is None else layer
        return (f"layers.{blocks - 1}.resid_post",) if blocks else _entering(config)
    if layer is not None and read in ("^cos", "^sin"):
        return (f"{config.layer(layer).rope}.{read[1:]}",)
    if layer is not None and read == "^seen":
        return ("window_mask" if config.layer(layer).window else "mask",)
    own = rows(config) if layer is None else rows(config, config.layer(layer))
    before = list(own)[: list(own).index(reader.leaf)]
    choices = [choice.removeprefix("^") for choice in read.split("|")]
    last = max((c for c in choices if c in before), key=before.index, default=choices[0])
    return (last if layer is None or last in rows(config) else f"layers.{layer}.{last}",)


def _entering(config: Any) -> tuple[str, ...]:
    """What the stream of the first block is the sum of."""
    there = rows(config)
    scaled = [leaf for leaf in ("embed", "embed_normed", "embed_scaled") if leaf in there]
    return (scaled[-1], *(("pos_embed",) if "pos_embed" in there else ()))


def module_of(config: Any, name: str) -> str:
    """The module whose weight `name` reads, as the model calls it; "" for none."""
    layer = layer_of(name)
    table = rows(config) if layer is None else rows(config, config.layer(layer))
    found = table[leaf(name)]
    module = found.weight
    if "|" in module:  # what is added to the stream: a norm's, a product's, or a factor alone
        after, product = module.split("|")
        scaled = product if found.leaf.replace("_", ".") not in table else ""
        module = after if config.norm_places != "before" else scaled
    if module == "unembed":
        module = "" if found.leaf == "logits" and "raw_logits" in table else module
        module = "embed" if module and config.tied else module
    return module if layer is None or not module else f"layers.{layer}.{module}"


def sizes(config: Any, *, batch: int, tokens: int, seen: int) -> dict[str, int]:
    """Size of each letter for a pass of `tokens` tokens with `seen` in view."""
    turned = config.rotary_width(config.rope) if config.rope else config.head_dim
    return {
        "B": batch,
        "T": tokens,
        "S": seen,
        "C": config.width,
        "H": config.n_heads,
        "Hkv": config.n_kv_heads,
        "D": config.head_dim,
        "D/2": turned // 2,
        "F": config.hidden_width,
        "V": config.vocab_size,
    }


def elements(name: str, sizes: dict[str, int]) -> int:
    """Number of elements of a named tensor."""
    return prod(sizes[letter] for letter in dims(name))
