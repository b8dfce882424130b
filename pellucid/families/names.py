"""What files call the parameters: a two-way table per family, and the rows of q and k in order.

Most stored tensors are one parameter. Some hold several, one below the other, and GPT-2 stores its
matrices the other way round (transformers' ``Conv1D`` computes x · W):

       c_attn.weight, stored (C, 3C)                q_proj.weight (C, C), a view of it
             C       C       C
         ┌───────┬───────┬───────┐
       C │  qᵀ   │  kᵀ   │  vᵀ   │      ->        columns 0 … C, transposed
         └───────┴───────┴───────┘
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from pellucid.models import ModelConfig, empty_model

Shape = tuple[int, ...]
_HEAD_NORMS = ("attn.q_norm", "attn.k_norm")
Pairs = Literal["halves", "neighbours", "backwards"]

# transformers' names inside a block -> ours; a line counts where the model has the module
LLAMA_LAYER: Mapping[str, str] = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.o_proj",
    "self_attn.q_norm": "attn.q_norm",
    "self_attn.k_norm": "attn.k_norm",
    "self_attn.sinks": "attn.sinks",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}


def llama_layer(changes: Mapping[str, str]) -> Mapping[str, str]:
    """`LLAMA_LAYER` where some of our modules have other names in the files: theirs -> ours."""
    moved = {ours for joined in changes.values() for ours in joined.split("|")}
    kept = {theirs: ours for theirs, ours in LLAMA_LAYER.items() if ours not in moved}
    return {**kept, **changes}


@dataclass(frozen=True, kw_only=True)
class Names:
    """What the files of a family call its modules; "a|b|c" are joined in one stored tensor.

    layer       inside a block; `before` and `after` the blocks
    prefix      of everything but the head; files of the bare model leave it out
    blocks      what a block's number follows
    transposed  modules whose weight is stored (in, out)
    zero_bias   modules whose files hold a bias even where the model has none: zeros then
    head        of the last product
    plus_one    modules whose weight is stored as 1 + weight (llama.cpp's norms of Gemma)
    reorders_all
                rows of q and k are in the files' order in layers that RoPE does not turn, too
    norm_per_head
                a norm of queries or keys with a weight for each head is a tensor for each, with
                the head's number at the end of its name; else all are one tensor (heads, D)
    buffers     tensors inside a block that old files hold and that say nothing new, with their
                shape as ``D/2`` or, where any will do, None
    """

    layer: Mapping[str, str] = field(default_factory=lambda: LLAMA_LAYER)
    before: Mapping[str, str] = field(default_factory=lambda: {"embed_tokens": "embed"})
    after: Mapping[str, str] = field(default_factory=lambda: {"norm": "norm"})
    prefix: str = "model."
    blocks: str = "layers"
    head: str = "lm_head"
    plus_one: frozenset[str] = frozenset()
    reorders_all: bool = False
    transposed: frozenset[str] = frozenset()
    zero_bias: frozenset[str] = frozenset()
    norm_per_head: bool = False
    # RoPE frequencies, in files of transformers < 4.32; the config states them
    buffers: Mapping[str, str | None] = field(
        default_factory=lambda: {"self_attn.rotary_emb.inv_freq": "D/2"}
    )


@dataclass(frozen=True, kw_only=True)
class PairOrder:
    """How files order the rows of a head of q or k, where it is not ours: halves, turned forwards.

    pairs   "neighbours": pair i stands at rows 2i and 2i + 1, not i and i + D/2;
            "backwards": RoPE turns the other way, which is the same with the halves exchanged
    turned  how many rows of a head RoPE turns, the first ones; the rest keep their places
    """

    pairs: Pairs
    head_dim: int
    turned: int

    def _places(self) -> Tensor:
        """Row of the files that each of our rows is, (D)."""
        rows = torch.arange(self.head_dim)
        first, rest = rows[: self.turned], rows[self.turned :]
        if self.pairs == "neighbours":
            return torch.cat((first[::2], first[1::2], rest))
        return torch.cat((first[self.turned // 2 :], first[: self.turned // 2], rest))

    def ours(self, stored: Tensor) -> Tensor:
        """Rows (heads · D, …) of the files in our order; a copy."""
        return self._moved(stored, self._places())

    def theirs(self, parameter: Tensor) -> Tensor:
        """Our rows (heads · D, …) in the order of the files; a copy."""
        return self._moved(parameter, self._places().argsort())

    def _moved(self, rows: Tensor, places: Tensor) -> Tensor:
        heads = rows.unflatten(0, (-1, self.head_dim))
        return heads.index_select(1, places.to(rows.device)).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stored tensor and the parameters in it, one below the other along dimension 0.

    transposed  stored the other way round, (in, out)
    zeros       holds no parameter: a bias of this shape that the model does not have
    order       its rows are those of q or k, in another order than ours
    plus_one    stored as 1 + parameter
    heads       stored (heads, D), which the parameter is flat; 0: stored as it is
    head        of so many heads only this one's D numbers are stored here; None: all
    """

    stored: str
    parameters: tuple[str, ...] = ()
    transposed: bool = False
    zeros: Shape | None = None
    order: PairOrder | None = None
    plus_one: bool = False
    heads: int = 0
    head: int | None = None


@lru_cache(maxsize=8)
def _shapes(config: ModelConfig) -> Mapping[str, Shape]:
    return {name: tuple(each.shape) for name, each in empty_model(config).state_dict().items()}


def entries(config: ModelConfig, names: Names, pairs: Pairs) -> Iterator[Entry]:
    """Every stored tensor of a model with `config`, in the order of the forward pass.

    ValueError where the model has a parameter that `names` has no word for.
    """
    shapes = _shapes(config)
    named: set[str] = set()
    for entry in _all_entries(config, shapes, names, pairs):
        if len(entry.parameters) == 1 and entry.parameters[0].endswith(".weight"):
            module = entry.parameters[0].removesuffix(".weight").split(".", 2)[-1]
            entry = replace(entry, plus_one=module in names.plus_one)
        named.update(entry.parameters)
        yield entry
    unnamed = sorted(shapes.keys() - named)
    if unnamed:
        raise ValueError(
            f"{config.family} files have no name for {len(unnamed)} parameters: "
            f"{', '.join(unnamed[:3])}: this config has features that the family does not"
        )


def _all_entries(
    config: ModelConfig, shapes: Mapping[str, Shape], names: Names, pairs: Pairs
) -> Iterator[Entry]:
    for stored, ours in names.before.items():
        yield from _lines(f"{names.prefix}{stored}", (ours,), shapes)
    for number, kind in enumerate(config.kinds):
        name = kind.rope or ("rope" if names.reorders_all else "")
        rope = getattr(config, name) if name else None
        turned = config.rotary_width(rope) if rope else 0
        order = PairOrder(pairs=pairs, head_dim=config.head_dim, turned=turned)
        reordered = turned > 0 and pairs != "halves"
        for stored, ours in names.layer.items():
            lines = _lines(
                f"{names.prefix}{names.blocks}.{number}.{stored}",
                [f"layers.{number}.{leaf}" for leaf in ours.split("|")],
                shapes,
                transposed=stored in names.transposed,
                zero_bias=stored in names.zero_bias,
                order=order if reordered and ours in _order_matters(config) else None,
            )
            each = config.qk_norm == "each" and ours in _HEAD_NORMS
            yield from _of_heads(config, names, shapes, lines) if each else lines
    for stored, ours in names.after.items():
        yield from _lines(f"{names.prefix}{stored}", (ours,), shapes)
    yield from _lines(names.head, ("unembed",), shapes)


def _order_matters(config: ModelConfig) -> tuple[str, ...]:
    """Modules whose rows are a head's components."""
    return ("attn.q_proj", "attn.k_proj", *(_HEAD_NORMS if config.qk_norm else ()))


def _of_heads(
    config: ModelConfig, names: Names, shapes: Mapping[str, Shape], lines: Iterable[Entry]
) -> Iterator[Entry]:
    """Norms with a weight for each head: one tensor (heads, D), or a tensor (D) for each."""
    for line in lines:
        heads = shapes[line.parameters[0]][0] // config.head_dim
        if not names.norm_per_head:
            yield replace(line, heads=heads)
            continue
        module, _, part = line.stored.rpartition(".")
        for head in range(heads):
            yield replace(line, stored=f"{module}.{head}.{part}", heads=heads, head=head)


def _lines(
    stored: str,
    modules: Sequence[str],
    shapes: Mapping[str, Shape],
    *,
    transposed: bool = False,
    zero_bias: bool = False,
    order: PairOrder | None = None,
) -> Iterator[Entry]:
    """A module's weight and bias, or the parameter of that name; none where the model lacks it."""
    if modules[0] in shapes:
        yield Entry(stored=stored, parameters=tuple(modules), order=order)
    for part in ("weight", "bias"):
        parameters = tuple(f"{module}.{part}" for module in modules)
        turned = transposed and part == "weight"
        if parameters[0] in shapes:
            yield Entry(
                stored=f"{stored}.{part}", parameters=parameters, transposed=turned, order=order
            )
        elif part == "bias" and zero_bias:
            rows = sum(shapes[f"{module}.weight"][0] for module in modules)
            yield Entry(stored=f"{stored}.bias", zeros=(rows,))


def joined(entry: Entry, parts: Sequence[Tensor]) -> Tensor:
    """The stored tensor of an entry from its parameters: the way out."""
    if entry.zeros is not None:
        raise AssertionError(f"{entry.stored} holds no parameter, there is nothing to join")
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    whole = whole if entry.order is None else entry.order.theirs(whole)
    whole = whole.float() + 1 if entry.plus_one else whole
    if entry.heads:
        whole = whole.unflatten(0, (entry.heads, -1))
        whole = whole if entry.head is None else whole[entry.head]
    return (whole.t() if entry.transposed else whole).contiguous()


def stored_shape(entry: Entry, shapes: Mapping[str, Shape]) -> Shape:
    """Shape of an entry's stored tensor, from its parameters' shapes."""
    if entry.zeros is not None:
        return entry.zeros
    first = shapes[entry.parameters[0]]
    whole = (sum(shapes[name][0] for name in entry.parameters), *first[1:])
    if entry.heads:
        each = whole[0] // entry.heads
        return (entry.heads, each) if entry.head is None else (each,)
    return whole[::-1] if entry.transposed else whole


def as_ours(entry: Entry, stored: Tensor) -> Tensor:
    """A stored tensor turned upright, flat where heads are its rows, rows in our order."""
    upright = stored.t() if entry.transposed else stored
    upright = upright.flatten() if entry.heads else upright
    return upright if entry.order is None else entry.order.ours(upright)


def split(entry: Entry, stored: Tensor, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The parameters in a stored tensor: the way in. Views, unless rows are put in order.

    Of a norm whose heads are stored apart, the part that this tensor is.
    """
    upright = as_ours(entry, stored)
    if entry.heads:
        return {entry.parameters[0]: upright}
    rows = [shapes[name][0] for name in entry.parameters]
    return dict(zip(entry.parameters, upright.split(rows), strict=True)) if rows else {}


def buffers(config: ModelConfig, names: Names) -> Iterable[tuple[str, Shape | None]]:
    """Name and shape, where it matters, of the buffers that old files hold."""
    shapes = {None: None, "D/2": (config.head_dim // 2,)}
    for number in range(config.n_layers):
        for leaf, dims in names.buffers.items():
            yield f"{names.prefix}{names.blocks}.{number}.{leaf}", shapes[dims]
