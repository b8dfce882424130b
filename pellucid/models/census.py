"""The census: what a model is made of, counted.

Every number is read off the model itself, built on the meta device, where a parameter has a shape
and no memory: no formula for a count stands beside the module that it counts, so none can differ
from it. Units: GB is 10⁹ bytes, GiB is 2³⁰.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod

from pellucid.models import Config, empty_model

# Bits of one number. For int8 and int4 the scales of the quantisation come on top.
DTYPE_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
BLOCKS = "blocks"
_GROUPS = {"embed": "embedding", "pos_embed": "embedding", "norm": "norm", "unembed": "head"}


@dataclass(frozen=True, kw_only=True)
class PartCount:
    """One module that holds parameters: its path, inside a block without ``layers.N.``."""

    path: str
    shapes: dict[str, tuple[int, ...]]  # "weight", "bias" -> shape

    @property
    def count(self) -> int:
        """Numbers it holds."""
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def written(self) -> str:
        """The product written out: ``768 × 768 + bias 768``."""
        return " + ".join(
            ("" if name == "weight" else f"{name} ") + times(shape)
            for name, shape in self.shapes.items()
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """Parts that stand together, `repeats` times in a row: the blocks are one group."""

    name: str
    parts: tuple[PartCount, ...]
    repeats: int = 1

    @property
    def each(self) -> int:
        """Parameters of one repeat."""
        return sum(part.count for part in self.parts)

    @property
    def count(self) -> int:
        """Parameters of all repeats."""
        return self.repeats * self.each

    @property
    def written(self) -> str:
        """The group as a term of the sum: ``norm 1,536`` or ``12 blocks × 7,085,568``."""
        if self.name != BLOCKS:
            return f"{self.name} {self.count:,}"
        return f"{self.repeats} block{'s' if self.repeats > 1 else ''} × {self.each:,}"


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations for one token with `tokens` tokens in view, itself included.

    ``forward = 2 × matmul_parameters + 4 × layers × H × D × tokens``: a multiplication and an
    addition for every weight of a matrix product (the head too, tied or not; the embedding is a
    look-up), and the same for q·kᵀ and pattern·v over the tokens in view. Training does this three
    times: forward, and backward for the inputs and for the weights. Source: Chowdhery et al., PaLM
    (2022), appendix B, which gives 6N + 12·L·H·Q·T for training. Norms, softmax, RoPE, activations
    and biases are left out: they are below one percent in a model of common size.
    """

    tokens: int
    matmul_parameters: int
    attention_per_token_in_view: int  # 4 × layers × H × D

    @property
    def attention(self) -> int:
        """The part that grows with the context."""
        return self.attention_per_token_in_view * self.tokens

    @property
    def forward(self) -> int:
        """One token, forward."""
        return 2 * self.matmul_parameters + self.attention

    @property
    def training(self) -> int:
        """One token, forward and backward."""
        return 3 * self.forward


@dataclass(frozen=True, kw_only=True)
class Census:
    """The counts of a model with `config`."""

    config: Config
    groups: tuple[Group, ...]

    @property
    def total(self) -> int:
        """Parameters of the model; a tied head is the embedding and counts once."""
        return sum(group.count for group in self.groups)

    @property
    def written(self) -> str:
        """The sum written out, ``embedding … + 12 blocks × … + norm … + head … = …``."""
        return f"{' + '.join(group.written for group in self.groups)} = {self.total:,}"

    @property
    def block(self) -> Group:
        """The group of the blocks."""
        return next(group for group in self.groups if group.name == BLOCKS)

    def part(self, path: str) -> PartCount | None:
        """The part with this path (``attn.q_proj``, ``embed``), None if the model has none."""
        parts = (part for group in self.groups for part in group.parts)
        return next((part for part in parts if part.path == path), None)

    @property
    def cached_numbers(self) -> int:
        """Numbers the KV cache keeps of each token: every layer's keys and values."""
        rows = (self._rows("attn.k_proj"), self._rows("attn.v_proj"))
        return self.config.n_layers * sum(rows)

    def flops(self, tokens: int) -> Flops:
        """Cost of a token that sees `tokens` tokens; ValueError outside 1 … context length."""
        check_tokens(self.config, tokens)
        matrices = (
            group.repeats * prod(part.shapes["weight"])
            for group in self.groups
            for part in group.parts
            if len(part.shapes.get("weight", ())) == 2 and group.name != "embedding"
        )
        embedding = self.part("embed")
        assert embedding is not None, "both families have an embedding"
        tied_head = prod(embedding.shapes["weight"]) if self.config.tied else 0
        return Flops(
            tokens=tokens,
            matmul_parameters=sum(matrices) + tied_head,
            attention_per_token_in_view=4 * self.config.n_layers * self._rows("attn.q_proj"),
        )

    def _rows(self, path: str) -> int:
        part = self.part(path)
        assert part is not None, f"both families have {path}"
        return part.shapes["weight"][0]


def census(config: Config) -> Census:
    """Count a model of `config`, built on the meta device: no memory, no weights."""
    model = empty_model(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    counted = Census(config=config, groups=tuple(_groups(shapes)))
    direct = sum(parameter.numel() for parameter in model.parameters())
    assert counted.total == direct, f"grouped into {counted.total}, but there are {direct}"
    return counted


def _groups(shapes: dict[str, tuple[int, ...]]) -> Iterator[Group]:
    """The parameters of the model, in its order, the blocks folded into one group."""
    outside: dict[str, dict[str, tuple[int, ...]]] = {}
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, shape in shapes.items():
        if path.startswith("layers."):
            _, layer, inside = path.split(".", 2)
            layers.setdefault(layer, {})[inside] = shape
            outside.setdefault(BLOCKS, {})
        else:
            top = path.split(".", 1)[0]
            outside.setdefault(_GROUPS.get(top, top), {})[path] = shape
    first = layers["0"]
    assert all(layer == first for layer in layers.values()), "the blocks of a model are alike"
    for name, members in outside.items():
        if name == BLOCKS:
            yield Group(name=name, parts=tuple(_parts(first.items())), repeats=len(layers))
        else:
            yield Group(name=name, parts=tuple(_parts(members.items())))


def _parts(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[PartCount]:
    """Weight and bias of a module joined: paths ``attn.q_proj.weight``, ``attn.q_proj.bias``."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, shape in shapes:
        module, name = path.rsplit(".", 1)
        modules.setdefault(module, {})[name] = shape
    return (PartCount(path=module, shapes=found) for module, found in modules.items())


def check_tokens(config: Config, tokens: int) -> None:
    """ValueError unless a model of `config` takes `tokens` tokens at once."""
    if not 1 <= tokens <= config.context_length:
        raise ValueError(
            f"{tokens} tokens: expected 1 to {config.context_length}, the model's context length"
        )


def nbytes(numbers: int, dtype: str) -> int:
    """Bytes of so many numbers in a dtype of `DTYPE_BITS`, the last byte filled up."""
    return -(-numbers * DTYPE_BITS[dtype] // 8)


def times(shape: Iterable[int]) -> str:
    """``768 × 768``."""
    return " × ".join(f"{size:,}" for size in shape)


def in_units(value: float, unit: str, base: int = 1000) -> str:
    """A number with four figures and a prefix: ``16.06 GB``; base 1024 gives ``14.96 GiB``."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < base or prefix == "P":
            break
        value /= base
    if not prefix:
        return f"{value:,.0f} {unit}"
    if base == 1024:
        prefix = f"{prefix.upper()}i"
    return f"{value:.{2 if value < 100 else 1}f} {prefix}{unit}"


def as_json(counted: Census, tokens: int) -> dict[str, object]:
    """The census as one JSON object; bytes and counts are whole numbers, shares are fractions."""
    groups = [
        {
            "name": group.name,
            "count": group.count,
            "share": group.count / counted.total,
            "repeats": group.repeats,
            "each": group.each,
            "terms": [
                {
                    "name": part.path,
                    "count": part.count,
                    "written": part.written,
                    "shapes": part.shapes,
                }
                for part in group.parts
            ],
        }
        for group in counted.groups
    ]
    flops = counted.flops(tokens)
    return {
        "parameters": {"total": counted.total, "groups": groups},
        "sum": counted.written,
        "bytes": {dtype: nbytes(counted.total, dtype) for dtype in DTYPE_BITS},
        "kv_cache": {
            "numbers_per_token": counted.cached_numbers,
            "per_token": _cache_bytes(counted, 1),
            "tokens": tokens,
            "at_tokens": _cache_bytes(counted, tokens),
            "full_context": _cache_bytes(counted, counted.config.context_length),
        },
        "flops": {
            "tokens": tokens,
            "matmul_parameters": flops.matmul_parameters,
            "attention": flops.attention,
            "forward_per_token": flops.forward,
            "training_per_token": flops.training,
        },
    }


def _cache_bytes(counted: Census, tokens: int) -> dict[str, int]:
    return {dtype: nbytes(tokens * counted.cached_numbers, dtype) for dtype in DTYPE_BITS}
