"""A served model against the weights: within rounding, or where it begins and what fits.

The unit is A's own: what computing in bfloat16 instead of float32 does to ln p of the same tokens.
For each token it is told apart from the others (`scores.rounding`): a token that is nearly certain
hardly moves, an unlikely one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pellucid.diff.replay.statistics import SLICE_FACTOR, TENSOR_FACTOR, Measure
from pellucid.diff.report import Fault, Report, SideFacts, TensorVerdict, finite
from pellucid.diff.served.ask import LENGTH, ask
from pellucid.diff.served.logs import read_logs
from pellucid.diff.served.places import other_prompts
from pellucid.diff.served.said import Said
from pellucid.diff.served.scores import (
    FLOOR,
    Pairs,
    float32_weights,
    resolution,
    rms,
    room,
    rounding,
)
from pellucid.diff.served.search import Search, find_cause
from pellucid.diff.served.variants import Base
from pellucid.diff.sides.side import Side
from pellucid.diff.static import Finding, token_findings
from pellucid.language_model import LanguageModel, load
from pellucid.models import Decoder, Model
from pellucid.tokenizers import Tokenizer

NAME = "logits"  # what ln p is made of, in the vocabulary
_WINDOW = 16  # tokens: a stretch over which a gap may rise slowly
_EXACT = 0.02  # of the unit: below, B computes in float32 as A does
_FEW = 8  # tokens: of fewer no mean is shown


def is_served(source: Any) -> bool:
    """Whether a side is a server's URL or a file of tokens with log-probabilities (.jsonl)."""
    if not isinstance(source, str | Path):
        return False
    text = str(source)
    return text.startswith(("http://", "https://")) or text.endswith(".jsonl")


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """ln p by B minus ln p by A, in nats.

    texts, tokens, sampled  how many, and how many tokens were sampled
    unit                    RMS of A's own gap, bfloat16 against float32, on the same tokens
    rms, most               of B's gap
    kl                      KL(B ‖ A) in nats a token, estimated from the tokens sampled (Schulman's
                            k3: r − 1 − ln r with r = p_A / p_B); None where there are few
    ratios                  smallest and largest p_A / p_B of a sampled token
    rows                    (text, place, token, text of the token, ln p by A, by B, unit there)
    """

    texts: int
    tokens: int
    sampled: int
    unit: float
    rms: float
    most: float
    kl: float | None
    ratios: tuple[float, float] | None
    rows: tuple[tuple[int, int, int, str, float, float, float], ...]

    def to_json(self) -> dict[str, Any]:
        """All fields; a row is an object."""
        names = ("text", "place", "token", "token_text", "logprob_a", "logprob_b", "unit")
        rows = [
            {name: finite(x) if isinstance(x, float) else x
             for name, x in zip(names, row, strict=True)}
            for row in self.rows
        ]  # fmt: skip
        whole = {k: finite(v) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**whole, "rows": rows}


@dataclass(kw_only=True, repr=False)
class ServedReport(Report):
    """A report whose one observed tensor is the logits, through ln p of tokens."""

    gaps: Gaps
    tried: tuple[Any, ...] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """As every report, and `served`: the gaps, and all that was tried."""
        tried = [trial.to_json() for trial in self.tried]
        said = {**super().to_json(), "dtypes": ["float32", None]}
        return {**said, "served": {**self.gaps.to_json(), "tried": tried}}


def diff_served(
    a: Any,
    b: str | Path,
    prompt: Any,
    *,
    steps: int = 0,
    dialect: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> ServedReport:
    """Hold ln p of tokens that a server or a sampler gave against A's own.

    a       a LanguageModel, one of our models, or a path: the weights
    b       a URL of OpenAI's API, or a file of JSON lines
    prompt  text, token ids, or a conversation; a file brings its own
    steps   tokens to sample after the prompt (0: 32)

    ValueError, in one line, where nothing can be compared.
    """
    if is_served(a):
        raise ValueError(f"{a}: A is the model that is trusted; give the weights as A, this as B")
    lm = load(a, dialect=dialect) if isinstance(a, str | Path) else a
    if not isinstance(lm, LanguageModel | Decoder):
        raise ValueError(f"A is a {type(a).__name__}: expected one of Pellucid's models or a path")
    model: Model = lm.model if isinstance(lm, LanguageModel) else lm
    tokenizer = lm.tokenizer if isinstance(lm, LanguageModel) else None
    name = lm.name if isinstance(lm, LanguageModel) else f"A ({model.config.family})"
    progress = progress or (lambda stage: None)
    progress("asking B")
    static: list[Finding] = []
    if str(b).endswith(".jsonl"):
        texts, notes = read_logs(b, tokenizer)
        label = str(b)
    else:
        encode = _encoder(lm)
        server, said, ids = ask(str(b), prompt, encode, tokenizer, steps or LENGTH)
        texts, notes, label = [said], server.notes, server.label
        static = _token_findings(said, ids, tokenizer)
        if said.counted not in (None, said.written) and not static:
            notes.append(f"B counts {said.counted} tokens of the prompt, A {said.written}")
    room(model.config, texts, label)
    base = Base(config=model.config, weights=float32_weights(model), dialect=model.dialect.name)
    report = judge(base, texts, tokenizer, progress)
    report.a, report.b, report.static = name, label, static
    report.sides = _facts(name, model, base), _no_facts(label)
    report.note = "; ".join(note for note in (*notes, report.note) if note)
    report.encoded = not static and not str(b).endswith(".jsonl")
    return report


def _encoder(lm: LanguageModel | Model) -> Callable[[Any, bool], list[int]]:
    def encode(prompt: Any, chat: bool) -> list[int]:
        if not chat and not isinstance(prompt, str):
            return [int(id) for id in prompt]
        if not isinstance(lm, LanguageModel):
            raise ValueError("A has no tokenizer: give token ids")
        if not chat:
            return lm.encode(prompt)
        if lm.tokenizer.chat is None:
            raise ValueError(
                f"{lm.name} has no chat format (it was not trained on conversations): ask "
                "…/v1/completions"
            )
        return lm.tokenizer.chat.encode(list(cast(Any, prompt)))

    return encode


def _token_findings(said: Said, ids: list[int], tokenizer: Tokenizer | None) -> list[Finding]:
    """What B did differently with the prompt, where it says which tokens it has."""
    theirs = said.ids[: said.written]
    if theirs == ids:
        return []
    own = replace(said, ids=[*ids, *said.ids[said.written :]], written=len(ids))
    for moved in other_prompts([own], tokenizer):
        if moved.ids[0] == said.ids:
            found = f"B has {len(theirs)} tokens, A {len(ids)}: {moved.evidence}"
            return [Finding(stage="tokens", name="tokens", finding=found, cause=moved.cause)]
    bos, specials = (tokenizer.bos_id, tokenizer.specials) if tokenizer else (None, None)
    side = Side(label="", dtype=torch.float32, bos_id=bos, specials=specials)
    found = token_findings(ids, theirs, side, side)
    if said.messages and found[0].cause.startswith("other splitting"):
        return [replace(found[0], cause="chat template")]
    return found


def judge(
    base: Base,
    texts: Sequence[Said],
    tokenizer: Tokenizer | None = None,
    progress: Callable[[str], None] | None = None,
) -> ServedReport:
    """The verdict on what is said of texts; ValueError where nothing is."""
    pairs = Pairs.of(texts)
    if not len(pairs.id):
        raise ValueError("nothing is said of any token but the first: give longer texts")
    progress = progress or (lambda stage: None)
    progress("computing A")
    exact_model, coarse_model = base.built(), base.built(dtype=torch.bfloat16)
    exact, coarse, moved = rounding(exact_model, coarse_model, pairs)
    if not exact.isfinite().all():
        raise ValueError("A's own log-probabilities are not finite: its weights are damaged")
    scale = moved + FLOOR * (1 + exact.abs()) + resolution(pairs.value)
    size = max(rms((coarse - exact) / scale), 0.5)
    z = _relative(pairs.value - exact, scale) / size
    worst = max(rms(z) / TENSOR_FACTOR, float(z.abs().max()) / SLICE_FACTOR)
    search = Search(base, texts, tokenizer, size, _began(pairs, z)[1] if worst > 1 else 0, progress)
    cause, tried, benign = None, (), ""
    if worst > 1 or rms(z) > _EXACT:
        order = sorted(range(len(texts)), key=lambda n: -_size_of(z[pairs.text == n]))
        cause, tried, benign = find_cause(search, exact_model, coarse_model, order, worst > 1)
    verdict = (
        "diverged" if worst > 1 or cause else "identical" if not z.any() else "within-rounding"
    )
    gaps = _gaps(pairs, exact, coarse, scale * size, tokenizer)
    place = _where(pairs, z, texts) if verdict == "diverged" else ""
    measure = Measure(
        verdict=verdict, error_a=gaps.unit, error_b=gaps.rms, ratio=worst, where=place
    )
    fault = Fault(name=NAME, side="b", measure=measure, cause=cause, tried=tried)
    return ServedReport(
        a="",
        b="",
        dtypes=(torch.float32, torch.float32),
        tokens=[list(said.ids) for said in texts],
        tensors=[TensorVerdict(name=NAME, measure=measure)],
        faults=[fault] if verdict == "diverged" else [],
        gaps=gaps,
        tried=tried,
        note=benign,
    )


def _relative(gap: Tensor, scale: Tensor) -> Tensor:
    """Gaps in units of rounding; what B rules out and A does not is as far as can be."""
    return (gap / scale).nan_to_num(nan=0.0, posinf=1e6, neginf=-1e6).clamp(-1e6, 1e6)


def _size_of(z: Tensor) -> float:
    return rms(z) if len(z) else 0.0


def _began(pairs: Pairs, z: Tensor) -> tuple[int, int]:
    """(text, place) from which on B is off: the first token, or the first stretch, or the worst."""
    own = pairs.own.nonzero()[:, 0]
    off = own[z[own].abs() > SLICE_FACTOR]
    if not len(off):
        stretches = (
            z[own].unfold(0, _WINDOW, 1).square().mean(-1).sqrt() if len(own) >= _WINDOW else z[:0]
        )
        high = (stretches > TENSOR_FACTOR).nonzero()[:, 0]
        if len(high):
            inside = own[int(high[0]) : int(high[0]) + _WINDOW]
            off = inside[z[inside].abs() > TENSOR_FACTOR]
    at = int(off[0]) if len(off) else int(own[z[own].abs().argmax()]) if len(own) else 0
    return int(pairs.text[at]), int(pairs.place[at])


def _where(pairs: Pairs, z: Tensor, texts: Sequence[Said]) -> str:
    text, place = _began(pairs, z)
    said = f"token {place}" + (", sampled" if place >= texts[text].written else ", of the prompt")
    return said if len(texts) == 1 else f"text {text}, {said}"


def _gaps(
    pairs: Pairs, exact: Tensor, coarse: Tensor, unit: Tensor, tokenizer: Tokenizer | None
) -> Gaps:
    own, gap = pairs.own, pairs.value - exact
    sampled = own & pairs.written()
    steps = gap[sampled & gap.isfinite()]
    many = len(steps) >= _FEW
    rows = tuple(
        (text, place, id, _shown(tokenizer, id), mine, theirs, size)
        for text, place, id, mine, theirs, size in zip(
            *(
                x[own].tolist()
                for x in (pairs.text, pairs.place, pairs.id, exact, pairs.value, unit)
            ),
            strict=True,
        )
    )
    return Gaps(
        texts=len(pairs.texts),
        tokens=int(own.sum()),
        sampled=int(sampled.sum()),
        unit=rms((coarse - exact)[own] if own.any() else coarse - exact),
        rms=rms(gap[own] if own.any() else gap),
        most=float(gap.abs().max()),
        kl=float(((-steps).exp() - 1 + steps).mean()) if many else None,
        ratios=(float((-steps).exp().min()), float((-steps).exp().max())) if many else None,
        rows=rows,
    )


def _shown(tokenizer: Tokenizer | None, id: int) -> str:
    return (
        ""
        if tokenizer is None or id >= tokenizer.vocab_size or id in tokenizer.unused_ids
        else (tokenizer.token_string(id))
    )


def _facts(name: str, model: Model, base: Base) -> SideFacts:
    config = model.config
    return SideFacts(
        label=name,
        dtype="float32",
        dialect=None,
        family=config.family,
        n_layers=config.n_layers,
        width=config.width,
        parameters=len(base.weights),
        recorded=False,
        explained="",
    )


def _no_facts(label: str) -> SideFacts:
    nothing: Mapping[str, Any] = dict.fromkeys(
        ("dialect", "family", "n_layers", "width", "parameters")
    )
    return SideFacts(label=label, dtype="", recorded=False, explained="", **nothing)
