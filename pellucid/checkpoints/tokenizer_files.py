"""A tokenizer's files in the other layout.

Meta's layout has one file, ``tokenizer.model``: SentencePiece's of Llama 1 and 2, or the base64
ranks of Llama 3. Hugging Face's has ``tokenizer.json``, or a SentencePiece model and a file that
names the class that reads it. What cannot be written exactly is not written, and said.
"""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid import tokenizers
from pellucid.checkpoints.formats.hf import TOKENIZER_FILES
from pellucid.checkpoints.save import copy_tokenizer
from pellucid.checkpoints.tokenizer_documents import llama3_document, sentence_piece_document
from pellucid.files import read_json
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.base import PIECES, RANKS
from pellucid.tokenizers.bytelevel import LLAMA3_SPLIT, ByteLevelTokenizer
from pellucid.tokenizers.hf import byte_level_split
from pellucid.tokenizers.llama3 import N_RANKS, read_ranks, special_tokens

_MODEL, _JSON, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_PROBE = "  Once upon a time,  naïve 12345 x==y\n\n\tC'EST\n LA VIE… 中文 🙂 Ａ①ﬁ \t\n "


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What became of a tokenizer: the files written, and what to know about them."""

    files: tuple[str, ...]
    notes: tuple[str, ...]


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model folder, None where it has none; ValueError for a damaged one."""
    try:
        return tokenizers.load(folder)
    except FileNotFoundError:
        return None


def write_tokenizer(
    tokenizer: Tokenizer | None, source: Path, folder: Path, layout: str
) -> TokenizerFiles:
    """Write the tokenizer of the folder `source` into `folder` for a layout, "hf" or "meta".

    What was written is read again and compared; a difference is among the notes. `folder` holds
    the config by now, which says where text begins and ends.
    """
    if tokenizer is None:
        return TokenizerFiles(files=(), notes=(f"no tokenizer: {source} has none",))
    write = _for_meta if layout == "meta" else _for_hf
    written = write(source, folder, tokenizer)
    if not written:
        return TokenizerFiles(files=(), notes=(_WHY_NOT,))
    return TokenizerFiles(files=tuple(written), notes=_differences(tokenizer, folder))


def has_ranks(tokenizer: Tokenizer | None, source: Path) -> bool | None:
    """Whether the tokenizer.model of Meta's layout will hold ranks, or pieces; None: neither."""
    if tokenizer is None:
        return None
    if (source / _MODEL).is_file() and tokenizer.kind == "tokenizer.json":
        tokenizer = tokenizers.load(source / _MODEL)
    if tokenizer.kind in (RANKS, PIECES):
        return tokenizer.kind == RANKS
    return True if _ranks_say_all(source, tokenizer) else None


_WHY_NOT = (
    "no tokenizer: Meta's layout has SentencePiece and Llama 3's byte-level BPE with its 256 "
    "special tokens only, and there is no tokenizer.model"
)


def _for_meta(source: Path, folder: Path, tokenizer: Tokenizer) -> list[str]:
    if (source / _MODEL).is_file():
        shutil.copyfile(source / _MODEL, folder / _MODEL)
    elif _ranks_say_all(source, tokenizer):
        tokens = (tokenizer.decode_bytes([rank]) for rank in range(N_RANKS))
        lines = (b"%s %d\n" % (base64.b64encode(each), rank) for rank, each in enumerate(tokens))
        (folder / _MODEL).write_bytes(b"".join(lines))
    else:
        return []
    return [_MODEL]


def _ranks_say_all(source: Path, tokenizer: Tokenizer) -> bool:
    """Whether the 128,000 ranks of a tokenizer.json say all of it, as Llama 3's do.

    It is where our reader found that merging by rank is what its list of merges says, and where
    pattern and special tokens are the ones that Meta's code brings along.
    """
    return (
        isinstance(tokenizer, ByteLevelTokenizer)
        and tokenizer.specials in (special_tokens("3.0"), special_tokens("3.1"))
        and (source / _JSON).is_file()
        and byte_level_split(read_json(source / _JSON)) == LLAMA3_SPLIT
    )


def _for_hf(source: Path, folder: Path, tokenizer: Tokenizer) -> list[str]:
    written = copy_tokenizer(source, folder)
    if tokenizer.kind not in (RANKS, PIECES):
        return written
    if tokenizer.kind == RANKS:
        document = llama3_document(read_ranks(folder / _MODEL), tokenizer.specials)
    else:
        document = sentence_piece_document(folder / _MODEL)
    _write(document, folder / _JSON)
    # Another model or normalisation than Llama's comes out otherwise: then only the original.
    exact = tokenizers.load(folder / _JSON).encode(_PROBE) == tokenizer.encode(_PROBE)
    if not exact:
        (folder / _JSON).unlink()
    if _CONFIG not in written:
        stated: dict[str, Any] = {}
        stated["tokenizer_class"] = "PreTrainedTokenizerFast" if exact else "LlamaTokenizer"
        for role in ("bos", "eos"):
            id = getattr(tokenizer, f"{role}_id")
            if id is not None:
                stated[f"{role}_token"] = tokenizer.token_string(id)
        if document["model"]["unk_token"]:
            stated["unk_token"] = document["model"]["unk_token"]
        _write(stated, folder / _CONFIG)
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def _write(document: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _differences(tokenizer: Tokenizer, folder: Path) -> tuple[str, ...]:
    """What the written tokenizer does otherwise than `tokenizer`; empty where nothing."""
    again = tokenizers.load(folder)
    found = [
        f"the tokenizer's {what} was {before} and is {after} as written"
        for what, before, after in (
            ("vocabulary", tokenizer.vocab_size, again.vocab_size),
            ("token that begins a text", tokenizer.bos_id, again.bos_id),
            ("token that ends a text", tokenizer.eos_id, again.eos_id),
        )
        if before != after
    ]
    if tokenizer.encode(_PROBE) != again.encode(_PROBE):
        found.append("the tokenizer encodes text otherwise as written")
    if tokenizer.specials != again.specials:
        apart = tokenizer.specials.items() ^ again.specials.items()
        found.append(f"{len(apart)} special tokens are other ones in the tokenizer as written")
    if tokenizer.chat is not None and again.chat is None:
        found.append("no chat template: the files as written do not say how a conversation looks")
    return tuple(found)
