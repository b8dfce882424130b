"""Where a model comes from: a folder, a model that ships with the package, or the Hub."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pellucid
from pellucid.checkpoints.formats.hf import INDEX, TOKENIZER_FILES
from pellucid.spelling import suggestion

# What the two layouts consist of; a repository often holds the same weights in further formats.
FILES = (
    *("config.json", "*.safetensors", INDEX),
    *("params.json", "consolidated.*.pth"),
    *TOKENIZER_FILES,
)
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
        f"{' or '.join(DEMOS)}{suggestion(str(source), [*DEMOS, *_folders_beside(folder)])}"
    )


def _folders_beside(folder: Path) -> list[str]:
    """The folders among which `folder` was looked for, as they would have been given."""
    with contextlib.suppress(OSError):
        return [str(folder.parent / each.name) for each in folder.parent.iterdir() if each.is_dir()]
    return []


def _demo(name: str) -> Path:
    folder = Path(pellucid.__file__).parent / "demos" / DEMOS[name]
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{name}: this installation lacks the shipped model (expected in {folder}); "
            "install the package again"
        )
    return folder


def fetch(repository: str) -> Path:
    """Fetch a Hub repository's model files, unless the cache has them; return the folder.

    The files go into huggingface_hub's own cache; ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME``
    and ``HF_TOKEN`` mean what they mean there. Only the files of the two layouts are fetched.

    Raises ValueError where `repository` is no owner/name, OSError in one line where the Hub has
    no such model, does not give it, or cannot be reached while the cache has none.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository}: expected owner/name, a repository of the Hub")
    from huggingface_hub import constants, snapshot_download

    hub = constants.ENDPOINT
    try:
        with _bar_on_a_terminal_only():
            folder = Path(
                snapshot_download(repository, allow_patterns=list(FILES), ignore_patterns=["*/*"])
            )
    except Exception as error:  # the HTTP library below, and its errors, differ by version
        raise OSError(f"{repository}: {_reason(error, hub)}") from error
    if not any((folder / name).is_file() for name in ("config.json", "params.json")):
        raise FileNotFoundError(
            f"{repository}: {hub} has it, but without config.json or params.json: not a model in "
            "Hugging Face's or Meta's layout"
        )
    return folder


@contextlib.contextmanager
def _bar_on_a_terminal_only() -> Iterator[None]:
    """No progress bar in a pipe, and no warnings beside the one error that `fetch` raises."""
    from huggingface_hub import utils

    bar = not utils.are_progress_bars_disabled()
    verbosity = utils.logging.get_verbosity()
    utils.logging.set_verbosity_error()
    if bar and not sys.stderr.isatty():
        utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        if bar:
            utils.enable_progress_bars()


def _reason(error: Exception, hub: str) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{hub} asks you to accept the model's terms: do so on its page, then log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"neither a folder here nor a model on {hub} that you may see; check the spelling"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "not complete in the cache, and HF_HUB_OFFLINE forbids asking the Hub for it"
        return f"no such folder, {hub} could not be reached, and the cache does not have all of it"
    return f"{hub} did not deliver it ({str(error).strip().splitlines()[0][:200]})"
