"""Which tensor carries what: patching one run with another, the logit lens, steering.

    pellucid.patch(lm, clean, corrupted, metric=(" Mary", " John"))
    pellucid.logit_lens(lm, prompt).top(3)
    lm.generate(prompt, edit=pellucid.steer("layers.4.resid_post", direction, 6))
    pellucid.direct_logit_attribution(lm, prompt, " Mary", against=" John").top(5)
    pellucid.head_jobs(lm, [(prompt, " Mary", " John")]).strongest()

Each is a few lines over `lm.trace` and its edits, so that what it computes can be read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from pellucid import graph
from pellucid.edits import Edit
from pellucid.evaluate.heads import head_scores, strongest
from pellucid.explore.attribution import contributions
from pellucid.explore.runs import ExploredRun, Runs
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

    def __repr__(self) -> str:
        points, tokens, _ = self.logits.shape
        return f"Lens({points} points, {tokens} tokens; .top(3): the likeliest next tokens at each)"

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


@dataclass(frozen=True)
class Attribution:
    """The parts that add up to a logit, or to the difference of two.

    names   "embedding", ``layers.L.attn.head.H``, ``layers.L.mlp``, biases
    values  (parts), float64
    total   the logit, or the difference, that the model computed
    """

    names: list[str]
    values: Tensor
    total: float
    of: str

    def top(self, count: int = 5) -> dict[str, float]:
        """The parts that count most, whichever their sign."""
        order = self.values.abs().topk(min(count, len(self.names))).indices.tolist()
        return {self.names[part]: float(self.values[part]) for part in order}

    @property
    def heads(self) -> Tensor:
        """What each head adds, (layers, heads)."""
        heads = [place for place, name in enumerate(self.names) if ".head." in name]
        layers = len({layer_of(self.names[place]) for place in heads})
        return self.values[heads].unflatten(0, (layers, -1))

    def __repr__(self) -> str:
        return f"Attribution({self.of}: {len(self.names)} parts, together {self.total:.4g})"

    def __str__(self) -> str:
        lines = [f"  {name:<22}{value:>8.3f}" for name, value in self.top(10).items()]
        return "\n".join([repr(self), *lines])


def direct_logit_attribution(
    lm: LanguageModel,
    prompt: Prompt,
    token: str | int | None = None,
    against: str | int | None = None,
    row: int = -1,
) -> Attribution:
    """What each head, each MLP, the embedding and the biases add to a token's logit at a row.

    token    text of one token, or its id; None: the likeliest
    against  the parts of ``logit of token − logit of against`` instead

    The final norm's size is held fixed, so that the parts add up (Elhage et al., 2021; as
    TransformerLens's ``cache.stack_head_results`` with ``apply_ln``); a cap on logits is left out.
    Raises ValueError for a text that is not one token, IndexError for a row the prompt has not.
    """
    run = _run(lm, prompt)
    row = range(len(run.ids))[row]
    token = int(run.logits(row).argmax()) if token is None else _token(lm, token)
    first = _last(contributions(run, row, token))
    values = torch.tensor([part["value"] for part in first["parts"]], dtype=torch.float64)
    total, of = first["logit"], f"logit of {lm.tokenizer.token_string(token)!r}"
    if against is not None:
        other = _token(lm, against)
        second = _last(contributions(run, row, other))
        values = values - torch.tensor([part["value"] for part in second["parts"]])
        total, of = total - second["logit"], f"{of} − {lm.tokenizer.token_string(other)!r}"
    return Attribution([part["name"] for part in first["parts"]], values, total, of)


def _run(lm: LanguageModel, prompt: Prompt) -> ExploredRun:
    return Runs({lm.name: lm}).run(lm.name, prompt)


def _last(steps: Iterator[Any]) -> Any:
    """The answer of work that goes layer by layer."""
    *_, answer = steps
    return answer


@dataclass(frozen=True, kw_only=True)
class HeadJobs:
    """What heads do, a number for each: all (layers, heads).

    previous    mean attention to the token before, on random tokens that are repeated
    induction   mean attention to what followed a token's first occurrence, on the same
    name_mover  mean of what the head adds to ``logit of answer − logit of the other name``
    to_answer   mean attention from the last token to the answer's place in the prompt

    A name mover (Wang et al., 2022) has both of the last two; they are None without prompts.
    """

    previous: Tensor
    induction: Tensor
    name_mover: Tensor | None = None
    to_answer: Tensor | None = None

    def strongest(self) -> dict[str, tuple[int, int, float]]:
        """Of each job the head that does it most: (layer, head, its number)."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            name: (*strongest(scores), float(scores.max()))
            for name, scores in found.items()
            if scores is not None
        }


def head_jobs(lm: LanguageModel, prompts: Sequence[tuple[str, str, str]] = ()) -> HeadJobs:
    """Previous-token, induction and name-mover scores of every head.

    prompts  (prompt, answer, other) each: two names stand in the prompt, the answer comes next, as
             in ("When Mary and John went to the store, John gave a drink to", " Mary", " John")

    Raises ValueError where an answer is not one token, or does not stand in its prompt.
    """
    length = min(64, (lm.config.context_length - 1) // 2)
    begin = [token for token in (lm.tokenizer.bos_id, lm.tokenizer.eos_id) if token is not None]
    scores = head_scores(lm.model, begin=begin[:1], length=length)
    moved, looked = [], []
    for prompt, answer, other in prompts:
        run = _run(lm, prompt)
        name = _token(lm, answer)
        if name not in run.ids:
            raise ValueError(f"the answer {answer!r} does not stand in {prompt!r}")
        place = len(run.ids) - 1 - run.ids[::-1].index(name)
        moved.append(direct_logit_attribution(lm, prompt, name, other).heads)
        patterns = [run[f"layers.{layer}.attn.pattern"] for layer in range(lm.config.n_layers)]
        looked.append(torch.stack([pattern[0, :, -1, place] for pattern in patterns]).float())
    return HeadJobs(
        previous=scores.previous,
        induction=scores.induction,
        name_mover=torch.stack(moved).mean(0) if moved else None,
        to_answer=torch.stack(looked).mean(0) if looked else None,
    )
