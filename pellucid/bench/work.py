"""Where the models of a bench are kept from run to run."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def work_folder() -> Path:
    """A folder of this user's in the temporary one, which is not emptied within a session."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    return Path(tempfile.gettempdir()) / f"pellucid-bench-{user}"
