"""`tokenizer.json`: through tiktoken where that gives the same ids, else through Hugging Face's own
tokenizers library. tiktoken is 3 to 12 times as fast here.
"""

from __future__ import annotations

import json
import operator
import secrets
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pellucid.tokenizers.base import StreamDecoder, Tokenizer, check_ids, is_ordinary, valid_unicode
from pellucid.tokenizers.bytelevel import (
    GPT2_SPLIT,
    KNOWN_SPLITS,
    ByteLevelTokenizer,
    Split,
    ranks_from_merges,
    token_bytes,
)
from pellucid.tokenizers.chat import chat_for
from pellucid.tokenizers.marked import Part
from pellucid.tokenizers.neighbours import Roles, find_roles, read_json

if TYPE_CHECKING:
    import tokenizers

# What a tokenizer.json states of a byte-level BPE, and of an added token where nothing is special
PLAIN_BPE: Mapping[str, Any] = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}
# A part of a tokenizer.json -> where its steps stand if it is a sequence
_STEPS = {
    "normalizer": "normalizers",
    "pre_tokenizer": "pretokenizers",
    "decoder": "decoders",
    "post_processor": "processors",
}
PLAIN_TOKEN: Mapping[str, Any] = dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
)


def from_file(path: Path) -> Tokenizer:
    """A tokenizer.json, with the roles of its tokens from the files beside it.

    Raises:
        ValueError: no tokenizer.json, or one that the tokenizers library refuses.
    """
    return from_document(read_json(path), path.parent, kind="tokenizer.json", name=str(path))


def from_document(
    document: dict[str, Any], folder: Path, *, kind: str, name: str, roles: Roles | None = None
) -> Tokenizer:
    """A tokenizer from the content of a tokenizer.json. `name` is what errors call it; `roles` None
    are found in the files of `folder`."""
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise ValueError(f'{name}: expected a tokenizer.json with "model" and in it "vocab"')
    try:
        added = {token["content"]: token for token in document.get("added_tokens") or []}
        named: dict[str, int] = {text: token["id"] for text, token in added.items()}
    except (KeyError, TypeError):
        raise ValueError(f'{name}: expected an "id" and a "content" per added token') from None
    specials = {text: id for text, id in named.items() if added[text].get("special")}
    check_ids(named.values(), len(named) + len(model["vocab"]), name)
    if isinstance(model["vocab"], dict):
        check_ids(model["vocab"].values(), len(named) + len(model["vocab"]), name)
        named = model["vocab"] | named
    roles = roles or find_roles(folder, named)
    shared: dict[str, Any] = {
        "kind": kind,
        "specials": specials,
        "bos_id": roles.bos_id,
        "eos_id": roles.eos_id,
        "stop_ids": roles.stop_ids,
        "adds_bos": _adds_bos(document) if roles.adds_bos is None else roles.adds_bos,
    }
    split = byte_level_split(document)
    ranks = split and _ranks(model, specials)
    tokenizer: Tokenizer
    if split and ranks:
        tokenizer = ByteLevelTokenizer(ranks, split, **shared)  # all its added tokens are special
    else:
        tokenizer = LibraryTokenizer(document, name=name, marks=_marks(added, roles), **shared)
    tokenizer.chat = chat_for(tokenizer, roles.chat_template, roles.template_values)
    return tokenizer


def _marks(added: dict[str, dict[str, Any]], roles: Roles) -> dict[str, int]:
    """Added tokens that are not called special and must not come out of ordinary text all the same.

    Whether "special" is set says little: published models have <|im_end|> without it. So every
    added token counts, except words and white space that enlarge a vocabulary ("  ", "Pellucid"):
    they are text. Even those count where they have a role, or where the chat template writes them
    (white space it writes as anybody does).
    """
    template = roles.chat_template or ""
    ends = {roles.bos_id, roles.eos_id, *roles.stop_ids}
    return {
        text: token["id"]
        for text, token in added.items()
        if text
        and not token.get("special")
        and not (text.isspace() and token["id"] not in ends)
        and (token["id"] in ends or text in template or not is_ordinary(text))
    }


def byte_level_split(document: dict[str, Any]) -> Split | None:
    """The split of a byte-level BPE that tiktoken can stand in for; None for anything else.

    ValueError for a document whose parts are of another kind than the format's.
    """
    _check_steps(document)
    model = document["model"]
    plain = (
        model.get("type", "BPE") == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not model.get("byte_fallback")
        and not document.get("normalizer")
        and (document.get("decoder") or {}).get("type") == "ByteLevel"
        # An added token that is no special cuts ordinary text too, and one that strips eats the
        # space beside it.
        and all(
            token.get("special")
            and not (token.get("lstrip") or token.get("rstrip") or token.get("single_word"))
            for token in document.get("added_tokens") or []
        )
    )
    if not plain:
        return None
    before = document.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", []) if before.get("type") == "Sequence" else [before]
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space", True):
        return None
    if last.get("use_regex", True):
        return GPT2_SPLIT if len(steps) == 1 else None
    if len(steps) != 2 or steps[0].get("type") != "Split":
        return None
    if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        return None
    pattern = steps[0].get("pattern")
    # Only patterns whose cuts in long white space are known (bytelevel.py).
    return next((split for split in KNOWN_SPLITS if {"Regex": split.pattern} == pattern), None)


def _check_steps(document: Mapping[str, Any]) -> None:
    for key, inner in _STEPS.items():
        part = document.get(key)
        steps = part.get(inner, []) if isinstance(part, dict) else part
        lists = isinstance(steps, list) and all(isinstance(step, dict) for step in steps)
        if part is not None and not (isinstance(part, dict) and lists):
            raise ValueError(
                f"tokenizer.json: {key} is {str(part)[:60]}; expected an object, its {inner} a list"
            )


def _ranks(model: dict[str, Any], specials: dict[str, int]) -> dict[bytes, int] | None:
    vocab = {token: id for token, id in model["vocab"].items() if token not in specials}
    merges: list[tuple[str, str]] = []
    for merge in model.get("merges") or []:
        # Written as "a b" or, since 2024, as ["a", "b"].
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or list(map(type, pair)) != [str, str]:
            return None  # said by the library, if it is wrong
        merges.append((pair[0], pair[1]))
    return ranks_from_merges(vocab, merges, bool(model.get("ignore_merges")))


def _adds_bos(document: dict[str, Any]) -> bool:
    """Whether the post-processor puts a special token in front of a text."""
    after = document.get("post_processor") or {}
    for step in after.get("processors", []) if after.get("type") == "Sequence" else [after]:
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            first = step["single"][0] if isinstance(step["single"], list) else None
            return isinstance(first, dict) and "SpecialToken" in first
    return False


class LibraryTokenizer(Tokenizer):
    """Encoding by the tokenizers library. Decoding is ours for its two decoders that work on bytes,
    which lets text stream exactly; any other decoder is the library's (`LibraryStream`)."""

    def __init__(self, document: dict[str, Any], *, name: str, **shared: Any) -> None:
        self._document, self._name = document, name
        self._engine = self._make(document)
        decoder = document.get("decoder") or {}
        self._style, self._drops_space = _decoder_style(decoder)
        super().__init__(table=self._read_table(), **shared)

    def _make(self, document: dict[str, Any]) -> tokenizers.Tokenizer:
        import tokenizers

        try:
            engine = tokenizers.Tokenizer.from_str(json.dumps(document))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # bare Exception, or a panic that is not even one
            raise ValueError(f"{self._name}: the tokenizers library refuses it: {error}") from None
        engine.no_truncation()
        engine.no_padding()
        return engine

    @cached_property
    def _renamed(self) -> tuple[tokenizers.Tokenizer, Renamed]:
        """The engine for text: its control tokens have names that no text spells.

        Only so are they inert in every kind of model: some take a whole word that is in their
        vocabulary, whatever the library is told about special tokens.
        """
        renamed = Renamed(self._document, self.controls)
        return self._make(renamed.document), renamed

    def _read_table(self) -> list[bytes | None]:
        # The library's decoder takes added tokens too: Gemma's "▁▁" is two spaces.
        kept = [] if self._style == "pieces" else self._document.get("added_tokens") or []
        added = {token["content"] for token in kept}
        by_id = {id: token for token, id in self._engine.get_vocab(with_added_tokens=True).items()}
        table: list[bytes | None] = [None] * (max(by_id) + 1)
        for id, token in by_id.items():
            table[id] = token.encode() if token in added else self._token_bytes(token)
        return table

    def _token_bytes(self, token: str) -> bytes:
        if self._style == "bytes":
            try:
                return token_bytes(token)
            except KeyError:
                return token.encode()
        if self._style == "pieces":
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("▁", " ").encode()
        return token.encode()

    def _encode_plain(self, text: str) -> list[int]:
        return self._ids(self._renamed[0], text)

    def _encode_specials(self, text: str) -> list[int]:
        return self._ids(self._engine, text)

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        # As one text: what stands beside a control token decides about spaces next to it.
        engine, renamed = self._renamed
        pieces: list[str] = []
        kept: list[tuple[int, ...]] = []
        for part in parts:
            if isinstance(part, str):
                pieces.append(valid_unicode(part))
            elif isinstance(part, int):
                pieces.append(renamed.names[part])
            else:
                kept.append(part)
                pieces.append(renamed.hole)
        ids = self._ids(engine, "".join(pieces))
        if not kept:
            return ids
        hole, filling = engine.token_to_id(renamed.hole), iter(kept)
        return [id for one in ids for id in (next(filling) if one == hole else (one,))]

    def _ids(self, engine: tokenizers.Tokenizer, text: str) -> list[int]:
        try:
            return engine.encode(text, add_special_tokens=False).ids
        except Exception as error:  # bare, as in `_make`: a word outside a closed vocabulary
            raise ValueError(f"{self._name}: the text cannot be encoded: {error}") from None

    def _at_start(self, id: int, data: bytes) -> bytes:
        return data.removeprefix(b" ") if self._drops_space else data

    def decode_bytes(self, ids: Iterable[int], skip_specials: bool = False) -> bytes:
        if self._style != "library":
            return super().decode_bytes(ids, skip_specials)
        checked = [operator.index(id) for id in ids]
        for id in checked:
            self._bytes_of(id, skip_specials)
        return self._engine.decode(checked, skip_special_tokens=skip_specials).encode()

    def stream(self, skip_specials: bool = False, after: Iterable[int] = ()) -> StreamDecoder:
        if self._style != "library":
            return super().stream(skip_specials, after)
        return LibraryStream(self, skip_specials, after)


class Renamed:
    """A tokenizer.json whose control tokens have other names, which are drawn by chance.

    names  id of a control token -> its name in `document`
    hole   the name of one more token, which stands for ids that are known already
    """

    def __init__(self, document: dict[str, Any], controls: Mapping[str, int]) -> None:
        # Letters and digits, which no normaliser changes.
        chance = secrets.token_hex(16)
        news = {name: f"{chance}{number:08x}" for number, name in enumerate([*controls, ""])}
        self.hole = news.pop("")
        self.names = {id: news[name] for name, id in controls.items()}
        model: dict[str, Any] = dict(document["model"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {news.get(text, text): id for text, id in model["vocab"].items()}
        else:  # Unigram: [piece, score] by id
            model["vocab"] = [[news.get(text, text), *rest] for text, *rest in model["vocab"]]
        if model.get("unk_token") in news:
            model["unk_token"] = news[model["unk_token"]]
        if model.get("merges"):
            model["merges"] = [merge for merge in model["merges"] if not _makes(merge, news)]
        exact = {"normalized": False, "single_word": False}
        added = [
            {**token, "content": news[token["content"]], **exact}
            if token["content"] in news
            else token
            for token in document.get("added_tokens") or []
        ]
        vocab: dict[str, int] | list[Any] = document["model"]["vocab"]
        ids = [*_vocab_ids(vocab), *(token["id"] for token in added)]
        plain = {"lstrip": False, "rstrip": False, "special": True, **exact}
        added.append({"id": max(ids) + 1, "content": self.hole, **plain})
        self.document = {**document, "model": model, "added_tokens": added, "post_processor": None}


def _vocab_ids(vocab: dict[str, int] | list[Any]) -> Iterable[int]:
    return vocab.values() if isinstance(vocab, dict) else range(len(vocab))


def _makes(merge: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge takes or makes a token of these names."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    return any(name in names for name in (*pair, "".join(pair)))


class LibraryStream(StreamDecoder):
    """Streaming for decoders that are only known as a function of all ids: decodes everything again
    at each token (quadratic, but milliseconds at the lengths that people read) and gives out what
    is new."""

    def __init__(
        self, tokenizer: Tokenizer, skip_specials: bool = False, after: Iterable[int] = ()
    ) -> None:
        self._ids: list[int] = []
        self._given = 0
        super().__init__(tokenizer, skip_specials, after)

    def push(self, id: int) -> str:
        self._ids.append(operator.index(id))
        return self._new(final=False)

    def flush(self) -> str:
        return self._new(final=True)

    def _new(self, final: bool) -> str:
        text = self._tokenizer.decode(self._ids, self._skip_specials)
        # A trailing U+FFFD may still become a character.
        end = len(text) if final else len(text.rstrip("\ufffd"))
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece


def _decoder_style(decoder: dict[str, Any]) -> tuple[str, bool]:
    """How token texts become bytes ("bytes", "pieces", or "library" for any other way), and whether
    the text loses one space in front."""
    if decoder.get("type") == "ByteLevel":
        return "bytes", False
    steps = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else []
    kinds = [step.get("type") for step in steps]
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"]:
        replaces = steps[0].get("pattern") == {"String": "▁"} and steps[0].get("content") == " "
        if replaces and len(steps) == 3:
            return "pieces", False
        strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
        if replaces and steps[3:] == [strip]:
            return "pieces", True
    return "library", False
