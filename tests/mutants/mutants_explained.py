"""Mutants that change nothing that can be observed, and why: no test can kill them."""

from __future__ import annotations

# (module, the line as it stands) -> (before, after) -> why
EXPLAINED: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
