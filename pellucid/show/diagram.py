"""A model's structure as a small tree: the flow from tokens to logits, the blocks folded into one.

This is the one description of the picture. `diagram_layout` gives every box a place, and
`diagram_text` and `diagram_svg` draw what is placed; none of them knows a family. Names and dims
come from `names`, counts from the `census`: nothing is written twice.

    Series    one step after the other           Parallel   steps side by side on one input
    Branch    leaves the residual stream, computes, and is added back to it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pellucid import graph
from pellucid.models import Config
from pellucid.models.census import Census, Part, census, check_tokens

Kind = Literal["input", "table", "norm", "linear", "operation"]


@dataclass(frozen=True, kw_only=True)
class Step:
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


Node = Step | Series | Parallel


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
    stem: tuple[Step | Branch, ...]
    block: tuple[Branch, ...]
    tail: tuple[Step, ...]
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
        stem=_stem(config, parts),
        block=(_attention(config, parts), _mlp(config, parts)),
        tail=_tail(config, parts),
    )


class _Parts:
    """Steps made of the model's modules; their numbers are read off the census."""

    def __init__(self, counted: Census) -> None:
        self.counted = counted

    def __getitem__(self, path: str) -> Part:
        part = self.counted.part(path)
        assert part is not None, f"the model has no {path}"
        return part

    def table(self, path: str) -> Step:
        """An embedding: path and tensor have the same name."""
        part = self[path]
        facts = (f"table {part.written}",)
        return Step(title=path, kind="table", gives=path, facts=facts, parameters=part.count)

    def norm(self, path: str, gives: str) -> Step:
        part = self[path]
        config = self.counted.config
        form = "RMSNorm" if config.norm == "rms" else "LayerNorm"
        facts = (f"{form}, eps {config.norm_eps:g}",)
        return Step(title=path, kind="norm", gives=gives, facts=facts, parameters=part.count)

    def linear(self, path: str, gives: str, *facts: str) -> Step:
        part = self[path]
        rows, columns = part.shapes["weight"]
        arrow = f"{columns:,} → {rows:,}" + (" + bias" if "bias" in part.shapes else "")
        return Step(
            title=path.rsplit(".", 1)[-1],
            kind="linear",
            gives=gives,
            facts=(arrow, *facts),
            parameters=part.count,
        )


def _operation(title: str, gives: str, *facts: str) -> Step:
    return Step(title=title, kind="operation", gives=gives, facts=facts)


def _shared(config: Config) -> tuple[Shared, ...]:
    mask = Shared(gives="mask", sentence="True where a token may look")
    positions = Shared(gives="positions", sentence="0, 1, 2 …")
    if config.rope is None:
        return positions, mask
    rope = config.rope
    scaling = "no scaling" if rope.type == "default" else f"{rope.type} scaling × {rope.factor:g}"
    return (
        positions,
        Shared(gives="rope.cos", sentence="of position × frequency"),
        Shared(gives="rope.sin", sentence=f"theta {rope.theta:,.0f}, {scaling}"),
        mask,
    )


def _stem(config: Config, parts: _Parts) -> tuple[Step | Branch, ...]:
    tokens = Step(
        title="tokens",
        kind="input",
        gives="tokens",
        facts=(f"ids 0 … {config.vocab_size - 1:,}",),
    )
    if config.rope is not None:
        return tokens, parts.table("embed")
    return tokens, parts.table("embed"), Branch(body=parts.table("pos_embed"), reads=False)


def _tail(config: Config, parts: _Parts) -> tuple[Step, ...]:
    norm = parts.norm("norm", "final_norm")
    if not config.tied:
        return norm, parts.linear("unembed", "logits")
    facts = (f"{config.width:,} → {config.vocab_size:,}", "tied: the embed table")
    return norm, Step(title="unembed", kind="linear", gives="logits", facts=facts)


def _attention(config: Config, parts: _Parts) -> Branch:
    heads, kv_heads, width = config.n_heads, config.n_kv_heads, config.head_dim
    q: Node = parts.linear("attn.q_proj", "attn.q", _heads(heads, "query", width))
    k: Node = parts.linear("attn.k_proj", "attn.k", _heads(kv_heads, "key", width))
    v: Node = parts.linear("attn.v_proj", "attn.v", _heads(kv_heads, "value", width))
    if config.rope is not None:
        q = Series((q, _operation("RoPE", "attn.q_rotated", "by rope.cos, rope.sin")))
        k = Series((k, _operation("RoPE", "attn.k_rotated", "by rope.cos, rope.sin")))
    pattern = Series(
        (
            Parallel((q, k)),
            _operation(f"q · kᵀ / √{width}", "attn.scores"),
            _operation("mask", "attn.masked_scores", "−∞ where it is False"),
            _operation("softmax", "attn.pattern", "each row sums to 1"),
        )
    )
    body = Series(
        (
            parts.norm("attn_norm", "attn_norm"),
            Parallel((pattern, v)),
            _operation("pattern · v", "attn.z"),
            parts.linear("attn.o_proj", "attn_out"),
        )
    )
    return Branch(body=body, title="Attention", note=_sharing(heads, kv_heads), gives="resid_mid")


def _heads(heads: int, what: str, width: int) -> str:
    return f"{heads} {what} head{'s' if heads > 1 else ''} × {width}"


def _sharing(heads: int, kv_heads: int) -> str:
    """Who shares with whom: grouped-query, multi-query or multi-head attention."""
    if kv_heads == heads:
        return f"{heads} head{'s, each' if heads > 1 else ''} with keys and values of its own"
    return f"{heads} query heads share {kv_heads} key/value head{'s' if kv_heads > 1 else ''}"


def _mlp(config: Config, parts: _Parts) -> Branch:
    norm = parts.norm("mlp_norm", "mlp_norm")
    down = parts.linear("mlp.down_proj", "mlp_out")
    if config.rope is not None:
        gate = parts.linear("mlp.gate_proj", "mlp.gate")
        act = _operation("SiLU", "mlp.act", "x · sigmoid(x)")
        up = parts.linear("mlp.up_proj", "mlp.up")
        hidden = _operation("act × up", "mlp.hidden")
        body = Series((norm, Parallel((Series((gate, act)), up)), hidden, down))
        return Branch(
            body=body, title="MLP", note="SwiGLU: down(SiLU(gate) × up)", gives="resid_post"
        )
    form = "exact, by erf" if config.activation == "gelu" else "tanh form"
    act = _operation("GELU", "mlp.act", form)
    body = Series((norm, parts.linear("mlp.up_proj", "mlp.pre"), act, down))
    return Branch(body=body, title="MLP", note="down(GELU(up))", gives="resid_post")
