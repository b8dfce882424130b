"""One target under atheris, which follows coverage: ``python tests/fuzz/fuzz_atheris.py TARGET``.

Needs ``pip install atheris`` (CPython 3.11 to 3.13 on Linux). The bytes that libFuzzer changes are
the seed of a target's damage, so what it finds is replayed by the same bytes:
``fuzz_atheris.py TARGET crash-…``.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent))

with atheris.instrument_imports(include=["pellucid"]):
    from fuzz_guard import Guard
    from fuzz_main import USERS, Place
    from fuzz_targets import TARGETS


def main() -> None:
    target = TARGETS[sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    (root / "tmp").mkdir()
    tempfile.tempdir = str(root / "tmp")
    place = Place(root)
    os.chdir(place.here)
    guard = Guard(root)

    def one(data: bytes) -> None:
        draw = random.Random(data)
        with guard.of_own():
            place.prepare(target)
            target.damage(place.here, draw)
        with contextlib.suppress(*USERS):
            target.read(place.here, draw)
        assert not guard.started, guard.started

    atheris.Setup([sys.argv[0], "-timeout=5", "-rss_limit_mb=4096", *sys.argv[1:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
