"""Which tensor carries what: patching one run with another, the logit lens, steering.

    pellucid.patch(lm, clean, corrupted, metric=(" Mary", " John"))
    pellucid.logit_lens(lm, prompt).top(3)
    lm.generate(prompt, edit=pellucid.steer("layers.4.resid_post", direction, 6))

Each is a few lines over `lm.trace` and its edits, so that what it computes can be read here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from pellucid import graph
from pellucid.edits import Edit
from pellucid.language_model import LanguageModel
from pellucid.names import layer_of
from pellucid.prompts import Prompt
from pellucid.trace import trace
from pellucid.trace_plan import check_names

Measure: TypeAlias = Callable[[Tensor], Tensor]
Metric: TypeAlias = Measure | tuple[str | int, str | int]
_LABEL = 6  # characters of a column's title
_ROWS = 32  # runs of a sweep that go through the model together


@dataclass(frozen=True)
class PatchTable:
    """A number for each of some rows and columns, and what it would be without the change.

    values     (rows, columns)
    clean      the metric of the clean run
    corrupted  the metric of the corrupted run; a value near `clean` marks what carries the answer
    """

    values: Tensor
    rows: list[str]
    columns: list[str]
    clean: float
    corrupted: float
    of: str = field(default="")

    @property
    def restored(self) -> Tensor:
        """`values` as shares: 0 as corrupted, 1 as clean; NaN where the two are alike."""
        return (self.values - self.corrupted) / (self.clean - self.corrupted)

    def __repr__(self) -> str:
        return (
            f"PatchTable({self.of}: {len(self.rows)} rows, {len(self.columns)} columns; clean "
            f"{self.clean:.4g}, corrupted {self.corrupted:.4g})"
        )

    def __str__(self) -> str:
        left = max(len(row) for row in self.rows)
        labels = [repr(column)[1:-1] for column in self.columns]
        labels = [each if len(each) <= _LABEL else each[: _LABEL - 1] + "…" for each in labels]
        head = " " * left + "".join(f"{label:>{_LABEL + 1}}" for label in labels)
        lines = [
            f"{row:<{left}}" + "".join(f"{value:>{_LABEL + 1}.2f}" for value in line)
            for row, line in zip(self.rows, self.values.tolist(), strict=True)
        ]
        return "\n".join([repr(self), head, *lines])

    def _repr_html_(self) -> str:
        from html import escape

        restored = self.restored.nan_to_num(0).clamp(-1, 1).tolist()
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = ""
        for row, values, shares in zip(self.rows, self.values.tolist(), restored, strict=True):
            cells = "".join(
                f'<td style="background:rgba({"0,90,160" if share >= 0 else "190,70,0"},'
                f'{abs(share):.2f});color:{"#fff" if abs(share) > 0.5 else "inherit"}">'
                f"{value:.3g}</td>"
                for value, share in zip(values, shares, strict=True)
            )
            body += f"<tr><th>{escape(row)}</th>{cells}</tr>"
        return (
            f"<table><caption>{escape(repr(self))}</caption><tr><th></th>{head}</tr>{body}</table>"
        )


def patch(
    lm: LanguageModel,
    clean: Prompt,
    corrupted: Prompt,
    names: str = "layers.*.resid_pre",
    metric: Metric | None = None,
    *,
    heads: bool | None = None,
) -> PatchTable:
    """Activation patching: the corrupted run, with one piece at a time taken from the clean one.

    names   glob of the tensors to patch: their rows of the table. ``resid_pre``, ``attn_out``,
            ``mlp_out`` … one token at a time; ``attn.z``, ``attn.pattern`` … one head at a time
    metric  a number of the logits (1, T, V), or two tokens (a, b): logit of a minus logit of b at
            the last position; None takes the likeliest next tokens of the two prompts
    heads   columns are heads (True) or tokens (False); None: heads where the tensor has them

    As TransformerLens's ``patching.get_act_patch_*``. ValueError for prompts of unequal length, for
    names that are no tensors of layers or not all of one shape, and for two equal tokens.
    """
    check_names(lm.config, names)
    ids = [lm.encode(prompt) for prompt in (clean, corrupted)]
    if len(ids[0]) != len(ids[1]):
        raise ValueError(
            f"the clean prompt has {len(ids[0])} tokens, the corrupted one {len(ids[1])}: patching "
            "takes each token from the place where it stands, so they must be of equal length"
        )
    source = lm.trace(ids[0], only=[names, "logits"])
    kept = [name for name in source if layer_of(name) is not None]
    shapes = {graph.dims(name) for name in kept}
    if len(shapes) != 1:
        raise ValueError(
            f"{names} matches {len(shapes)} kinds of tensors of layers: name one, such as "
            "layers.*.resid_pre or layers.*.attn.z"
        )
    (dims,) = shapes
    has_heads = dims[1] in ("H", "Hkv")
    if heads and not has_heads:
        raise ValueError(f"{names} has no heads: its axes are {', '.join(dims)}")
    by_head = has_heads if heads is None else heads
    axis = 1 if by_head else 2 if has_heads else 1  # heads, or tokens
    logits = (source["logits"], lm.trace(ids[1], only="logits")["logits"])
    measure = _metric(lm, metric, logits)
    values = [_sweep(lm, ids[1], name, source[name], axis, measure) for name in kept]
    strings = [lm.tokenizer.token_string(token) for token in ids[1]]
    columns = [str(n) for n in range(source[kept[0]].shape[1])] if by_head else strings
    return PatchTable(
        torch.stack(values), kept, columns, clean=float(measure(logits[0])),
        corrupted=float(measure(logits[1])), of=f"{names} from the clean run",
    )  # fmt: skip


def _metric(lm: LanguageModel, given: Metric | None, logits: Sequence[Tensor]) -> Measure:
    """A function of logits (1, T, V)."""
    if callable(given):
        return given
    if given is None:
        best, other = (int(each[0, -1].argmax()) for each in logits)
    else:
        best, other = (_token(lm, each) for each in given)
    if best == other:
        raise ValueError(
            f"both tokens are {lm.tokenizer.token_string(best)!r}: give a metric of the logits, or "
            "two tokens whose logits are to be compared"
        )
    return lambda logits: logits[0, -1, best] - logits[0, -1, other]


def _token(lm: LanguageModel, given: str | int) -> int:
    """The id of a token given as id or text."""
    ids = [given] if isinstance(given, int) else lm.tokenizer.encode(given)
    if len(ids) != 1:
        raise ValueError(f"{given!r} is {len(ids)} tokens: give one, with its leading space")
    return ids[0]


def _sweep(
    lm: LanguageModel, ids: list[int], name: str, source: Tensor, axis: int, measure: Measure
) -> Tensor:
    """The metric with one place of one tensor taken from `source` at a time; (places).

    The runs go through the model side by side, each row with a place of its own.
    """
    found = []
    for places in torch.arange(source.shape[axis]).split(_ROWS):

        def take(x: Tensor, places: Tensor = places) -> Tensor:
            for row, place in enumerate(places.tolist()):
                x[row].select(axis - 1, place).copy_(source[0].select(axis - 1, place))
            return x

        with trace(lm.model, "logits", edit={name: take}) as seen:
            lm.model(torch.tensor([ids], device=lm.device).expand(len(places), -1))
        found += [measure(row[None]) for row in seen["logits"]]
    return torch.stack(found).float()


@dataclass(frozen=True)
class Lens:
    """What the residual stream of each layer would say if it were the last.

    names   of the stream: where it enters each layer, and where it leaves the last one
    logits  (points, T, V)
    """

    names: list[str]
    logits: Tensor
    lm: LanguageModel = field(repr=False)

    def top(self, count: int = 1, row: int = -1) -> dict[str, list[tuple[str, float]]]:
        """The likeliest next tokens at a position: by point, (text, probability)."""
        shares = self.logits[:, row].float().softmax(-1).topk(count)
        text = self.lm.tokenizer.token_string
        return {
            name: [(text(id), share) for id, share in zip(ids, values, strict=True)]
            for name, ids, values in zip(
                self.names, shares.indices.tolist(), shares.values.tolist(), strict=True
            )
        }


@torch.no_grad()
def logit_lens(lm: LanguageModel, prompt: Prompt) -> Lens:
    """The final norm and the head on each layer's stream (nostalgebraist, 2020)."""
    last = f"layers.{lm.config.n_layers - 1}.resid_post"
    seen = lm.trace(prompt, only=["layers.*.resid_pre", last])
    return Lens(
        list(seen), torch.cat([lm.model.logits(lm.model.norm(x)) for x in seen.values()]), lm
    )


def steer(name: str, direction: Tensor, scale: float = 1.0) -> dict[str, Edit]:
    """The edit that adds `scale` · `direction` (C) to every token of a tensor, for `edit=`."""

    def add(x: Tensor) -> Tensor:
        return x + scale * direction.to(device=x.device, dtype=x.dtype)

    return {name: add}
