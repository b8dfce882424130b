"""A tokenizer as the keys of a GGUF file: the same tokens for every text, or an error.

The word for how text is cut, ``tokenizer.ggml.pre``, is written only where a tokenizer made of the
keys gives the ids of ours on a text with everything on which the words differ.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pellucid.checkpoints.tokenizer_documents import llama3_document
from pellucid.files import read_json
from pellucid.gguf_file import read_header
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.base import PIECES, RANKS
from pellucid.tokenizers.chat import TemplateChat
from pellucid.tokenizers.gguf import PRE, document_of, from_keys
from pellucid.tokenizers.gpt2 import document_in
from pellucid.tokenizers.llama3 import read_ranks
from pellucid.tokenizers.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    pieces_in,
)

PROBE = (
    "  Once upon a time,  naïve 12345 x==y\n\n\tC'EST\n LA VIE… 中文 🙂 Ａ①ﬁ \t\n ²³ don't 3D "
    "a1b22 ...!!\r\n\r\n$5.00+<=>^~|` e\u0301 한국어 ١٢٣٤\n   \n end   "
)
_START = "tokenizer.ggml."
NONE = {f"{_START}model": "none"}
_LAST = -1e6  # score of what merging never makes
# One word for each way to cut, the plainest first
_WORDS = (
    "gpt-2", "olmo", "smollm", "command-r", "llama-bpe", "dbrx", "glm4", "qwen2", "stablelm2",
    "tekken", "gpt-4o", "seed-coder", "hunyuan-dense", "default",
)  # fmt: skip


def tokenizer_keys(tokenizer: Tokenizer | None, source: Path, vocab_size: int) -> dict[str, Any]:
    """The keys that say what `tokenizer`, read from `source`, does.

    vocab_size  of the model: ids without a token get one that nothing encodes to

    ValueError where no word of llama.cpp's gives the same ids.
    """
    if tokenizer is None:
        return dict(NONE)
    if source.is_file():
        keys = read_header(source).keys
        kept = ("tokenizer.", "general.name")
        return {key: value for key, value in keys.items() if key.startswith(kept)}
    if tokenizer.kind == PIECES or _has_pieces(tokenizer, source):
        return _sentence_piece_keys(tokenizer, source, vocab_size)
    document = _document(tokenizer, source)
    base = _of_document(document, vocab_size) | _roles(tokenizer)
    for word in _words(document.get("pre_tokenizer")):
        keys = {**base, f"{_START}pre": word}
        if from_keys(keys, str(source)).encode(PROBE) == tokenizer.encode(PROBE):
            return keys
    raise ValueError(
        f"{source}: no pre-tokenizer that llama.cpp has a word for cuts text as this tokenizer "
        f"does (tried {', '.join(_WORDS)}): its file would give other tokens"
    )


def _has_pieces(tokenizer: Tokenizer, source: Path) -> bool:
    """Whether a tokenizer.json is BPE over characters with bytes for the rest."""
    if tokenizer.kind != "tokenizer.json":
        return False
    model = read_json(source / "tokenizer.json")["model"]
    return model.get("type", "BPE") == "BPE" and bool(model.get("byte_fallback"))


def _sentence_piece_keys(tokenizer: Tokenizer, source: Path, vocab_size: int) -> dict[str, Any]:
    """From the tokenizer.model where there is one, else from the merges of the tokenizer.json."""
    ways = [_of_pieces] if (source / "tokenizer.model").is_file() else []
    ways += [_of_merges] if (source / "tokenizer.json").is_file() else []
    for way in ways:
        keys = way(tokenizer, source, vocab_size) | _name_of_stripping(source)
        written = from_keys(keys, str(source))
        inside, spaced = PROBE.strip(), PROBE
        if written.encode(inside) != tokenizer.encode(inside):
            continue
        if written.encode(spaced) != tokenizer.encode(spaced):
            warnings.warn(
                f"{source}: llama.cpp puts a space in front of every text, this tokenizer only in "
                "front of those that begin with none",
                stacklevel=2,
            )
        return keys
    raise ValueError(
        f"{source}: the tokenizer gives other ids as SentencePiece in a GGUF file: not written"
    )


def _words(stated: Any) -> Iterator[str]:
    """The words to try, those first whose patterns are `stated` in the source's own document."""
    small = {f"{_START}model": "gpt2", f"{_START}tokens": ["a"], f"{_START}token_type": [NORMAL]}
    for same in (True, False):
        for word in _WORDS:
            if word in PRE:
                made = document_of({**small, f"{_START}merges": [], f"{_START}pre": word}, word)
                if (made["pre_tokenizer"] == stated) == same:
                    yield word


def _document(tokenizer: Tokenizer, source: Path) -> dict[str, Any]:
    if tokenizer.kind == RANKS:
        return llama3_document(read_ranks(source / "tokenizer.model"), tokenizer.specials)
    path = source / "tokenizer.json"
    document = read_json(path) if tokenizer.kind == "tokenizer.json" else document_in(source)
    level = (document.get("decoder") or {}).get("type") == "ByteLevel"
    if not level or document["model"].get("type", "BPE") != "BPE":
        raise ValueError(
            f"{path}: only byte-level BPE is written to GGUF files, and SentencePiece from its "
            "tokenizer.model"
        )
    return document


def _of_document(document: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    model, added = document["model"], document.get("added_tokens") or []
    by_id = {id: (token, NORMAL) for token, id in model["vocab"].items()}
    for token in added:
        by_id[token["id"]] = token["content"], CONTROL if token.get("special") else USER_DEFINED
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    return {f"{_START}model": "gpt2", **_filled(by_id, vocab_size), f"{_START}merges": merges}


def _filled(by_id: dict[int, tuple[str, int]], vocab_size: int) -> dict[str, Any]:
    if max(by_id) >= vocab_size:
        raise ValueError(f"a token has the id {max(by_id)}, the model {vocab_size} rows")
    every = [by_id.get(id, (f"[PAD{id}]", UNUSED)) for id in range(vocab_size)]
    return {
        f"{_START}tokens": [token for token, _ in every],
        f"{_START}token_type": [kind for _, kind in every],
    }


def _name_of_stripping(source: Path) -> dict[str, str]:
    """The name by which llama.cpp knows that marks take the white space behind them."""
    document = read_json(source / "tokenizer.json") if (source / "tokenizer.json").is_file() else {}
    strips = any(token.get("rstrip") for token in document.get("added_tokens") or [])
    return {"general.name": "phi-3"} if strips else {}


def _of_pieces(tokenizer: Tokenizer, source: Path, vocab_size: int) -> dict[str, Any]:
    """The keys of a tokenizer.model, with the tokens that files beside it add."""
    pieces = pieces_in((source / "tokenizer.model").read_bytes())
    return _piece_keys(tokenizer, dict(enumerate(pieces)), _added(source), vocab_size)


def _of_merges(tokenizer: Tokenizer, source: Path, vocab_size: int) -> dict[str, Any]:
    """The keys of a tokenizer.json that is such a model: earlier merges score higher."""
    document = read_json(source / "tokenizer.json")
    model, ranks = document["model"], dict[str, int]()
    for rank, merge in enumerate(model.get("merges") or []):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    last = float(-len(ranks) - 1)
    pieces = {
        id: Piece(text, float(-ranks[text]) if text in ranks else last, _type(text, model))
        for text, id in model["vocab"].items()
    }
    return _piece_keys(tokenizer, pieces, _added(source), vocab_size)


def _type(text: str, model: dict[str, Any]) -> int:
    if text == model.get("unk_token"):
        return UNKNOWN
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _added(source: Path) -> dict[int, str]:
    """Tokens that tokenizer.json adds to a model: id -> text."""
    document = read_json(source / "tokenizer.json") if (source / "tokenizer.json").is_file() else {}
    return {token["id"]: token["content"] for token in document.get("added_tokens") or []}


def _piece_keys(
    tokenizer: Tokenizer, pieces: dict[int, Piece], added: dict[int, str], vocab_size: int
) -> dict[str, Any]:
    unknown = next((id for id, piece in pieces.items() if piece.type == UNKNOWN), 0)
    for id, text in added.items():
        if id != unknown and "▁" not in text:
            pieces[id] = Piece(text, _LAST, USER_DEFINED)
    for text, id in tokenizer.controls.items():
        kept = id in pieces and pieces[id].type == USER_DEFINED and text not in tokenizer.specials
        if id != unknown and not kept:
            pieces[id] = Piece(text, _LAST, CONTROL)
    filled = _filled({id: (piece.text, piece.type) for id, piece in pieces.items()}, vocab_size)
    first = tokenizer.encode("a")[0]
    return {
        f"{_START}model": "llama",
        f"{_START}pre": "default",
        **filled,
        f"{_START}scores": [
            pieces[id].score if id in pieces else _LAST for id in range(vocab_size)
        ],
        f"{_START}add_space_prefix": pieces[first].text.startswith("▁"),
        f"{_START}remove_extra_whitespaces": tokenizer.encode("a  b") == tokenizer.encode("a b"),
        f"{_START}unknown_token_id": unknown,
    } | _roles(tokenizer)


def _roles(tokenizer: Tokenizer) -> dict[str, Any]:
    keys: dict[str, Any] = {f"{_START}add_bos_token": tokenizer.adds_bos}
    for role in ("bos", "eos"):
        if (id := getattr(tokenizer, f"{role}_id")) is not None:
            keys[f"{_START}{role}_token_id"] = id
    others = sorted(tokenizer.stop_ids - {tokenizer.eos_id})
    keys |= {
        f"{_START}{role}_token_id": id for role, id in zip(("eot", "eom"), others, strict=False)
    }
    if isinstance(tokenizer.chat, TemplateChat):
        keys["tokenizer.chat_template"] = tokenizer.chat.template
    return keys
