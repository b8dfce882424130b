"""Watching the attention function that a transformers model calls: what it is given and returns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.diff.replay.statistics import MASKED


class Call:
    """One call of an attention function: q (B, H, T, D), k and v (B, Hkv, S, D), mask."""

    def __init__(self, key: str, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        order = ("module", "query", "key", "value", "attention_mask")
        given = {**dict(zip(order, arguments, strict=False)), **named}
        self.module, self.query = given["module"], given["query"]
        self.key, self.value = given["key"], given["value"]
        self._mask, self._implementation = given.get("attention_mask"), key
        self._causal = given.get("is_causal")
        window = given.get("sliding_window")
        self.window = bool(window) and window < self.key.shape[2]  # a longer one hides nothing

    def allowed(self) -> Tensor | None:
        """True = may look, (T, S), or (B, 1, T, S) where rows differ; None where nothing says."""
        passes, seen = self.query.shape[2], self.key.shape[2]
        mask = self._mask
        if mask is None:
            everyone = torch.ones(passes, seen, dtype=torch.bool, device=self.query.device)
            if self._implementation == "eager":
                return everyone
            if self._implementation != "sdpa":
                return None
            causal = self._causal
            causal = getattr(self.module, "is_causal", True) if causal is None else causal
            return everyone.tril() if causal and passes > 1 else everyone
        if mask.ndim != 4:
            return None
        allowed = (mask if mask.dtype == torch.bool else mask > MASKED)[..., :seen]
        alike = bool((allowed == allowed[:1, :1]).all())
        return allowed[0, 0] if alike else allowed


def implementation(attention: nn.Module) -> tuple[Any, str]:
    """Where the attention function that a module is going to call stands: a mapping, and its key.

    transformers looks it up by the config's ``_attn_implementation`` in its table, and takes
    ``eager_attention_forward`` of the file that defines the module where the table has none.
    """
    space = getattr(inspect.unwrap(attention.forward), "__globals__", {})
    key = getattr(attention.config, "_attn_implementation", None) or "eager"
    table = space.get("ALL_ATTENTION_FUNCTIONS", {})
    return (table, key) if key in table else (space, "eager_attention_forward")


@contextmanager
def wrapped(place: Any, key: str, observe: Callable[[Call, Any], None]) -> Iterator[None]:
    """`observe` each call of the function ``place[key]`` for as long as the context lasts."""
    if key not in place:
        yield
        return
    original = place[key]
    spoken = "eager" if key == "eager_attention_forward" else key

    def watched(*arguments: Any, **named: Any) -> Any:
        result = original(*arguments, **named)
        observe(Call(spoken, arguments, named), result)
        return result

    # The table has a layer of its own over the library's: take the entry out again there.
    own = getattr(place, "_local_mapping", place)
    held = key in own
    place[key] = watched
    try:
        yield
    finally:
        if held:
            place[key] = original
        else:
            del place[key]
