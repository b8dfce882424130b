"""Where a model comes from: a folder, a model that ships with the package, or the Hub."""

from __future__ import annotations

import re
from pathlib import Path

import pellucid

DEMOS = {"demo": "llama", "demo-gpt2": "gpt2"}
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(source: str | Path) -> Path:
    """The folder of a model.

    A folder stands for itself; ``demo`` and ``demo-gpt2`` for the models that ship with the
    package (``./demo`` is a folder of that name); ``owner/name``, unless such a folder exists, for
    a Hub repository, which is fetched into the Hub's own cache.

    Raises OSError, in one line, where there is no such folder or the Hub has or gives none.
    """
    if isinstance(source, str) and source in DEMOS:
        return _demo(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise NotADirectoryError(f"{source}: a file; give the folder it lies in")
    if isinstance(source, str) and _REPOSITORY.fullmatch(source):
        return fetch(source)
    raise FileNotFoundError(
        f"{source}: no such folder; a model is a folder, owner/name on the Hub, "
        f"{' or '.join(DEMOS)}"
    )


def _demo(name: str) -> Path:
    folder = Path(pellucid.__file__).parent / "demos" / DEMOS[name]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: this installation lacks the shipped model (expected in {folder}); "
            "install the package again"
        )
    return folder


def fetch(repository: str) -> Path:
    """Fetch a Hub repository's model files, unless the cache has them; return the folder."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository))
