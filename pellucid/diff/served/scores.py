"""A's own ln p of the same tokens, and how far rounding to 16 bits moves each of them.

P  pairs of a place and a token      U  places      V  vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pellucid.diff.served.said import Said
from pellucid.edits import Edit
from pellucid.evaluate.scoring import rows_at_once, wide_logits
from pellucid.models import Cache, Config, Model, empty_model, evaluating
from pellucid.models.adapters import folded
from pellucid.models.quantised import FullWeights
from pellucid.trace import trace

FLOOR = 2e-6  # relative error of ln p in float32, softmax over a vocabulary included
_DIGITS = range(1, 7)
Ids = Sequence[Sequence[int]]
# (token ids (N), place of the first that was sampled) -> the stream before the head, (N, C)
Hidden = Callable[[Sequence[int], int], Tensor]
Through = Callable[[Tensor], Tensor]  # what a tensor is after a format that holds less


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is said of several texts, flattened: text, place, token id and ln p, (P) each.

    own  it is the text's own token, not another that was likely there
    """

    texts: Sequence[Said]
    text: Tensor
    place: Tensor
    id: Tensor
    value: Tensor
    own: Tensor

    @classmethod
    def of(cls, texts: Sequence[Said], most: int = 1 << 30) -> Pairs:
        """Of all texts, at most `most` places, text after text."""
        rows, left = [], most
        for number, said in enumerate(texts):
            kept = sorted({place for place, _, _ in said.pairs})[: max(left, 0)]
            left -= len(kept)
            inside = set(kept)
            rows += [
                (number, *pair, pair[1] == said.ids[pair[0]])
                for pair in said.pairs
                if pair[0] in inside
            ]
        text, place, id, value, own = zip(*rows, strict=True) if rows else ((),) * 5
        return cls(
            texts=texts,
            text=torch.tensor(text, dtype=torch.long),
            place=torch.tensor(place, dtype=torch.long),
            id=torch.tensor(id, dtype=torch.long),
            value=torch.tensor(value, dtype=torch.float64),
            own=torch.tensor(own, dtype=torch.bool),
        )

    def written(self) -> Tensor:
        """Whether a pair is of a token that was sampled, (P)."""
        return self.place >= torch.tensor([said.written for said in self.texts])[self.text]


def float32_weights(model: Model) -> dict[str, Tensor]:
    """Parameter name -> tensor in float32; adapters merged, quantised matrices in full."""
    with folded(model):
        held = FullWeights(model)
        return {name: held[name].detach().to("cpu", torch.float32) for name in held}


def build(
    config: Config, weights: Mapping[str, Tensor], dialect: str, dtype: torch.dtype = torch.float32
) -> Model:
    """A model of these weights, which are shared where they have the dtype already."""
    model = empty_model(config, dialect)
    model.load_state_dict({name: x.to(dtype) for name, x in weights.items()}, assign=True)
    return model.eval()


def hidden_by(model: Model, edit: Mapping[str, Edit] | None = None) -> Hidden:
    """The stream before the head, of a text on its own; `edit` as in `trace`."""

    def hidden(ids: Sequence[int], written: int = 0) -> Tensor:
        tokens = torch.tensor([list(ids)])
        if not edit:
            return model.hidden(tokens)[0]
        with trace(model, (), edit=edit, fused=True):
            return model.hidden(tokens)[0]

    return hidden


def hidden_in_steps(model: Model, edit: Mapping[str, Edit], through: Through) -> Hidden:
    """As `hidden_by`, with the prompt computed as it is and its keys and values kept `through`."""

    def hidden(ids: Sequence[int], written: int) -> Tensor:
        if not 0 < written < len(ids):
            return hidden_by(model)(ids, written)
        cache, tokens = Cache(model.config.n_layers), torch.tensor([list(ids)])
        before = model.hidden(tokens[:, :written], cache=cache)[0]
        for layer in cache.layers:
            assert layer.k is not None and layer.v is not None, "a pass fills the cache"
            layer.k, layer.v = through(layer.k), through(layer.v)
        with trace(model, (), edit=edit, fused=True):
            return torch.cat((before, model.hidden(tokens[:, written:], cache=cache)[0]))

    return hidden


def scores(
    model: Model,
    pairs: Pairs,
    *,
    hidden: Hidden | None = None,
    ids: Ids | None = None,
    shifts: Sequence[int] | None = None,
) -> Tensor:
    """ln p of each pair by `model`, (P) in float64; NaN where a place has no token before it.

    ids, shifts  other token ids of each text, and how far its places have moved in them
    """
    found = torch.full((len(pairs.id),), torch.nan, dtype=torch.float64)
    hidden = hidden or hidden_by(model)
    with evaluating(model):
        for number, said in enumerate(pairs.texts):
            own = list(said.ids if ids is None else ids[number])
            here = (pairs.text == number).nonzero()[:, 0]
            places = pairs.place[here] + (shifts[number] if shifts else 0)
            good = (places >= 1) & (places < len(own) + 1)
            here, places = here[good], places[good]
            if not len(here):
                continue
            rows, inverse = torch.unique(places - 1, return_inverse=True)
            moved = shifts[number] if shifts else 0
            stream = hidden(own[: int(rows[-1]) + 1], said.written + moved)[rows]
            found[here] = _logprobs(model, stream, inverse, pairs.id[here])
    return found


def _logprobs(model: Model, stream: Tensor, row: Tensor, id: Tensor) -> Tensor:
    """ln p (P) of tokens `id` in the rows `row` of a stream (U, C)."""
    found, size = torch.empty(len(id), dtype=torch.float64), rows_at_once(model)
    for begin in range(0, len(stream), size):
        here = ((row >= begin) & (row < begin + size)).nonzero()[:, 0]
        table = wide_logits(model, stream[begin : begin + size]).log_softmax(-1)
        found[here] = table[row[here] - begin, id[here]].double()
    return found


def rounding(exact: Model, coarse: Model, pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """ln p by both models, and by how much rounding like `coarse`'s moves each, (P) each.

    Rounding shifts the logits of a place by about as much as `coarse` shifts all of them there. A
    token that is nearly certain keeps its ln p; an unlikely one takes the shift of its own logit.
    """
    first, second, moved = (torch.full_like(pairs.value, torch.nan) for _ in range(3))
    size = rows_at_once(exact)
    with evaluating(exact, coarse):
        for number, said in enumerate(pairs.texts):
            here = (pairs.text == number).nonzero()[:, 0]
            if not len(here):
                continue
            rows, inverse = torch.unique(pairs.place[here] - 1, return_inverse=True)
            ids = list(said.ids)[: int(rows[-1]) + 1]
            streams = [hidden_by(model)(ids, 0)[rows] for model in (exact, coarse)]
            for begin in range(0, len(rows), size):
                inside = ((inverse >= begin) & (inverse < begin + size)).nonzero()[:, 0]
                tables = [
                    wide_logits(model, stream[begin : begin + size])
                    for model, stream in zip((exact, coarse), streams, strict=True)
                ]
                where = here[inside]
                row, id = inverse[inside] - begin, pairs.id[where]
                values = _moved(tables[0], tables[1], row, id)
                first[where], second[where], moved[where] = values
    return first, second, moved


def _moved(exact: Tensor, coarse: Tensor, row: Tensor, id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shift = (coarse - exact).double()
    spread = shift.std(-1)  # (U): a shift of all logits alike changes nothing
    one, two = exact.double().log_softmax(-1), coarse.double().log_softmax(-1)
    shares = one.exp()
    p = shares[row, id]
    others = (shares.square().sum(-1)[row] - p.square()).clamp(min=0)
    return one[row, id], two[row, id], spread[row] * ((1 - p).square() + others).sqrt()


def resolution(values: Tensor) -> Tensor:
    """Half a step of the grid on which all values stand, (P): few decimals, or 16 bits; else 0."""
    finite = values[values.isfinite()]
    for digits in _DIGITS:
        scaled = finite * 10**digits
        if len(finite) >= 4 and bool(((scaled - scaled.round()).abs() < 1e-5).all()):
            return torch.full_like(values, 0.5 / 10**digits)
    for dtype in (torch.bfloat16, torch.float16):
        if len(finite) >= 4 and bool((finite.to(dtype).double() == finite).all()):
            return values.nan_to_num(neginf=0.0).abs() * torch.finfo(dtype).eps / 2
    return torch.zeros_like(values)


def rms(x: Tensor) -> float:
    """Root of the mean square of what is finite; 0 of nothing."""
    kept = x[x.isfinite()]
    return float(kept.square().mean().sqrt()) if len(kept) else 0.0


def room(config: Any, texts: Sequence[Said], label: str) -> None:
    """ValueError for token ids or lengths that A has no place for."""
    for said in texts:
        top = max([*said.ids, *(id for _, id, _ in said.others)], default=0)
        if top >= config.vocab_size:
            raise ValueError(
                f"{label} has token {top}, A's vocabulary ends at {config.vocab_size - 1}: "
                "do they belong together?"
            )
        if config.rope is None and len(said.ids) > config.context_length:
            raise ValueError(
                f"{label} has a text of {len(said.ids)} tokens, A has positions for "
                f"{config.context_length}"
            )
