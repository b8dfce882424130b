"""What the rows of families are made of: pieces of ``config.json`` that read and write themselves.

A part takes its keys from a file and fills in fields of `ModelConfig`, and states those fields
under its keys again. A family is a sequence of parts, read and written in this order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pellucid.families.keys import REQUIRED, ConfigKeys
from pellucid.models import ModelConfig

_NO_NULL: Any = object()  # null counts as absent
_MOST_LAYERS = 100_000
BIASED = ("qkv", "o", "mlp", "head")  # the order of `ModelConfig.biases`


class Part(Protocol):
    """A piece of a config file, both ways."""

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Take keys, fill in arguments of `ModelConfig`; ValueError where they do not fit."""

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The keys that state this piece of `config`."""
        ...


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key that is one field.

    default     where the file does not have the key, in the file's terms
    null        the field's value for a null that says more than absence: "no window", "no cap"
    into, back  from the file's number to the field's, and back
    also        an older key for the same
    """

    theirs: str
    ours: str
    kind: Literal["integer", "number", "flag"]
    default: Any = REQUIRED
    null: Any = _NO_NULL
    into: Callable[[Any], Any] = _same
    back: Callable[[Any], Any] = _same
    also: str = ""

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in the field."""
        take = getattr(keys, self.kind)
        if self.null is not _NO_NULL and keys.is_null(self.theirs):
            take(self.theirs, None)
            found[self.ours] = self.null
            return
        default = self.default
        if self.also:
            older = take(self.also, None)
            default = default if older is None else older
        stated = take(self.theirs, default)
        try:
            found[self.ours] = self.into(stated)
        except ZeroDivisionError:
            raise ValueError(f"{keys.where}: {self.theirs} is 0; expected another number") from None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The key."""
        value = getattr(config, self.ours)
        none = self.null is not _NO_NULL and value == self.null
        return {self.theirs: None if none else self.back(value)}


@dataclass(frozen=True, kw_only=True)
class Only:
    """Keys of which Pellucid computes one value only; `stated` are those that a file needs."""

    values: Mapping[str, Any]
    stated: tuple[str, ...] = ()

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """ValueError for another value."""
        for key, value in self.values.items():
            keys.must_be(key, value)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The stated ones."""
        return {key: self.values[key] for key in self.stated}


@dataclass(frozen=True, kw_only=True)
class Computed:
    """A field that follows from others and has no key: Gemma's embedding times √C."""

    ours: str
    value: Callable[[Mapping[str, Any]], Any]

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in the field."""
        found[self.ours] = self.value(found)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Nothing."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Width, layers, heads and hidden width under Llama's keys.

    kv_heads  where the file does not say; None: as many as query heads
    head_dim  likewise; None: width / heads
    square    the class takes width / heads whatever the file says
    defaults  sizes that a file may leave out
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    square: bool = False
    defaults: Mapping[str, int] = field(default_factory=dict)

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in the sizes; ValueError for heads of no whole width."""
        known = self.defaults.get
        width = keys.integer("hidden_size", known("width", REQUIRED))
        heads = keys.integer("num_attention_heads", known("n_heads", REQUIRED))
        kv_heads = heads if keys.is_null("num_key_value_heads") else self.kv_heads or heads
        per_head = None if keys.is_null("head_dim") else self.head_dim
        found |= {
            "width": width,
            "n_heads": heads,
            "n_kv_heads": keys.integer("num_key_value_heads", kv_heads),
            "head_dim": self._head_dim(keys, width, heads, keys.integer("head_dim", per_head)),
            "n_layers": self._layers(keys, known("n_layers", REQUIRED)),
            "hidden_width": keys.integer("intermediate_size", known("hidden_width", REQUIRED)),
        }

    @staticmethod
    def _layers(keys: ConfigKeys, default: Any) -> int:
        layers = keys.integer("num_hidden_layers", default)
        if layers > _MOST_LAYERS:  # a kind is worked out for each
            raise ValueError(
                f"{keys.where}: num_hidden_layers is {layers}; expected at most {_MOST_LAYERS:,}"
            )
        return layers

    def _head_dim(self, keys: ConfigKeys, width: int, heads: int, stated: int | None) -> int:
        if stated is not None and not (self.square and stated * heads != width):
            return stated
        if stated is not None:
            raise ValueError(
                f"{keys.where}: head_dim is {stated}, and this family's heads are always "
                f"hidden_size {width} / {heads} heads wide"
            )
        if heads < 1 or width % heads:
            raise ValueError(
                f"{keys.where}: hidden_size {width} does not divide into {heads} heads, and there "
                "is no head_dim"
            )
        return width // heads

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """All of them."""
        return {
            "hidden_size": config.width,
            "num_hidden_layers": config.n_layers,
            "num_attention_heads": config.n_heads,
            "num_key_value_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "intermediate_size": config.hidden_width,
        }


@dataclass(frozen=True, kw_only=True)
class Activation:
    """The MLP's function: transformers' names -> ours; the first of a kind is the one written."""

    choices: Mapping[str, str]
    default: str
    key: str = "hidden_act"

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``activation``."""
        if len(self.choices) == 1:
            keys.must_be(self.key, self.default)
            found["activation"] = self.choices[self.default]
            return
        stated = keys.text(self.key, self.default)
        if stated not in self.choices:
            raise ValueError(
                f"{keys.where}: {self.key} is {stated!r}; expected one of {', '.join(self.choices)}"
            )
        found["activation"] = self.choices[stated]

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Its name; ValueError for a function that the family does not have."""
        for theirs, ours in self.choices.items():
            if ours == config.activation:
                return {self.key: theirs}
        raise ValueError(
            f"activation is {config.activation!r}: {config.family} has {', '.join(self.choices)}"
        )


@dataclass(frozen=True, kw_only=True)
class Bias:
    """A flag for the biases of some products; without a key they always have one."""

    products: tuple[str, ...]
    key: str = ""
    default: bool = False

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Add to ``biases``."""
        there = keys.flag(self.key, self.default) if self.key else True
        both = {*found.get("biases", ()), *(self.products if there else ())}
        found["biases"] = tuple(product for product in BIASED if product in both)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The flag."""
        return {self.key: set(self.products) <= set(config.biases)} if self.key else {}


SILU = Activation(choices={"silu": "silu"}, default="silu")
GELU_TANH = {"gelu_pytorch_tanh": "gelu_tanh"}
RELU2 = Activation(choices={"relu2": "relu2"}, default="relu2")
VOCABULARY = Key(theirs="vocab_size", ours="vocab_size", kind="integer")


def context(default: int, also: str = "") -> Key:
    """``max_position_embeddings``."""
    return Key(
        theirs="max_position_embeddings",
        ours="context_length",
        kind="integer",
        default=default,
        also=also,
    )


def eps(default: float, key: str = "rms_norm_eps") -> Key:
    """What a norm adds to the mean square."""
    return Key(theirs=key, ours="norm_eps", kind="number", default=default)


def tied(default: bool) -> Key:
    """Whether the head is the embedding."""
    return Key(theirs="tie_word_embeddings", ours="tied", kind="flag", default=default)


def factor(theirs: str, ours: str, default: float = 1.0) -> Key:
    """A number that multiplies."""
    return Key(theirs=theirs, ours=ours, kind="number", default=default)


def norm_of_each_head(theirs: str) -> Key:
    """Whether queries and keys are normalised, each head with a weight of its own."""
    return Key(
        theirs=theirs,
        ours="qk_norm",
        kind="flag",
        default=False,
        into=lambda there: "each" if there else "",
        back=bool,
    )


def cap(theirs: str, ours: str, default: float | None) -> Key:
    """A soft cap, where null is none."""
    return Key(
        theirs=theirs,
        ours=ours,
        kind="number",
        default=0.0 if default is None else default,
        null=0.0,
    )


def inverse(value: float) -> float:
    """1 / value, as the shortest number whose inverse is `value` again."""
    short = float(f"{1 / value:.12g}")
    return short if 1 / short == value else 1 / value


def root_inverse(value: float) -> float:
    """value^-½, of ``query_pre_attn_scalar``; ZeroDivisionError where there is none."""
    return max(value, 0.0) ** -0.5


def square_inverse(value: float) -> float | int:
    """value^-2: undoes `root_inverse`, a whole number where that is exact."""
    whole = round(value**-2) if value else 0
    return whole if whole and whole**-0.5 == value else value**-2 if value else 0
