"""How many processor cores there are for us, which is not how many the machine has."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """Cores this process may really use: its affinity, cut to the quota of its control group.

    More threads than that spin against each other, and everything collapses.
    """
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = cgroup_quota()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def cgroup_quota(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> float | None:
    """Cores' worth of time per period that the control groups grant; None: no limit, or unknown.

    Version 2 (``cpu.max``): the least of this process's group and of all above it. Version 1
    (``cpu.cfs_quota_us``): that of the root, which is what a container sees.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/").strip("/")
    inner = root / path
    folders = [inner, *(folder for folder in inner.parents if folder.is_relative_to(root))]
    limits = [_granted(folder / "cpu.max") for folder in folders]
    limits.append(_granted(root / "cpu/cpu.cfs_quota_us", root / "cpu/cpu.cfs_period_us"))
    return min((limit for limit in limits if limit), default=None)


def _granted(*files: Path) -> float | None:
    """Quota over period of one control group; None where there is none."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return None if quota in ("max", "-1") else float(quota) / float(period)
    except (OSError, ValueError):
        return None
