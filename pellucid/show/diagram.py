"""A model's structure as a small tree: the flow from tokens to logits, the blocks folded into one.

This is the one description of the picture. `diagram_layout` gives every box a place, and
`diagram_text` and `diagram_svg` draw what is placed. Names, dims and which of them a model has come
from `graph`, counts from the `census`: nothing is written twice. Layers may differ, in a window or
in RoPE; the one block shows all that any of them has, and says how many have it.

    Series    one step after the other           Parallel   steps side by side on one input
    Branch    leaves the residual stream, computes, and is added back to it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pellucid import graph
from pellucid.models import Config, RopeConfig
from pellucid.models.census import Census, PartCount, census, check_tokens

Kind = Literal["input", "table", "norm", "linear", "operation"]


@dataclass(frozen=True, kw_only=True)
class DiagramStep:
    """One box. `gives` is the leaf of the tensor that comes out of it, a row of `graph.ROWS`."""

    title: str
    kind: Kind
    gives: str
    facts: tuple[str, ...] = ()
    parameters: int = 0


@dataclass(frozen=True)
class Series:
    """Parts in order; a step after a `Parallel` joins its lanes."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Parallel:
    """Lanes that read the same input."""

    lanes: tuple[Node, ...]


Node = DiagramStep | Series | Parallel


@dataclass(frozen=True, kw_only=True)
class Branch:
    """What is added to the residual stream; it reads the stream itself unless `reads` is False."""

    body: Node
    title: str = ""
    note: str = ""
    gives: str = ""  # the stream's name after the addition
    reads: bool = True


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A tensor that every block uses, and what it is."""

    gives: str
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Structure:
    """Stem, one block standing for all, tail. `sizes`: what each letter of the dims stands for."""

    census: Census
    sizes: dict[str, str]
    shared: tuple[Shared, ...]
    stem: tuple[DiagramStep | Branch, ...]
    block: tuple[Branch, ...]
    tail: tuple[DiagramStep, ...]
    enters: str = "resid_pre"

    @property
    def repeats(self) -> int:
        """Number of blocks that the one stands for."""
        return self.census.config.n_layers

    def shape(self, leaf: str) -> tuple[str, ...]:
        """Sizes of a tensor, ("32", "T", "128"); the batch is left out."""
        letters = next(row.dims for row in graph.ROWS if row.leaf == leaf)
        return tuple(self.sizes[letter] for letter in letters if letter != "B")


def structure(config: Config, tokens: int | None = None) -> Structure:
    """The structure of a model of `config`, with shapes for `tokens` tokens, or T left open.

    ValueError for a number of tokens outside 1 … context length.
    """
    if tokens is not None:
        check_tokens(config, tokens)
    sizes = {
        letter: f"{size}"
        for letter, size in graph.sizes(
            config, batch=1, tokens=tokens or 0, seen=tokens or 0
        ).items()
    }
    if tokens is None:
        sizes |= {"T": "T", "S": "S"}
    counted = census(config)
    parts = _Parts(counted)
    return Structure(
        census=counted,
        sizes=sizes,
        shared=_shared(config),
        stem=_stem(parts),
        block=(_attention(parts), _mlp(parts)),
        tail=_tail(parts),
    )


class _Parts:
    """Steps made of the model's modules; their numbers are read off the census."""

    def __init__(self, counted: Census) -> None:
        self.counted, self.config = counted, counted.config
        whole, *layers = (graph.rows(self.config, kind) for kind in (None, *self.config.kinds))
        self.leaves = {*whole, *(leaf for rows in layers for leaf in rows)}
        self.layers_with = {
            leaf: sum(leaf in rows for rows in layers) for leaf in self.leaves - {*whole}
        }

    def __getitem__(self, path: str) -> PartCount:
        part = self.counted.part(path)
        assert part is not None, f"the model has no {path}"
        return part

    def __contains__(self, leaf: str) -> bool:
        """Whether some layer of the model, or the model, has a tensor of this name."""
        return leaf in self.leaves

    def table(self, path: str) -> DiagramStep:
        """An embedding: path and tensor have the same name."""
        part = self[path]
        facts = (f"table {part.written}",)
        return DiagramStep(title=path, kind="table", gives=path, facts=facts, parameters=part.count)

    def norm(self, path: str, gives: str, *facts: str) -> DiagramStep:
        part = self.counted.part(path)
        form = "RMSNorm" if self.config.norm == "rms" else "LayerNorm"
        form += f", eps {self.config.norm_eps:g}"
        if not self.config.norm_weight:
            facts = ("no weight", *facts)
        elif self.config.norm_offset:
            facts = ("× (1 + weight)", *facts)
        return DiagramStep(
            title=path.removeprefix("attn."),
            kind="norm",
            gives=gives,
            facts=(form, *facts),
            parameters=part.count if part else 0,
        )

    def linear(self, path: str, gives: str, *facts: str) -> DiagramStep:
        part = self[path]
        rows, columns = part.shapes["weight"]
        arrow = f"{columns:,} → {rows:,}" + (" + bias" if "bias" in part.shapes else "")
        return DiagramStep(
            title=path.rsplit(".", 1)[-1],
            kind="linear",
            gives=gives,
            facts=(arrow, *facts),
            parameters=part.count,
        )

    def in_layers(self, count: int) -> str:
        """Which share of the layers has something; "" where all have."""
        every = self.config.n_layers
        return "" if count == every else f"in {count} of {every} layers"


def _operation(title: str, gives: str, *facts: str, parameters: int = 0) -> DiagramStep:
    facts = tuple(fact for fact in facts if fact)
    return DiagramStep(
        title=title, kind="operation", gives=gives, facts=facts, parameters=parameters
    )


def _shared(config: Config) -> tuple[Shared, ...]:
    there = graph.rows(config)
    shared = [Shared(gives="positions", sentence="0, 1, 2 …")]
    for name, sentence in (
        ("rope", "of position × frequency"),
        ("second_rope", "of a second RoPE"),
    ):
        if f"{name}.cos" in there:
            rope = getattr(config, name)
            shared += [
                Shared(gives=f"{name}.cos", sentence=sentence),
                Shared(gives=f"{name}.sin", sentence=_of_rope(rope)),
            ]
    if "query_growth" in there and config.rope is not None:
        sentence = f"1 + {config.query_growth:g} · ln(1 + ⌊p / {config.rope.original_context:,}⌋)"
        shared.append(Shared(gives="query_growth", sentence=sentence))
    shared.append(Shared(gives="mask", sentence="True where a token may look"))
    if "window_mask" in there:
        sentence = f"the same, {config.window:,} tokens back"
        shared.append(Shared(gives="window_mask", sentence=sentence))
    return tuple(shared)


def _of_rope(rope: RopeConfig) -> str:
    scaling = "no scaling" if rope.type == "default" else f"{rope.type} scaling × {rope.factor:g}"
    return f"theta {rope.theta:,.0f}, {scaling}"


def _stem(parts: _Parts) -> tuple[DiagramStep | Branch, ...]:
    config = parts.config
    ids = f"ids 0 … {config.vocab_size - 1:,}"
    stem: list[DiagramStep | Branch] = [
        DiagramStep(title="tokens", kind="input", gives="tokens", facts=(ids,)),
        parts.table("embed"),
    ]
    if "pos_embed" in parts:
        stem.append(Branch(body=parts.table("pos_embed"), reads=False))
    if "embed_normed" in parts:
        stem.append(parts.norm("embed_norm", "embed_normed"))
    if "embed_scaled" in parts:
        stem.append(_operation(f"× {config.embed_scale:g}", "embed_scaled"))
    return tuple(stem)


def _tail(parts: _Parts) -> tuple[DiagramStep, ...]:
    config = parts.config
    norm = parts.norm("norm", "final_norm")
    gives = "raw_logits" if "raw_logits" in parts else "logits"
    if config.tied:
        facts = (f"{config.width:,} → {config.vocab_size:,}", "tied: the embed table")
        head = DiagramStep(title="unembed", kind="linear", gives=gives, facts=facts)
    else:
        head = parts.linear("unembed", gives)
    if gives == "logits":
        return norm, head
    scale = f"× {config.logit_scale:g}" if config.logit_scale != 1 else ""
    cap = _cap(config.logit_cap) if config.logit_cap else ""
    title, *facts = filter(None, (scale, cap))
    return norm, head, _operation(title, "logits", *facts)


def _cap(cap: float) -> str:
    return f"{cap:g} · tanh(x / {cap:g})"


def _attention(parts: _Parts) -> Branch:
    config = parts.config
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.head_dim
    v = parts.linear("attn.v_proj", "attn.v", _heads(kv_heads, "value", width), *_clip(config))
    score = f"× {config.score_scale:g}" if config.score_scale else f"/ √{width}"
    pattern: list[Node] = [
        Parallel((_turned(parts, "q", heads), _turned(parts, "k", kv_heads))),
        _operation(f"q · kᵀ {score}", "attn.scores"),
    ]
    if "attn.capped_scores" in parts:
        pattern.append(_operation(_cap(config.score_cap), "attn.capped_scores"))
    window = sum(kind.window for kind in config.kinds)
    windows = ("window_mask", parts.in_layers(window)) if window else ()
    sinks = parts["attn"].count if config.sinks else 0
    pattern += [
        _operation("mask", "attn.masked_scores", "−∞ where it is False", *windows),
        _operation(
            "softmax",
            "attn.pattern",
            "each row and its sink: 1" if sinks else "each row sums to 1",
            parameters=sinks,
        ),
    ]
    body = Series(
        (
            _entry(parts, "attn_norm", "resid_pre"),
            Parallel((Series(tuple(pattern)), v)),
            _operation("pattern · v", "attn.z"),
            *_finished(parts, "attn", "attn.o_proj"),
        )
    )
    gives = "resid_mid" if "resid_mid" in parts else ""
    return Branch(body=body, title="Attention", note=_sharing(heads, kv_heads), gives=gives)


def _turned(parts: _Parts, letter: str, heads: int) -> Node:
    """Queries or keys: the product, the norm and RoPE in the model's order."""
    config = parts.config
    what = _heads(heads, {"q": "query", "k": "key"}[letter], config.head_dim)
    steps: list[Node] = [
        parts.linear(f"attn.{letter}_proj", f"attn.{letter}", what, *_clip(config))
    ]
    if f"attn.{letter}_rotated" in parts:
        names = [name for name in ("rope", "second_rope") if f"{name}.cos" in parts]
        widths = {config.rotary_width(getattr(config, name)) for name in names} - {config.head_dim}
        some = (
            f"{', '.join(map(str, sorted(widths)))} of {config.head_dim} turned" if widths else ""
        )
        layers = parts.in_layers(parts.layers_with[f"attn.{letter}_rotated"])
        by = f"by {names[0]}.cos, {names[0]}.sin" if len(names) == 1 else f"by {' or '.join(names)}"
        steps.append(_operation("RoPE", f"attn.{letter}_rotated", by, some, layers))
    if f"attn.{letter}_normed" in parts:
        whole = ("all heads together",) if config.qk_norm == "whole" else ()
        norm = parts.norm(f"attn.{letter}_norm", f"attn.{letter}_normed", *whole)
        steps.insert(len(steps) if config.qk_norm_last else 1, norm)
    if letter == "q" and "attn.q_scaled" in parts:
        steps.append(_operation("× query_growth", "attn.q_scaled"))
    return steps[0] if len(steps) == 1 else Series(tuple(steps))


def _clip(config: Config) -> tuple[str, ...]:
    return (f"cut to ± {config.qkv_clip:g}",) if config.qkv_clip else ()


def _entry(parts: _Parts, path: str, stream: str) -> DiagramStep:
    """What a branch begins with: its norm, the one of attention, or the stream as it is."""
    if path in parts:
        return parts.norm(path, path)
    if path == "mlp_norm" and parts.config.parallel:
        return _operation("what attention reads", _entry(parts, "attn_norm", "resid_pre").gives)
    return _operation("the stream as it is", stream, "its norm comes behind")


def _finished(parts: _Parts, part: str, path: str) -> tuple[DiagramStep, ...]:
    """The last product of a branch, and the norm and factor behind it."""
    config, gives = parts.config, f"{part}_out"
    if f"{part}.out" not in parts:
        return (parts.linear(path, gives),)
    product = parts.linear(path, f"{part}.out")
    scale = f"× {config.residual_scale:g}"
    if config.norm_places == "before":
        return product, _operation(scale, gives)
    scales = (scale,) if config.residual_scale != 1 else ()
    return product, parts.norm(f"{part}_out_norm", gives, *scales)


def _heads(heads: int, what: str, width: int) -> str:
    return f"{heads} {what} head{'s' if heads > 1 else ''} × {width}"


def _sharing(heads: int, kv_heads: int) -> str:
    """Who shares with whom: grouped-query, multi-query or multi-head attention."""
    if kv_heads == heads:
        return f"{heads} head{'s, each' if heads > 1 else ''} with keys and values of its own"
    return f"{heads} query heads share {kv_heads} key/value head{'s' if kv_heads > 1 else ''}"


# The activation -> its name, what it does, the name of a gated MLP with it.
_ACTIVATIONS = {
    "silu": ("SiLU", "x · sigmoid(x)", "SwiGLU: "),
    "gelu_tanh": ("GELU", "tanh form", "GeGLU: "),
    "gelu_new": ("GELU", "tanh form", "GeGLU: "),
    "gelu": ("GELU", "exact, by erf", "GeGLU: "),
    "relu2": ("ReLU²", "max(x, 0)²", ""),
}


def _mlp(parts: _Parts) -> Branch:
    name, form, gated = _ACTIVATIONS[parts.config.activation]
    entry = _entry(parts, "mlp_norm", "resid_mid" if "resid_mid" in parts else "resid_pre")
    act = _operation(name, "mlp.act", form)
    end = _finished(parts, "mlp", "mlp.down_proj")
    if "mlp.pre" in parts:
        body = Series((entry, parts.linear("mlp.up_proj", "mlp.pre"), act, *end))
        note = f"down({name}(up))"
    else:
        gate = Series((parts.linear("mlp.gate_proj", "mlp.gate"), act))
        lanes = Parallel((gate, parts.linear("mlp.up_proj", "mlp.up")))
        body = Series((entry, lanes, _operation("act × up", "mlp.hidden"), *end))
        note = f"{gated}down({name}(gate) × up)"
    if parts.config.parallel:
        note += ", beside attention"
    return Branch(body=body, title="MLP", note=note, gives="resid_post")
