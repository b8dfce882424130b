"""A checkpoint that could not be written leaves nothing behind, and the one before it in place."""

from __future__ import annotations

from pathlib import Path

import pytest

from pellucid.train import run_folder


def test_a_checkpoint_that_fails_leaves_nothing(tmp_path: Path):
    def good(folder: Path) -> None:
        folder.mkdir()

    def bad(folder: Path) -> None:
        folder.mkdir()
        folder.with_name(f"{folder.name}.sharded").mkdir()  # what several ranks write beside it
        raise OSError("No space left on device")

    run_folder.publish(tmp_path, run_folder.LAST, 3, good)
    with pytest.raises(OSError, match="step 6 could not be saved: No space .*/last holds step 3"):
        run_folder.publish(tmp_path, run_folder.LAST, 6, bad)
    left = [path.name for path in (tmp_path / run_folder.CHECKPOINTS).iterdir()]
    assert left == ["last-00000003"]
