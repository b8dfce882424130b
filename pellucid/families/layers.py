"""The keys that say in what layers differ: their windows, and whether RoPE turns them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pellucid.families.keys import ConfigKeys
from pellucid.models import Layer, ModelConfig, RopeConfig

FULL, WINDOW = "full_attention", "sliding_attention"
RopeOf = Literal["rope", "second_rope", ""]


def folded(kinds: Sequence[Layer]) -> tuple[Layer, ...]:
    """`ModelConfig.layers` for these layers: the shortest run that repeats to them."""
    for period in range(1, len(kinds) + 1):
        if all(kind == kinds[place % period] for place, kind in enumerate(kinds)):
            return () if kinds[:period] == [Layer()] else tuple(kinds[:period])
    return ()


def _window(keys: ConfigKeys, default: int | None) -> int:
    """``sliding_window``: tokens that a layer sees, the token itself included; 0: all."""
    if keys.is_null("sliding_window"):
        keys.integer("sliding_window", None)
        return 0
    return keys.integer("sliding_window", default) or 0


@dataclass(frozen=True, kw_only=True)
class EveryWindow:
    """``sliding_window`` of all layers, null for none (Mistral)."""

    window: int | None

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``window`` and ``layers``."""
        found["window"] = _window(keys, self.window)
        found["layers"] = (Layer(window=True),) if found["window"] else ()

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The window, or null."""
        return {"sliding_window": config.window or None}


def one_in(period: int) -> Callable[[int], bool]:
    """Which layers have a window where every `period`-th sees everything."""
    return lambda layer: (layer + 1) % period != 0


@dataclass(frozen=True, kw_only=True)
class LayerTypes:
    """``layer_types``, or an older spelling, beside ``sliding_window``.

    window       where no key states it; None: none
    windowed     which layers have one where ``layer_types`` is absent
    pattern_key  the older key: every how many layers one sees everything
    ropes        which RoPE turns a kind of layer
    unwindowed   which RoPE turns layers of a model that has no window at all
    """

    window: int | None
    windowed: Callable[[int], bool]
    pattern_key: str = ""
    ropes: Mapping[str, RopeOf] = field(default_factory=lambda: {FULL: "rope", WINDOW: "rope"})
    unwindowed: RopeOf | None = None

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``window`` and ``layers``."""
        window, windowed = _window(keys, self.window), self.windowed
        types = keys.texts("layer_types")
        if self.pattern_key and types is not None:
            keys.pass_over(self.pattern_key)  # the list says it all
        elif self.pattern_key and (pattern := keys.integer(self.pattern_key, None)):
            windowed = one_in(pattern)
        if types is None:
            sees = window and windowed
            places = range(found["n_layers"])
            types = tuple(WINDOW if sees and sees(layer) else FULL for layer in places)
        found["window"], found["layers"] = self._kinds(keys, found["n_layers"], window, types)

    def _kinds(
        self, keys: ConfigKeys, layers: int, window: int, types: Sequence[str]
    ) -> tuple[int, tuple[Layer, ...]]:
        check_types(keys, layers, types, window)
        ropes = dict(self.ropes)
        if not window and self.unwindowed is not None:
            ropes[FULL] = self.unwindowed
        kinds = [Layer(window=kind == WINDOW, rope=ropes[kind]) for kind in types]
        return (window if WINDOW in types else 0), folded(kinds)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The window and a kind for each layer."""
        return {"sliding_window": config.window or None, "layer_types": layer_types(config)}


def check_types(keys: ConfigKeys, layers: int, types: Sequence[str], window: int) -> None:
    """ValueError for kinds of layers that are unknown, too many or too few, or lack a window."""
    unknown = sorted(set(types) - {FULL, WINDOW})
    if unknown:
        raise ValueError(
            f"{keys.where}: layer_types has {', '.join(unknown)}; Pellucid has {FULL} and {WINDOW}"
        )
    if len(types) != layers:
        raise ValueError(
            f"{keys.where}: layer_types has {len(types)} layers and num_hidden_layers is {layers}"
        )
    if WINDOW in types and not window:
        raise ValueError(f"{keys.where}: layer_types has windows, but there is no sliding_window")


def layer_types(config: ModelConfig) -> list[str]:
    """A kind for each layer, in transformers' words."""
    return [WINDOW if kind.window else FULL for kind in config.kinds]


@dataclass(frozen=True, kw_only=True)
class UpperWindows:
    """``use_sliding_window``: layers from ``max_window_layers`` on have a window (Qwen 2 and 3)."""

    window: int
    first: int

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``window`` and ``layers``."""
        window, first = _window(keys, self.window), keys.integer("max_window_layers", self.first)
        window = window if keys.flag("use_sliding_window", False) else 0
        kinds = LayerTypes(window=None, windowed=lambda layer: layer >= first)
        types = keys.texts("layer_types") or tuple(
            WINDOW if window and layer >= first else FULL for layer in range(found["n_layers"])
        )
        found["window"], found["layers"] = kinds._kinds(keys, found["n_layers"], window, types)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """All four keys, so that older versions read the same."""
        types = layer_types(config)
        first = types.index(WINDOW) if WINDOW in types else config.n_layers
        return {
            "use_sliding_window": config.window > 0,
            "sliding_window": config.window or None,
            "max_window_layers": first,
            "layer_types": types,
        }


@dataclass(frozen=True, kw_only=True)
class SomeRope:
    """``no_rope_layers``, a 0 for each layer that RoPE does not turn (SmolLM 3)."""

    interval: int = 4

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``window`` and ``layers``."""
        window, layers = _window(keys, None), found["n_layers"]
        used = keys.flag("use_sliding_window", False) and window
        interval = keys.integer("no_rope_layer_interval", self.interval)
        turned = keys.numbers("no_rope_layers") or tuple(
            float((layer + 1) % interval != 0) for layer in range(layers)
        )
        if len(turned) < layers:
            raise ValueError(
                f"{keys.where}: no_rope_layers has {len(turned)} entries, expected {layers}"
            )
        types = keys.texts("layer_types") or tuple(
            WINDOW if used and not turn else FULL for turn in turned[:layers]
        )
        check_types(keys, layers, types, window)
        kinds = [
            Layer(window=kind == WINDOW, rope="rope" if turn else "")
            for kind, turn in zip(types, turned, strict=False)
        ]
        found["window"], found["layers"] = (window if WINDOW in types else 0), folded(kinds)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """All keys, so that older versions read the same."""
        return {
            "no_rope_layers": [int(bool(kind.rope)) for kind in config.kinds],
            "use_sliding_window": config.window > 0,
            "sliding_window": config.window or None,
            "layer_types": layer_types(config),
        }


@dataclass(frozen=True, kw_only=True)
class LayerThetas:
    """``layer_rope_theta``: RoPE's base of each layer, 0 for none (Granite with windows)."""

    window: int
    windowed: Callable[[int], bool]

    def read(self, keys: ConfigKeys, found: dict[str, Any]) -> None:
        """Fill in ``window``, ``layers`` and the bases of ``rope`` and ``second_rope``."""
        layers, rope = found["n_layers"], found["rope"]
        LayerTypes(window=self.window, windowed=self.windowed).read(keys, found)
        thetas = keys.numbers("layer_rope_theta") or (rope.theta,) * layers
        if len(thetas) != layers:
            raise ValueError(
                f"{keys.where}: layer_rope_theta has {len(thetas)} entries, expected {layers}"
            )
        bases = list(dict.fromkeys(theta for theta in thetas if theta))
        if len(bases) > 2 or (bases and rope.type != "default"):
            raise ValueError(
                f"{keys.where}: layer_rope_theta has {len(bases)} bases of a {rope.type} RoPE; "
                "Pellucid has at most two, neither of them scaled"
            )
        found["rope"] = RopeConfig(theta=bases[0] if bases else rope.theta)
        found["second_rope"] = RopeConfig(theta=bases[1]) if len(bases) > 1 else None
        names: dict[float, RopeOf] = {0.0: ""}
        names |= dict(zip(bases, ("rope", "second_rope"), strict=False))
        plain = ModelConfig(n_layers=layers, window=found["window"], layers=found["layers"]).kinds
        kinds = [
            Layer(window=kind.window, rope=names[theta])
            for kind, theta in zip(plain, thetas, strict=True)
        ]
        found["layers"] = folded(kinds)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The window, a kind and a base for each layer."""
        thetas = [getattr(config, kind.rope).theta if kind.rope else 0.0 for kind in config.kinds]
        return {
            "sliding_window": config.window or None,
            "layer_types": layer_types(config),
            "layer_rope_theta": thetas,
        }
