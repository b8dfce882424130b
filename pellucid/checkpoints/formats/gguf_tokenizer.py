"""A tokenizer as the keys of a GGUF file: the same tokens for every text, or an error.

The word for how text is cut, ``tokenizer.ggml.pre``, is written only where a tokenizer made of the
keys gives the ids of ours on a text with everything on which the words differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pellucid.checkpoints.tokenizer_documents import llama3_document
from pellucid.files import read_json
from pellucid.gguf_file import read_header
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.chat import TemplateChat
from pellucid.tokenizers.gguf import CONTROL, PRE, UNUSED, USER_DEFINED, document_of, from_keys
from pellucid.tokenizers.gpt2 import document_in
from pellucid.tokenizers.llama3 import read_ranks

PROBE = (
    "  Once upon a time,  naïve 12345 x==y\n\n\tC'EST\n LA VIE… 中文 🙂 Ａ①ﬁ \t\n ²³ don't 3D "
    "a1b22 ...!!\r\n\r\n$5.00+<=>^~|` e\u0301 한국어 ١٢٣٤\n   \n end   "
)
_START = "tokenizer.ggml."
NONE = {f"{_START}model": "none"}
_NORMAL = 1
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
        return {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
    if tokenizer.kind == "sentencepiece":
        keys = _of_pieces(tokenizer, source, vocab_size)
        _demand_same(tokenizer, from_keys(keys, str(source)), "as SentencePiece")
        return keys | _roles(tokenizer)
    base = _of_document(_document(tokenizer, source), vocab_size) | _roles(tokenizer)
    for word in _words(base, source):
        keys = {**base, f"{_START}pre": word}
        if from_keys(keys, str(source)).encode(PROBE) == tokenizer.encode(PROBE):
            return keys
    raise ValueError(
        f"{source}: no pre-tokenizer that llama.cpp has a word for cuts text as this tokenizer "
        f"does (tried {', '.join(_WORDS)}): its file would give other tokens"
    )


def _demand_same(ours: Tokenizer, written: Tokenizer, how: str) -> None:
    if written.encode(PROBE) != ours.encode(PROBE):
        raise ValueError(f"the tokenizer gives other ids {how} in a GGUF file: not written")


def _words(base: dict[str, Any], source: Path) -> Iterator[str]:
    """The words to try, those first whose patterns stand in the source's own file."""
    path = source / "tokenizer.json"
    stated = read_json(path).get("pre_tokenizer") if path.is_file() else None
    for same in (True, False):
        for word in _WORDS:
            made = document_of({**base, f"{_START}pre": word}, str(source))["pre_tokenizer"]
            if (made == stated) == same and word in PRE:
                yield word


def _document(tokenizer: Tokenizer, source: Path) -> dict[str, Any]:
    if tokenizer.kind == "llama3":
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
    by_id = {id: (token, _NORMAL) for token, id in model["vocab"].items()}
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


def _of_pieces(tokenizer: Tokenizer, source: Path, vocab_size: int) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    engine = SentencePieceProcessor()
    engine.LoadFromSerializedProto((source / "tokenizer.model").read_bytes())
    kinds = (
        (engine.is_unknown, 2), (engine.is_control, CONTROL), (engine.is_byte, 6),
        (engine.is_unused, UNUSED),
    )  # fmt: skip
    by_id = {
        id: (engine.id_to_piece(id), next((kind for is_, kind in kinds if is_(id)), _NORMAL))
        for id in range(engine.vocab_size())
    }
    scores = [engine.get_score(id) for id in by_id]
    for name, id in tokenizer.controls.items():
        by_id[id] = name, CONTROL
    filled = _filled(by_id, vocab_size)
    spaced = "".join(engine.encode("a", out_type=str)).startswith("▁")
    joined = engine.encode("a  b") == engine.encode("a b")
    return {
        f"{_START}model": "llama",
        f"{_START}pre": "default",
        **filled,
        f"{_START}scores": scores + [-1000.0] * (vocab_size - len(scores)),
        f"{_START}add_space_prefix": spaced,
        f"{_START}remove_extra_whitespaces": joined,
        f"{_START}unknown_token_id": engine.unk_id(),
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
