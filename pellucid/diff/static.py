"""What can be told before anything runs: tokens, weights, constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.diff.gguf_types import declared_type
from pellucid.diff.relayout import Explanation, explain
from pellucid.diff.rounding import moved_alike, rounds_to
from pellucid.diff.sides.side import Side
from pellucid.models.quantised import FullWeights

Kind = Literal["fault", "explained"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One difference: where, what, and whether it is a fault or a declared difference.

    cause  short name of what was done, in the words of the cause table
    """

    stage: str
    name: str
    finding: str
    cause: str
    kind: Kind = "fault"

    def to_json(self) -> dict[str, str]:
        """The schema's three fields, and the cause."""
        return {
            "stage": self.stage,
            "name": self.name,
            "finding": self.finding,
            "cause": self.cause,
            "kind": self.kind,
        }


def token_findings(ids_a: Sequence[int], ids_b: Sequence[int], a: Side, b: Side) -> list[Finding]:
    """Exact comparison of two encodings of one prompt, and what was done differently."""
    if list(ids_a) == list(ids_b):
        return []
    found, cause = _token_difference(list(ids_a), list(ids_b), a, b)
    return [Finding(stage="tokens", name="tokens", finding=found, cause=cause)]


def _token_difference(ids_a: list[int], ids_b: list[int], a: Side, b: Side) -> tuple[str, str]:
    bos = a.bos_id if a.bos_id is not None else b.bos_id
    if bos is not None:
        if ids_b == [bos, *ids_a] and ids_a[:1] == [bos]:
            return f"B begins with BOS ({bos}) twice", "BOS doubled"
        if [bos, *ids_b] == ids_a:
            return f"B begins without BOS ({bos})", "BOS missing"
        if ids_b == [bos, *ids_a]:
            return f"B begins with BOS ({bos}), A without", "BOS added"
    place = next(
        (i for i, (x, y) in enumerate(zip(ids_a, ids_b, strict=False)) if x != y),
        min(len(ids_a), len(ids_b)),
    )
    here_a = ids_a[place] if place < len(ids_a) else "the end"
    here_b = ids_b[place] if place < len(ids_b) else "the end"
    where = f"token {place}: A has {here_a}, B has {here_b} ({len(ids_a)} against {len(ids_b)})"
    special = set((a.specials or {}).values()) | set((b.specials or {}).values())
    changed = [(x, y) for x, y in zip(ids_a, ids_b, strict=False) if x != y]
    if len(ids_a) == len(ids_b) and all(x in special or y in special for x, y in changed):
        return f"{where}; only special tokens differ", "other special-token table"
    return where, "other splitting of the text"


# No part of the arithmetic of a pass: a Mistral without a window is a Llama by another name, and a
# padded vocabulary is a matter of weights.
_NO_ARITHMETIC = ("family", "vocab_size", "context_length")


def constant_findings(a: Side, b: Side, seen: int | None = None) -> Iterator[Finding]:
    """Fields of the two configs that differ, the ones inside RoPE by their own names.

    seen  tokens of the longest row of the run: a window as wide hides nothing of it, and is no
          fault of this run (None: of any run)
    """
    if a.config is None or b.config is None:
        return
    if (a.config.rope is None) != (b.config.rope is None):  # no position has a name in both
        raise ValueError(
            f"{a.label} is a {a.config.family}, {b.label} a {b.config.family}: "
            "a diff needs two implementations of one model"
        )
    for name, mine, theirs in _differing(a.config, b.config):
        if name in _NO_ARITHMETIC or name.endswith("dropout"):
            continue
        wide = name in ("window", "layers") and _hides_nothing(a.config, b.config, seen)
        yield Finding(
            stage="constants",
            name=name,
            finding=f"A has {mine}, B has {theirs}{'; wider than this text' if wide else ''}",
            cause=_constant_cause(name, mine, theirs),
            kind="explained" if wide else "fault",
        )


def _hides_nothing(a: Any, b: Any, seen: int | None) -> bool:
    """Whether layers differ in their windows alone, all at least as wide as the text."""
    kinds = [[kind._replace(window=False) for kind in config.kinds] for config in (a, b)]
    wide = all(not config.window or config.window >= (seen or 1 << 62) for config in (a, b))
    return wide and kinds[0] == kinds[1]


def _constant_cause(name: str, mine: Any, theirs: Any) -> str:
    if name == "rope.type":
        return "RoPE scaling missing" if theirs == "default" else "RoPE scaling type"
    if name == "activation" and "gelu" in mine and "gelu" in theirs:
        return "GELU form"
    known = {
        "norm_eps": "norm eps",
        "rope.theta": "RoPE theta",
        "rope.factor": "RoPE scaling factor",
        "rope.original_context": "RoPE original context",
        "rope.low_freq_factor": "RoPE low_freq_factor",
        "rope.high_freq_factor": "RoPE high_freq_factor",
        "activation": "activation",
    }
    return known.get(name, f"other {name}")


def _differing(a: Any, b: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for field in fields(a):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        if mine == theirs:
            continue
        if hasattr(mine, "__dataclass_fields__"):
            yield from _differing(mine, theirs, f"{field.name}.")
        else:
            yield f"{prefix}{field.name}", mine, theirs


def shape_mismatch(a: Side, b: Side) -> str | None:
    """Why two configs cannot be one model, with both numbers, or None."""
    if a.config is None or b.config is None:
        return None
    for name in ("n_layers", "width", "n_heads", "n_kv_heads", "head_dim", "hidden_width"):
        mine, theirs = getattr(a.config, name), getattr(b.config, name)
        if mine != theirs:
            return (
                f"{a.label} has {name} {mine}, {b.label} {theirs}: "
                "a diff needs two implementations of one model"
            )
    return None


def weight_findings(a: Side, b: Side) -> list[Finding]:
    """Every parameter of A against B's of the same name, exactly; a difference is explained, by
    its own values and then by those of the other tensors."""
    found = list(_one_by_one(a, b))
    if a.weights is None or b.weights is None or not found:
        return found
    return trained_further(rounded_as_the_rest(found, a.weights, b.weights), a.weights, b.weights)


def _one_by_one(a: Side, b: Side) -> Iterator[Finding]:
    mine, theirs = a.weights, b.weights
    if mine is None or theirs is None:
        return
    for name in mine:
        if name not in theirs:
            yield from _absent(name, mine, theirs)
            continue
        if not same(mine[name], theirs[name]):
            known = _declared_levels(mine, theirs, name)
            known = known or _declared_type(name, a, b, mine[name], theirs[name])
            cause, finding, kind = known or explain(name, mine, theirs, a.config)
            yield Finding(stage="weights", name=name, finding=finding, cause=cause, kind=kind)
    for name in theirs:
        if name not in mine:
            yield from _extra(name, mine, theirs)


def _declared_type(name: str, a: Side, b: Side, x: Tensor, y: Tensor) -> Explanation | None:
    """What the GGUF type that B's file declares says of A's x and B's y."""
    kind = b.types.get(name, "")
    if not kind or b.blocks is None or x.ndim != 2:
        return None
    return declared_type(x, y, kind, _turned_width(name, a), b.blocks(name))


def _turned_width(name: str, a: Side) -> int:
    """Head width of a weight whose rows RoPE turns; 0 for the others."""
    turned = name.endswith(("attn.q_proj.weight", "attn.k_proj.weight"))
    return a.config.head_dim if turned and a.config is not None and a.config.rope else 0


def rounded_as_the_rest(
    found: Sequence[Finding], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> list[Finding]:
    """The findings, those of vectors explained where most matrices prove that A is B rounded.

    The values of a norm may all be near 1, between two or three numbers of a 16-bit type: too few
    roundings to tell anything. What the matrices say of the model then holds for such a vector
    too, if its own values round to A's and are not A's moved by one factor or one amount.
    """
    explained = {f.name for f in found if f.cause in ("other dtype", "rounded weights")}
    matrices = [name for name in a if name in b and a[name].ndim == 2]
    proven = [
        name
        for name in matrices
        if name in explained and rounds_to(b[name][:1], a[name][:1]) and a[name].shape[1] > 1
        and not torch.equal(b[name][:1], a[name][:1].to(b[name].dtype))
    ]  # fmt: skip
    if 2 * len(proven) <= len(matrices):
        return list(found)
    told = []
    for finding in found:
        name = finding.name
        if finding.stage == "weights" and finding.kind == "fault" and name in a and name in b:
            x, y = a[name], b[name]
            if x.ndim == 1 and rounds_to(y, x) and not moved_alike(y, x):
                said = (
                    f"A's values are B's rounded, as in {len(proven)} of {len(matrices)} matrices"
                )
                finding = replace(finding, cause="rounded weights", finding=said, kind="explained")
        told.append(finding)
    return told


def trained_further(
    found: Sequence[Finding], a: Mapping[str, Tensor], b: Mapping[str, Tensor]
) -> list[Finding]:
    """The findings, with one name for all changes without structure where they are everywhere.

    Another checkpoint of the same training differs in most matrices, by relative sizes of one
    order; each finding keeps the size of its tensor.
    """
    loose = [f for f in found if f.stage == "weights" and f.cause in ("noise", "other weights")]
    if not loose:
        return list(found)
    matrices = [name for name in a if name in b and a[name].ndim == 2]
    wide = [f.name for f in loose if f.name in matrices]
    if len(matrices) < 4 or len(wide) < 0.8 * len(matrices):
        return list(found)
    sizes = sorted(_relative(a[name], b[name]) for name in wide)
    middle = sizes[len(sizes) // 2]
    near = sum(middle / 30 < size < middle * 30 for size in sizes)
    if middle > 1 or near < 0.9 * len(sizes):
        return list(found)
    cause = "another checkpoint of the same training"
    span = f"matrices differ by {sizes[0]:.2g} to {sizes[-1]:.2g} of their size"
    named, first = [], loose[0]
    for finding in found:
        if any(finding is one for one in loose):
            words = f"{span}, without structure; here {finding.finding}"
            finding = replace(
                finding, cause=cause, finding=words if finding is first else finding.finding
            )
        named.append(finding)
    return named


def _relative(x: Tensor, y: Tensor) -> float:
    """Relative RMS difference, in float32: a size to tell, not to judge by."""
    wide = x.float()
    return float((y.float() - wide).norm() / wide.norm().clamp(min=1e-30))


def _declared_levels(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str
) -> Explanation | None:
    """Whether the levels of a side that declares them are the other's numbers rounded."""
    for side, held, other in (("B", theirs, mine), ("A", mine, theirs)):
        matrix = held.quantised(name) if isinstance(held, FullWeights) else None
        if matrix is None or other[name].shape != (matrix.rows, matrix.columns):
            continue
        source = "BA"[side == "B"]
        wrong, group = matrix.misfits(other[name]), matrix.group
        if not wrong.any():
            finding = f"{side}'s values are {source}'s in int{matrix.bits} in groups of {group}"
            finding += ", fitted to a text's inputs" if matrix.fitted else ""
            return "quantised weights", finding, "explained"
        if side == "A" or wrong.float().mean() > 0.5:
            continue  # another tensor, or another order: for the search to say
        row, place = wrong.nonzero()[0].tolist()
        finding = (
            f"int{matrix.bits} in groups of {group}, but {int(wrong.sum())} group(s) are not A's "
            f"numbers rounded; the first at [{row}, {place * group}:{(place + 1) * group}]"
        )
        return "quantised group with a wrong zero point", finding, "fault"
    return None


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal in shape, dtype and values; one NaN equals another."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if _same_bits(a, b):
        return True
    if torch.equal(a, b):
        return True
    broken = a.isnan()
    return bool(
        broken.any() and torch.equal(broken, b.isnan()) and torch.equal(a[~broken], b[~broken])
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compared eight bytes at a time, five times as fast as value by value."""
    if not (a.is_contiguous() and b.is_contiguous()) or a.numel() * a.itemsize % 8 or not a.numel():
        return False
    x, y = (tensor.view(-1) for tensor in (a, b))
    try:
        return torch.equal(x.view(torch.int64), y.view(torch.int64))
    except RuntimeError:
        return False  # a view that does not begin at a multiple of eight bytes


def _absent(
    name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Iterator[Finding]:
    if name == "unembed.weight" and same(mine[name], theirs["embed.weight"]):
        return  # tied on one side, stored twice on the other: the same model
    if name.endswith("bias") and not mine[name].any():
        return  # a bias of zeros that the other side leaves out
    cause = (
        "head tied"
        if name == "unembed.weight"
        else ("missing bias" if name.endswith("bias") else "missing tensor")
    )
    yield Finding(stage="weights", name=name, finding="B has no such tensor", cause=cause)


def _extra(
    name: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]
) -> Iterator[Finding]:
    if name == "unembed.weight" and same(theirs[name], mine["embed.weight"]):
        return
    if name.endswith("bias") and not theirs[name].any():
        return
    cause = "head untied" if name == "unembed.weight" else "extra tensor"
    finding = "A ties the head to the embedding, B has another one"
    if name != "unembed.weight":
        finding = "A has no such tensor"
    yield Finding(stage="weights", name=name, finding=finding, cause=cause)
