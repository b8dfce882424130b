"""Which tokenizer a folder or file holds.

Decided by content, because Llama 2 and Llama 3 both call theirs tokenizer.model.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pellucid import files
from pellucid.gguf_file import MAGIC
from pellucid.tokenizers import gguf, gpt2, hf, llama3, sentence_piece
from pellucid.tokenizers.base import Tokenizer
from pellucid.tokenizers.neighbours import read_json

_RANK_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_EXPECTED = (
    "tokenizer.json, tokenizer.model, encoder.json with vocab.bpe, or vocab.json with merges.txt"
)


def load(path: str | os.PathLike[str], version: str | None = None) -> Tokenizer:
    """The tokenizer in a model folder or in one file.

    Args:
        path: a folder, or one of tokenizer.json, tokenizer.model (Llama 1, 2 or 3), or either half
            of GPT-2's vocabulary and merges. Files beside it name the roles of tokens and the chat
            template.
        version: "3.0" or "3.1" (also for 3.2 and 3.3), whose special tokens a Llama 3
            tokenizer.model has; None finds out from the files beside it.

    Raises:
        FileNotFoundError: nothing there that is a tokenizer.
        ValueError: a file of no known format, or a damaged one.
    """
    path = Path(path)
    if path.is_dir():
        path = _choose(path)
    elif not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a model folder or {_EXPECTED}")
    return _load_file(path, version)


def _choose(folder: Path) -> Path:
    """The file to read in a folder that may hold several.

    tokenizer.json comes first: it alone knows the tokens that fine-tuning added. In Meta's layout
    (params.json, no config.json) tokenizer.model comes first, because there it is the original and
    anything else a conversion.
    """
    names = ["tokenizer.json", "tokenizer.model", *gpt2.PAIRS]
    if (folder / "params.json").is_file() and not (folder / "config.json").is_file():
        names[:2] = reversed(names[:2])
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} holds no tokenizer; expected {_EXPECTED}")


def _load_file(path: Path, version: str | None) -> Tokenizer:
    files.check_ordinary(path)
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is only a Git LFS pointer; fetch the file itself (git lfs pull)")
    if start.startswith(MAGIC):
        return gguf.from_file(path)
    first_line = start[: start.find(b"\n") + 1] or start + b"\n"
    if _RANK_LINE.fullmatch(first_line):
        return llama3.from_file(path, llama3.check_version(version))
    if start.startswith(b"#version") or path.name in gpt2.PAIRS.values():
        return gpt2.from_files(_partner(path), path)
    if start.lstrip()[:1] == b"{":
        if "model" in (document := read_json(path)) and isinstance(document["model"], dict):
            return hf.from_document(document, path.parent, kind="tokenizer.json", name=str(path))
        return gpt2.from_files(path, _partner(path))
    # A SentencePiece model starts with its first piece: field 1, a message of some length, in it
    # field 1.
    if start[:1] == b"\n" and start[2:3] == b"\n":
        return sentence_piece.from_file(path)
    raise ValueError(
        f"{path} is no tokenizer of a known format (it starts with {start[:16]!r}); "
        f"expected {_EXPECTED}"
    )


def _partner(path: Path) -> Path:
    """The other half of a vocabulary and its merges."""
    pairs = gpt2.PAIRS
    names = pairs | {merges: vocab for vocab, merges in pairs.items()}
    partner = path.parent / names.get(path.name, "")
    if path.name not in names or not partner.is_file():
        expected = " or ".join(" with ".join(pair) for pair in pairs.items())
        raise ValueError(f"{path} is half of a GPT-2 tokenizer; expected {expected} beside it")
    return partner
