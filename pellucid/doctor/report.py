"""The checks in order, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from pellucid.doctor import advice, arithmetic, machine
from pellucid.doctor.check import MachineCheck


@dataclass(frozen=True)
class MachineReport:
    """Everything that was examined.

    checks    in order, see `MachineCheck`
    advice    what would be faster with what
    rates     FLOP/s of products, bytes/s of reading memory
    machine   processor, cores, memory, system, compiler (as `pellucid bench` states them)
    versions  of the packages that Pellucid needs; None where one is missing
    """

    checks: list[MachineCheck]
    advice: list[str]
    rates: dict[str, float]
    machine: dict[str, Any]
    versions: dict[str, str | None]

    @property
    def right(self) -> bool:
        """Whether nothing was found wrong."""
        return all(check.state != "wrong" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """What ``pellucid doctor --json`` prints."""
        return {"right": self.right, **asdict(self)}


def examine_machine(progress: Callable[[str], None] | None = None) -> MachineReport:
    """Examine this machine: a few seconds, more where the decoder in C has yet to be compiled.

    progress  called with the name of each check before it runs

    A check that fails is reported as wrong and raises nothing; the others still run.
    """
    progress = progress or (lambda name: None)
    checks: list[MachineCheck] = []
    versions: dict[str, str | None] = {}
    for name, look in _looks(versions):
        progress(name)
        checks += _safely(name, look)
    progress("rates")
    about, rates = machine.describe(), advice.measure()
    return MachineReport(checks, advice.advise(checks, about, rates), rates, about, versions)


def _looks(
    versions: dict[str, str | None],
) -> Iterator[tuple[str, Callable[[], list[MachineCheck]]]]:
    def packages() -> list[MachineCheck]:
        check, found = machine.packages()
        versions.update(found)
        return [check]

    def one(look: Callable[[], MachineCheck]) -> Callable[[], list[MachineCheck]]:
        return lambda: [arithmetic.timed(look)]

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    yield "products, float64", one(arithmetic.whole_numbers)
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield f"products, {dtype}, {device}", one(partial(arithmetic.products, dtype, device))
        for dtype in (torch.float32, torch.bfloat16):
            yield f"attention, {dtype}, {device}", one(partial(arithmetic.attention, dtype, device))
        yield f"gradients, {device}", one(partial(arithmetic.gradients, device))
        yield f"bfloat16, {device}", one(partial(arithmetic.bfloat16_bits, device))
    yield "threads", one(partial(arithmetic.threads_agree, torch.get_num_threads()))
    yield "C kernels", arithmetic.kernels
    for look in (machine.threads, machine.compiler, machine.memory, machine.disk, machine.gpu):
        yield look.__name__, one(look)
    yield "packages", packages


def _safely(name: str, look: Callable[[], list[MachineCheck]]) -> list[MachineCheck]:
    try:
        return look()
    except Exception as error:  # a machine that is ill fails in any way; it is said, and we go on
        told = " ".join(str(error).split())[:300]
        return [MachineCheck(name, "wrong", f"{type(error).__name__}: {told}")]
