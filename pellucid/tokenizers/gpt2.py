"""GPT-2: a vocabulary and its merges, in OpenAI's encoder.json and vocab.bpe or under newer names.

The two files say what a tokenizer.json says in one, so they are read as one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pellucid import files
from pellucid.tokenizers import hf
from pellucid.tokenizers.base import Tokenizer
from pellucid.tokenizers.bytelevel import byte_characters
from pellucid.tokenizers.neighbours import read_json

# vocabulary -> merges
PAIRS = {"encoder.json": "vocab.bpe", "vocab.json": "merges.txt"}
# The library insists on every field.
_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def from_files(vocab_file: Path, merges_file: Path) -> Tokenizer:
    """GPT-2's tokenizer from its two files. Tokens that no merge makes are its special tokens.

    Raises:
        ValueError: a file is malformed, or a merge uses tokens that the vocabulary lacks.
    """
    document = _document(vocab_file, merges_file)
    return hf.from_document(document, vocab_file.parent, kind="gpt2", name=str(vocab_file))


def document_in(folder: Path) -> dict[str, Any]:
    """The content of a tokenizer.json for the two files in `folder`."""
    pair = next(pair for pair in PAIRS.items() if all((folder / name).is_file() for name in pair))
    return _document(folder / pair[0], folder / pair[1])


def _document(vocab_file: Path, merges_file: Path) -> dict[str, Any]:
    vocab = read_json(vocab_file)
    if not vocab or not all(isinstance(id, int) for id in vocab.values()):
        raise ValueError(f"{vocab_file}: expected an object that gives each token its id")
    merges = read_merges(merges_file)
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocab:
                raise ValueError(
                    f"{merges_file}: the merge {left!r} {right!r} needs the token {token!r}, which "
                    f"{vocab_file.name} lacks; do the two files belong together?"
                )
    made = {left + right for left, right in merges} | byte_characters().keys()
    return {
        "added_tokens": [
            {"id": id, "content": token, "special": True, **_PLAIN}
            for token, id in vocab.items()
            if token not in made
        ],
        "pre_tokenizer": {**_BYTE_LEVEL, "add_prefix_space": False},
        "decoder": {**_BYTE_LEVEL, "add_prefix_space": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]},
    }


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The pairs of a merges file, first merge first; a first line "#version …" is skipped.

    Raises:
        ValueError: a line that is not two tokens.
    """
    merges = []
    for number, line in enumerate(files.read_bytes(path).decode("utf-8", "replace").split("\n"), 1):
        if not line.strip("\r") or (number == 1 and line.startswith("#version")):
            continue
        pair = line.rstrip("\r").split(" ")
        if len(pair) != 2 or not all(pair):
            raise ValueError(
                f"{path}, line {number}: {line[:40]!r}; expected two tokens with one space between"
            )
        merges.append((pair[0], pair[1]))
    return merges
