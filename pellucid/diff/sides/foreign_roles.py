"""What a module of B is for, by what it reads and what reads it.

Values say whose weight a module holds. Where the code uses that module for another one of ours,
the weight was put into the wrong place, and what is compared is the place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from pellucid.diff.sides.foreign_layouts import same_values
from pellucid.diff.sides.foreign_weights import Matched, Parts, sum_of_bits
from pellucid.trace import Trace

Call = Mapping[str, Any]
_PRODUCTS = ("linear", "matmul", "addmm", "einsum")
# A norm by the module that reads what it returns, and by the one whose result it is given.
_READ_BY = {
    "attn.q_proj": "attn_norm", "attn.k_proj": "attn_norm", "attn.v_proj": "attn_norm",
    "mlp.gate_proj": "mlp_norm", "mlp.up_proj": "mlp_norm", "unembed": "norm", "embed": "norm",
}  # fmt: skip
_GIVEN_BY = {"attn.o_proj": "attn_out_norm", "mlp.down_proj": "mlp_out_norm"}
_NORMS = {*_READ_BY.values(), *_GIVEN_BY.values()}


def with_copies_read(
    calls: Sequence[Call], seen: Trace, theirs: Mapping[str, Tensor]
) -> tuple[list[Call], dict[str, Tensor]]:
    """The calls, with parameters that reach a product as a copy in another layout among `reads`.

    Also each such parameter as the product read it, (out, in). A copy is known by its values.
    """
    read = {name for call in calls if call["op"] != "module" for name in call["reads"]}
    apart = {name: x for name, x in theirs.items() if x.ndim == 3 and name not in read}
    sizes = {x.numel() for x in apart.values()}
    known = {(x.numel(), sum_of_bits(x, x.dtype)): name for name, x in apart.items()}
    found: list[Call] = []
    as_read: dict[str, Tensor] = {}
    for call in calls:
        width = seen[call["output"]].shape[-1]
        only_bias = all(theirs[name].numel() <= width for name in call["reads"])
        if apart and call["op"] in _PRODUCTS and only_bias:
            for given in call["inputs"]:
                x = seen[given]
                fits = x.ndim == 2 and x.is_floating_point() and x.numel() in sizes
                name = known.get((x.numel(), sum_of_bits(x, x.dtype))) if fits else None
                if name is not None:
                    left = [other for other in call["inputs"] if other != given]
                    call = {**call, "reads": [name, *call["reads"]], "inputs": left}
                    as_read[name] = x if call["op"] == "linear" else x.T
                    break
        found.append(call)
    return found, as_read


def by_use(matched: Matched, calls: Sequence[Call], seen: Trace) -> None:
    """Give norms the place that the code has for them, where their values say another one.

    Only an exchange among the norms that are there is believed: each of them is used for exactly
    one of their places.
    """
    held = {pattern: parts for pattern, parts in matched.parts.items() if _norm_of(parts)}
    votes: dict[str, Counter[str]] = {pattern: Counter() for pattern in held}
    products = [call for call in calls if _module_of(matched, call)]
    for call in calls:
        for name in call["reads"]:
            pattern = matched.place(name).pattern
            if pattern in held and len(call["inputs"]) == 1:
                for use in _uses(matched, call, products, seen):
                    votes[pattern][use] += 1
    used = {pattern: list(counted) for pattern, counted in votes.items()}
    new = {
        pattern: uses[0] if len(uses) == 1 else _norm_of(held[pattern])
        for pattern, uses in used.items()
    }
    kinds = {pattern: pattern.rpartition(".")[2] for pattern in held}
    for pattern, parts in held.items():
        alike = [other for other in held if kinds[other] == kinds[pattern]]
        before = Counter(_norm_of(held[other]) for other in alike)
        if before == Counter(new[other] for other in alike) and max(before.values()) == 1:
            matched.parts[pattern] = (f"{new[pattern]}.{parts[0].rpartition('.')[2]}",)


def _norm_of(parts: Parts) -> str:
    """The norm that a tensor is a parameter of, or ""."""
    stem = parts[0].rpartition(".")[0]
    return stem if len(parts) == 1 and stem in _NORMS else ""


def _module_of(matched: Matched, call: Call) -> str:
    """Our module that a product or an embedding computes, within its block, or ""."""
    parts = [matched.parts.get(matched.place(name).pattern, ()) for name in call["reads"]]
    stems = {part[0].rpartition(".")[0] for part in parts if part}
    return stems.pop() if len(stems) == 1 else ""


def _uses(matched: Matched, norm: Call, products: Sequence[Call], seen: Trace) -> set[str]:
    """Places of ours that a norm has by its neighbours."""
    given, made = seen[norm["inputs"][0]], seen[norm["output"]]
    found = set()
    for call in products:
        module = _module_of(matched, call)
        if module in _READ_BY and call["inputs"]:
            x = seen[call["inputs"][0]]
            if x.shape == made.shape and same_values(x, made):
                found.add(_READ_BY[module])
        elif module in _GIVEN_BY:
            x = seen[call["output"]]
            if x.shape == given.shape and same_values(x, given):
                found.add(_GIVEN_BY[module])
    return found
