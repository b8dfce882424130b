"""Whether this machine computes correctly, and what would make it faster: ``pellucid doctor``.

| file | holds |
|---|---|
| arithmetic.py | products, attention, gradients, bfloat16 and the C kernels against float64 |
| machine.py | threads, compiler, memory, disk, GPU, versions of packages |
| advice.py | what would be faster with what, from what was found and measured |
| report.py | the checks in order, and their report |

Each check compares with something independent of what it examines: Python's whole numbers for
float64, float64 for everything narrower, bits for conversions.
"""

from pellucid.doctor.report import MachineReport, examine_machine

__all__ = ["MachineReport", "examine_machine"]
