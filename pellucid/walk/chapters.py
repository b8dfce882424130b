"""The walk in chapters: which part of the model a step belongs to."""

from __future__ import annotations

import re
from typing import Protocol

from pellucid import names

_TEXT, _VECTORS, _END = "From text to tokens", "From tokens to vectors", "The next token"
# Part of a layer -> its leaves; an index in brackets is one head's.
_PARTS = (
    ("into attention", r"resid_pre|attn_norm.*|attn\.[qkvo]_proj\..*"),
    ("queries", r"attn\.(wq_heads?|q|q_pairs)(\[\d+\])?"),
    ("positions turn the queries", r"attn\.q_(complex|turned|turned_pairs|rotated)(\[\d+\])?"),
    ("keys", r"attn\.(wk_heads?|k(_\w+)?)(\[\d+\])?"),
    ("who looks at whom", r"attn\.(scores|masked_scores|pattern)(\[\d+\])?"),
    ("values", r"attn\.(wv_heads?|v)(\[\d+\])?|attn\.z\[\d+\]"),
    ("all heads together", r"attn\.z(_\w+)?|attn_out|resid_mid"),
    ("the MLP", r"mlp.*|resid_post"),
)
_OF_MODEL = {
    **dict.fromkeys(("specials", "tokens", "token_strings"), _TEXT),
    **dict.fromkeys(("positions", "embed", "pos_embed"), _VECTORS),
}
# What a layer asks for but all layers share: it belongs where it is first needed.
_SHARED = {"rope": "positions turn the queries", "mask": "who looks at whom"}
_OF_KEYS_AND_VALUES = re.compile(r"attn\.(w[kv]_head|[kv](_\w+)?)\[")


class Told(Protocol):
    """What is asked of a step to know its chapter."""

    @property
    def address(self) -> str: ...
    @property
    def source(self) -> str: ...


class Chapters:
    """Goes along with a walk and says when a chapter begins."""

    def __init__(self) -> None:
        self.current = ""
        self._before: set[str] = set()
        self._layer = 0
        self._unrolled = False

    def begins(self, step: Told) -> str | None:
        """Title of the chapter that `step` begins; None: it goes on with the current one."""
        part = self._part(step)
        if part == self.current:
            return None
        title = part
        _, index = names.parse(step.address)
        if part in self._before and index:
            of = "key/value head" if _OF_KEYS_AND_VALUES.search(step.address) else "head"
            title += f", {of} {index[0]}"
        self.current = part
        self._before.add(part)
        return title

    def _part(self, step: Told) -> str:
        address = step.address
        layer = names.layer_of(address)
        if layer is None:
            shared = _SHARED.get(address.partition(".")[0])
            if shared:
                return f"Layer {self._layer} · {shared}"
            return _OF_MODEL.get(address, _END)
        if not step.source:  # a whole layer in one step
            return "The layers above" if self._unrolled else "The layers below"
        leaf = address.split(".", 2)[2]
        if leaf == "resid_pre" and self.current == _VECTORS:
            return _VECTORS  # GPT-2: the sum of both embeddings
        self._layer, self._unrolled = layer, True
        for part, leaves in _PARTS:
            if re.fullmatch(leaves, leaf):
                return f"Layer {layer} · {part}"
        raise AssertionError(f"{address} belongs to no chapter")
