"""Meta's layout: ``params.json`` and ``consolidated.*.pth``, one shard or many.

Facts from Meta's ``llama/model.py`` and ``llama-models``: the name of each tensor, along which
dimension tensor parallelism split it, and how the hidden width follows from three numbers.

Meta's RoPE turns neighbouring rows of a query or key head, (0, 1), (2, 3), …; ours, like Hugging
Face's, turns rows i and i + D/2. The rows are put in that order once, when a tensor is read:

    stored, one head       half-split           row 2·i     ->  row i
    0 1 2 3 4 5 6 7   ->   0 2 4 6 1 3 5 7      row 2·i + 1 ->  row i + D/2
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pellucid.checkpoints.files import (
    PthFile,
    Shape,
    Stored,
    TensorFile,
    forget_pages,
    same_bits,
)
from pellucid.checkpoints.weights import (
    Recipe,
    Redundant,
    Weights,
    accounted,
    expected_shapes,
)
from pellucid.checkpoints.wrappers import without_wrappers
from pellucid.families.keys import ConfigKeys
from pellucid.files import read_json
from pellucid.models import Config, LlamaConfig, ModelConfig, RopeConfig

# Keys of params.json that do not change what a model computes from its tokens.
IGNORED = frozenset({"max_batch_size", "model_parallel_size"})
EMBED, HEAD = "tok_embeddings.weight", "output.weight"
_ROWS_COMPARED = 4096
_MOST_LAYERS = 1000  # looked for under a wrapper's names
_DRIFT = 0.05  # of the largest value, between copies of one tensor
SHARD = re.compile(r"consolidated\.(\d+)\.pth")

# Meta's name within a layer -> ours, and the dimension its shards are joined along
_LAYER = {
    "attention_norm.weight": ("attn_norm.weight", None),
    "attention.wq.weight": ("attn.q_proj.weight", 0),
    "attention.wk.weight": ("attn.k_proj.weight", 0),
    "attention.wv.weight": ("attn.v_proj.weight", 0),
    "attention.wo.weight": ("attn.o_proj.weight", 1),
    "ffn_norm.weight": ("mlp_norm.weight", None),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
}


@dataclass(frozen=True, kw_only=True)
class MetaEntry:
    """One stored tensor, its parameter, and how shards are joined (`dim` None: they are copies).

    heads  number of heads whose rows stand in Meta's interleaved order; 0: no such rows
    """

    stored: str
    parameter: str
    dim: int | None
    heads: int = 0


def beyond_meta(config: Config) -> list[str]:
    """The fields of a config that Meta's code has no argument for; [] for a Llama by any name."""
    own = ("vocab_size", "context_length", "width", "n_layers", "n_heads", "n_kv_heads")
    more = ("head_dim", "hidden_width", "norm_eps", "rope", "tied", "biases", "family", "rounding")
    stated: dict[str, Any] = {name: getattr(config, name) for name in (*own, *more)}
    plain = ModelConfig(**stated) if config.rope else None
    return [n for n, value in vars(config).items() if plain is None or value != getattr(plain, n)]


def table(config: Config, embed_dim: int) -> Iterator[MetaEntry]:
    """Every stored tensor of a model with `config`; `embed_dim` is how the embedding is split."""
    yield MetaEntry(stored=EMBED, parameter="embed.weight", dim=embed_dim)
    heads = {"attn.q_proj.weight": config.n_heads, "attn.k_proj.weight": config.n_kv_heads}
    for layer in range(config.n_layers):
        for theirs, (ours, dim) in _LAYER.items():
            yield MetaEntry(
                stored=f"layers.{layer}.{theirs}",
                parameter=f"layers.{layer}.{ours}",
                dim=dim,
                heads=heads.get(ours, 0),
            )
    yield MetaEntry(stored="norm.weight", parameter="norm.weight", dim=None)
    if not config.tied:
        yield MetaEntry(stored=HEAD, parameter="unembed.weight", dim=0)


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k matrix (heads · D, C) from Meta's interleaved order to ours; a copy."""
    pairs = weight.unflatten(0, (heads, -1, 2))  # (heads, D/2, 2, C)
    return pairs.transpose(1, 2).reshape(weight.shape)  # (heads, 2, D/2, C), flattened


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k matrix (heads · D, C) from our order to Meta's: undoes `half_split`."""
    halves = weight.unflatten(0, (heads, 2, -1))  # (heads, 2, D/2, C)
    return halves.transpose(1, 2).reshape(weight.shape)  # (heads, D/2, 2, C), flattened


def open_folder(folder: Path) -> tuple[Config, Weights]:
    """Config and weights of a folder in Meta's layout, every key and tensor accounted for.

    ValueError or OSError, in one line, where something is missing, cut short or does not fit.
    """
    params = read_json(folder / "params.json")
    wanted = _expected_names(params)
    shards = [without_wrappers(shard, lambda _: wanted) for shard in _shards(folder)]
    tied = head_is_embedding(shards)
    entries = [shard.entries for shard in shards]
    config = read_params(params, str(folder / "params.json"), entries, tied)
    shapes = expected_shapes(config, shards, str(folder / "params.json"))
    embed_dim = _embed_dim(config, entries)
    recipes, said = {}, list[str]()
    for entry in table(config, embed_dim):
        shape = shapes[entry.parameter]
        recipes[entry.parameter] = Recipe(
            stored=entry.stored,
            shape=shape,
            shapes=_shard_shapes(entry, shape, len(shards), folder),
            make=_Join(entry, str(folder), said),
            dim=None if entry.heads else entry.dim,
        )
    assert recipes.keys() == shapes.keys(), "the name table and the model disagree"
    ordered = {name: recipes[name] for name in shapes}
    redundant = {"rope.freqs": Redundant(shape=(config.head_dim // 2,))}
    if tied:
        redundant[HEAD] = Redundant()
    return config, accounted(shards, ordered, redundant, str(folder), "params.json")


@dataclass(frozen=True)
class _Join:
    """One parameter from its shards: joined, and its heads' rows put in half-split order."""

    entry: MetaEntry
    where: str
    said: list[str]

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        entry = self.entry
        whole = parts[0]
        if entry.dim is not None and len(parts) > 1:
            whole = torch.cat(list(parts), dim=entry.dim)
        for number, part in enumerate(parts[1:], start=1):
            if entry.dim is None and not same_bits(part, whole):
                self._compare_copies(whole, part, number)
        if entry.heads:
            whole = half_split(whole, entry.heads)
        if whole is not parts[0]:
            for part in parts:  # what was copied need not be in memory twice
                forget_pages(part)
        return whole

    def _compare_copies(self, first: Tensor, other: Tensor, number: int) -> None:
        """A warning for copies that training let drift; ValueError for another tensor.

        Shard 0's is taken, as by transformers' converter: Llama 3 70B's norms differ so.
        """
        apart = (first.double() - other.double()).abs().max().item()
        what = f"{self.where}: {self.entry.stored} differs between shard 0 and shard {number}"
        if not apart <= _DRIFT * first.double().abs().max().item():
            raise ValueError(
                f"{what} by {apart:.3g}, although every shard holds a copy of it; expected "
                f"{_DRIFT:.0%} of its largest value or less"
            )
        if not self.said:  # once for all tensors
            self.said.append(self.entry.stored)
            warnings.warn(f"{what} by up to {apart:.2g}: shard 0's is taken", stacklevel=3)


def read_params(
    values: Mapping[str, Any], where: str, shards: Sequence[Mapping[str, Stored]], tied: bool
) -> Config:
    """The config that a ``params.json`` states, with what only the tensors can say.

    `shards`: what each shard's tensors look like; they give the vocabulary where ``vocab_size`` is
    -1 (Llama 1 and 2). ValueError, beginning with `where`, for a key that is missing, unknown or of
    the wrong kind and for numbers that do not fit together.
    """
    keys = ConfigKeys(values, where)
    width, heads = keys.integer("dim"), keys.integer("n_heads")
    multiple_of = keys.integer("multiple_of", 256)
    if multiple_of < 1:
        raise ValueError(f"{where}: multiple_of is {multiple_of}: expected 1 or more")
    if heads < 1 or width % heads:
        raise ValueError(f"{where}: dim {width} does not divide into n_heads {heads}")
    vocabulary = keys.integer("vocab_size", -1)
    stated_kv_heads = keys.integer("n_kv_heads", None)
    theta = keys.number("rope_theta", 10000.0)
    scaled = keys.flag("use_scaled_rope", False)
    norm_eps = keys.number("norm_eps", 1e-5)
    context = keys.integer("max_seq_len", None)
    arguments = {
        "width": width,
        "n_layers": keys.integer("n_layers"),
        "n_heads": heads,
        "n_kv_heads": heads if stated_kv_heads is None else stated_kv_heads,
        "head_dim": keys.integer("head_dim", width // heads),
        "hidden_width": hidden_width(width, multiple_of, keys.number("ffn_dim_multiplier", None)),
        "vocab_size": _vocabulary(shards, width) if vocabulary < 1 else vocabulary,
        "context_length": context or _context(width, theta, scaled, norm_eps, stated_kv_heads),
        "norm_eps": norm_eps,
        "tied": tied,
    }
    keys.close(IGNORED)
    try:
        return LlamaConfig(**arguments, rope=rope(width, theta, scaled))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _expected_names(params: Mapping[str, Any]) -> set[str]:
    """What Meta's files call the tensors of as many layers, read or not."""
    layers = params.get("n_layers")
    layers = min(layers, _MOST_LAYERS) if isinstance(layers, int) else 0
    inside = (f"layers.{layer}.{leaf}" for layer in range(layers) for leaf in _LAYER)
    return {EMBED, HEAD, "norm.weight", "rope.freqs", *inside}


def head_is_embedding(shards: Sequence[TensorFile]) -> bool:
    """Whether the head is the embedding: left out, or written out with the same values.

    params.json does not say. Where the head is stored, its rows are compared with the embedding's
    until two differ, which for an untied head is at once.
    """
    embeds = [shard.read(EMBED) for shard in shards if EMBED in shard.entries]
    heads = [shard.read(HEAD) for shard in shards if HEAD in shard.entries]
    if not heads:
        return True
    if len(embeds) != len(heads) or any(tensor.ndim != 2 for tensor in (*embeds, *heads)):
        return False  # they do not belong together; the accounting says what is wrong
    by_rows = embeds[0].shape == heads[0].shape  # Llama 3, else split along the width
    begin = 0
    for number, head in enumerate(heads):
        for rows in torch.arange(len(head)).split(_ROWS_COMPARED):
            first, end = int(rows[0]), int(rows[-1]) + 1
            if by_rows:
                embed = embeds[number][first:end]
            else:
                embed = torch.cat([part[begin + first : begin + end] for part in embeds], dim=1)
            if not same_bits(head[first:end], embed):
                return False
            for looked_at in (head[first:end], embeds[number][first:end]):
                forget_pages(looked_at)
        begin += len(head)
    return True


def hidden_width(width: int, multiple_of: int, multiplier: float | None) -> int:
    """F from C, as Meta's ``FeedForward`` computes it; both roundings down matter."""
    hidden = int(2 * (4 * width) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * math.ceil(hidden / multiple_of)


def rope(width: int, theta: float, scaled: bool) -> RopeConfig:
    """``use_scaled_rope`` does not state the factor: 8, but 32 for Llama 3.2 1B and 3B."""
    if not scaled:
        return RopeConfig(theta=theta)
    return RopeConfig(
        theta=theta,
        type="llama3",
        factor=32.0 if width in (2048, 3072) else 8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_context=8192,
    )


def _context(width: int, theta: float, scaled: bool, norm_eps: float, kv_heads: int | None) -> int:
    """Context length of the release that params.json looks like; the file does not state it.

    Scaled RoPE came with Llama 3.1, theta 500,000 with Llama 3, 1,000,000 with Code Llama. Llama 1
    and 2 share the rest: 1 has eps 1e-6 (7B to 30B), or the 65B's width without grouped heads. It
    is a guess, used only to say how many tokens a model was made for; no arithmetic depends on it.
    """
    if scaled:
        return 131072
    if theta >= 1e6:
        return 16384
    if theta >= 5e5:
        return 8192
    first = norm_eps < 5e-6 or (width == 8192 and kv_heads is None)
    return 2048 if first else 4096


def _vocabulary(shards: Sequence[Mapping[str, Stored]], width: int) -> int:
    """V from the embedding's rows: of one shard where width was split, else of all together."""
    rows = [shard[EMBED].shape for shard in shards
            if EMBED in shard]  # fmt: skip
    if not rows or len(rows[0]) != 2:
        raise ValueError("vocab_size is -1 and there is no tok_embeddings.weight to count rows of")
    return sum(shape[0] for shape in rows) if rows[0][1] == width else rows[0][0]


def _embed_dim(config: Config, shards: Sequence[Mapping[str, Stored]]) -> int:
    """Dimension the embedding is split along: 1 in Llama 1 and 2, 0 in Llama 3; its shape tells."""
    found = shards[0].get(EMBED)
    return 0 if found is None or found.shape[1:] == (config.width,) else 1


def _shard_shapes(entry: MetaEntry, shape: Shape, shards: int, folder: Path) -> tuple[Shape, ...]:
    if entry.dim is None:
        return (shape,) * shards
    if shape[entry.dim] % shards:
        raise ValueError(
            f"{folder}: {entry.stored} {shape} does not divide into {shards} shards along "
            f"dimension {entry.dim}"
        )
    part = list(shape)
    part[entry.dim] //= shards
    return (tuple(part),) * shards


def _shards(folder: Path) -> list[PthFile]:
    """The shards in order; FileNotFoundError where their numbers have a gap."""
    numbered = {
        int(found[1]): path
        for path in folder.iterdir()
        if (found := SHARD.fullmatch(path.name)) is not None
    }
    if not numbered:
        raise FileNotFoundError(f"{folder}: no weights: expected consolidated.00.pth")
    count = max(numbered) + 1
    absent = [f"consolidated.{number:02}.pth" for number in range(count) if number not in numbered]
    if absent:
        raise FileNotFoundError(
            f"{folder}: {len(absent)} of {count} shards missing: {', '.join(absent[:6])}"
        )
    return [PthFile(numbered[number]) for number in range(count)]
