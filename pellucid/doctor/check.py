"""One thing that was examined, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

State = Literal["right", "wrong", "note", "absent"]


@dataclass(frozen=True)
class MachineCheck:
    """What was examined and what was found.

    state    right; wrong: results cannot be relied on; note: slower or less than it could be;
             absent: there is nothing to examine
    error    largest error as a share of what rounding may cause: up to 1 is right; None: no number
    seconds  that the check took
    """

    name: str
    state: State
    found: str
    error: float | None = None
    seconds: float = 0.0


def compared(name: str, pairs: list[tuple[Tensor, Tensor, Tensor]]) -> MachineCheck:
    """A check of numbers: each pair is what was computed, the exact values, the error allowed.

    What is not finite is wrong, whatever is allowed.
    """
    worst = 0.0
    for computed, exact, allowed in pairs:
        share = (computed.double().cpu() - exact).abs() / (allowed.double() + 1e-300)
        worst = max(worst, float(torch.nan_to_num(share, nan=torch.inf).max()))
    if worst <= 1:
        return MachineCheck(
            name, "right", f"{worst:.0%} of the rounding error that is allowed", worst
        )
    return MachineCheck(
        name, "wrong", f"{worst:.3g} times the rounding error that is allowed", worst
    )
