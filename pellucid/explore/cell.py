"""One number under the microscope: its bits, its operands, its largest terms, its rounding.

cell(run, "layers.3.attn.scores[5,7,3]").to_json()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pellucid import names
from pellucid.explore.arithmetic import KINDS, Element, Sum

if TYPE_CHECKING:
    from pellucid.explore.runs import ExploredRun

SHOWN = 8  # terms
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of a run and how it comes about.

    value     as the run has it; `bits` and `shortest` say it exactly
    sum       terms and what is made of them (`arithmetic`)
    exact     the same from the same operands in float64
    ulps      (value − exact) in units of the last place of its dtype; None where there is none
    edited    whether the run changes this tensor: then the arithmetic does not explain it
    """

    address: str
    value: float
    bits: str
    shortest: str
    operation: str
    sum: Sum
    exact: float
    ulps: float | None
    inputs: Sequence[str]
    weights: Sequence[str]
    edited: bool
    python: str

    def to_json(self) -> dict[str, Any]:
        """The largest terms, and the rest as a count and a sum."""
        products = self.sum.terms
        order = np.argsort(-np.abs(products), kind="stable")[:SHOWN]
        rest = np.delete(products, order)
        a, b = self.sum.a, self.sum.b
        terms = [
            {
                "what": self.sum.label(int(i)),
                "factors": [float(a[i]), float(b[i])],
                "product": float(products[i]),
            }
            for i in order
        ]
        return {
            "address": self.address,
            "value": self.value,
            "bits": self.bits,
            "shortest": self.shortest,
            "operation": self.operation,
            "formula": self.sum.formula,
            "how": self.sum.how,
            "terms": terms,
            "rest": {"count": len(rest), "sum": math.fsum(rest)},
            "sum": math.fsum(products),
            "then": [{"what": what, "value": value} for what, value in self.sum.then],
            "facts": dict(self.sum.facts),
            "float64": self.exact,
            "ulps": self.ulps,
            "inputs": list(self.inputs),
            "weights": list(self.weights),
            "edited": self.edited,
            "python": self.python,
        }


def cell(run: ExploredRun, address: str) -> Cell:
    """The number at an address with a whole index, ``name[5,7,3]``, and its arithmetic.

    Raises KeyError, IndexError or ValueError, in one line, for what is no element of the run.
    """
    name, index = names.parse(address)
    found = run[address]
    shape = run.shape(name)
    if found.ndim or len(index) != len(shape):
        raise ValueError(
            f"{address}: a cell is one number; {name} has the shape {list(shape)}, so give "
            f"{len(shape)} whole numbers"
        )
    whole = [place for place in index if isinstance(place, int)]
    places = [range(size)[place] for size, place in zip(shape, whole, strict=True)]
    where = Element(run, name, places)
    made = KINDS[where.leaf](where)
    exact_in = run.loaded.lm.dtype if where.leaf == "logits" else found.dtype
    address = f"{name}[{','.join(map(str, places))}]"
    return Cell(
        address=address,
        value=float(found),
        bits=bits_of(found),
        shortest=shortest(found),
        operation=run.loaded.leaf_of(name).sentence,
        sum=made,
        exact=made.exact,
        ulps=ulps(float(found), made.exact, exact_in),
        inputs=where.inputs,
        weights=where.weights,
        edited=any(edit.name == name for edit in run.edits),
        python=_python(run, where, address, made),
    )


def _python(run: ExploredRun, where: Element, address: str, made: Sum) -> str:
    only = [where.name, *dict.fromkeys(names.parse(read)[0] for read in where.inputs)]
    return "\n".join(
        [
            "import math, torch",
            run.python(only=only),
            *where.lines,
            f'value = seen["{address}"]',
            f"exact = {made.python}",
        ]
    )


def bits_of(number: Tensor) -> str:
    """A number's bits, as hexadecimal."""
    number = number.detach().cpu().reshape(1)
    raw = number.view(torch.uint8).numpy()
    return f"0x{int(raw.view(_UNSIGNED[len(raw)])[0]):0{2 * len(raw)}x}"


def shortest(number: Tensor) -> str:
    """The shortest decimal number that is this one in its dtype."""
    if not number.is_floating_point():
        return str(number.item())
    value = float(number)
    if not math.isfinite(value):
        return str(value)
    for digits in range(1, 18):
        text = f"{value:.{digits}g}"
        if float(torch.tensor(float(text), dtype=torch.float64).to(number.dtype)) == value:
            return text
    return repr(value)


def ulps(value: float, exact: float, dtype: torch.dtype) -> float | None:
    """How far a value is from an exact one, in units of the last place of its dtype there.

    0 where both are the same infinity; None where one is no finite number, or the dtype has no ulp.
    """
    if value == exact:
        return 0.0
    if not dtype.is_floating_point or not (math.isfinite(value) and math.isfinite(exact)):
        return None
    about = torch.finfo(dtype)
    size = max(abs(exact), about.tiny)
    return (value - exact) / (about.eps * 2.0 ** math.floor(math.log2(size)))
