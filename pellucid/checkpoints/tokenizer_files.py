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
from pellucid.checkpoints.keys import read_json
from pellucid.checkpoints.save import copy_tokenizer
from pellucid.tokenizers import Tokenizer
from pellucid.tokenizers.bytelevel import LLAMA3_SPLIT, ByteLevelTokenizer, byte_characters
from pellucid.tokenizers.hf import byte_level_split
from pellucid.tokenizers.llama3 import RANKS, read_ranks, special_tokens

_MODEL, _JSON, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_PROBE = "Once upon a time,  naïve 12345 x==y\n\n\tC'EST LA VIE… 中文 🙂"


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
    return TokenizerFiles(files=tuple(written), notes=_differences(tokenizer, folder, layout))


def is_llama3(tokenizer: Tokenizer | None, source: Path) -> bool | None:
    """Whether what Meta's layout will hold is Llama 3's tokenizer, or SentencePiece; None: none."""
    if tokenizer is None:
        return None
    if (source / _MODEL).is_file() and tokenizer.kind == "tokenizer.json":
        tokenizer = tokenizers.load(source / _MODEL)
    if tokenizer.kind in ("llama3", "sentencepiece"):
        return tokenizer.kind == "llama3"
    return True if _is_llama3_json(source, tokenizer) else None


_WHY_NOT = (
    "no tokenizer: Meta's layout has SentencePiece and Llama 3's byte-level BPE with its 256 "
    "special tokens only, and there is no tokenizer.model"
)


def _for_meta(source: Path, folder: Path, tokenizer: Tokenizer) -> list[str]:
    if (source / _MODEL).is_file():
        shutil.copyfile(source / _MODEL, folder / _MODEL)
    elif _is_llama3_json(source, tokenizer):
        tokens = (tokenizer.decode_bytes([rank]) for rank in range(RANKS))
        lines = (b"%s %d\n" % (base64.b64encode(each), rank) for rank, each in enumerate(tokens))
        (folder / _MODEL).write_bytes(b"".join(lines))
    else:
        return []
    return [_MODEL]


def _is_llama3_json(source: Path, tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer.json is Llama 3's, so that its 128,000 ranks say all of it.

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
    if tokenizer.kind == "llama3" and _JSON not in written:
        document = _llama3_document(read_ranks(source / _MODEL), tokenizer.specials)
        text = json.dumps(document, ensure_ascii=False)
        (folder / _JSON).write_text(text, encoding="utf-8")
        written.append(_JSON)
    reader = {"llama3": "PreTrainedTokenizerFast", "sentencepiece": "LlamaTokenizer"}
    if tokenizer.kind in reader and _CONFIG not in written:
        stated: dict[str, Any] = {"tokenizer_class": reader[tokenizer.kind]}
        for role in ("bos", "eos"):
            id = getattr(tokenizer, f"{role}_id")
            if id is not None:
                stated[f"{role}_token"] = tokenizer.token_string(id)
        if tokenizer.kind == "sentencepiece":
            stated |= {"unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}
        text = json.dumps(stated, indent=2, ensure_ascii=False)
        (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
        written.append(_CONFIG)
    return written


def _llama3_document(ranks: dict[bytes, int], specials: dict[str, int]) -> dict[str, Any]:
    """The tokenizer.json that says what Meta's code does with these ranks.

    A list of merges takes the place of the ranks: each way to put a token together from two
    others, in the order of the tokens, and pieces that are a token are taken whole.
    """
    character = {byte: written for written, byte in byte_characters().items()}
    written = {token: "".join(character[byte] for byte in token) for token in ranks}
    merges = [
        (ranks[token], ranks[token[:cut]], ranks[token[cut:]], token, cut)
        for token in ranks
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    bos = "<|begin_of_text|>"
    begin, text = (
        {"SpecialToken": {"id": bos, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, **flags, "special": True} for name, id in specials.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": LLAMA3_SPLIT.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**level, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}},
        },
        "decoder": {**level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {written[token]: rank for token, rank in ranks.items()},
            "merges": [
                [written[token[:cut]], written[token[cut:]]]
                for *_, token, cut in sorted(merges, key=lambda merge: merge[:3])
            ],
        },
    }


def _differences(tokenizer: Tokenizer, folder: Path, layout: str) -> tuple[str, ...]:
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
    if (
        layout == "hf"
        and again.kind == "sentencepiece"
        and again.encode("a  b") == again.encode("a b")
    ):
        found.append("this SentencePiece model joins spaces; transformers' reader of it does not")
    return tuple(found)
