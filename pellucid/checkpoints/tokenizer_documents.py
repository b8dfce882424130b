"""``tokenizer.json`` of the tokenizers that Meta's layout has, for readers of that format alone.

The format is that of Hugging Face's tokenizers library: a normaliser, a rule that cuts the text, a
model, what to put around the ids, and a decoder. In both kinds the list of merges takes the place
of ranks or scores: each way to put a token together from two others, best first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pellucid import files
from pellucid.tokenizers.bytelevel import LLAMA3_SPLIT, byte_characters
from pellucid.tokenizers.hf import PLAIN_BPE, PLAIN_TOKEN

_SPACE = "▁"


def llama3_document(ranks: dict[bytes, int], specials: dict[str, int]) -> dict[str, Any]:
    """What Meta's code of Llama 3 does with these ranks; a piece that is a token is taken whole."""
    character = {byte: written for written, byte in byte_characters().items()}
    vocab = {"".join(character[byte] for byte in token): rank for token, rank in ranks.items()}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cut = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT.pattern}, "behavior": "Isolated"}
    return _document(
        specials,
        bos="<|begin_of_text|>",
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{**cut, "invert": False}, {**level, "use_regex": False}],
        },
        decoder={**level, "use_regex": True},
        model={"ignore_merges": True, "vocab": vocab, "merges": _merges(vocab, vocab.__getitem__)},
    )


def sentence_piece_document(path: Path) -> dict[str, Any]:
    """What the SentencePiece library does with a BPE model of Llama's kind.

    A space is put in front, spaces are written as ▁, what no piece covers becomes bytes. Whether
    the model is of that kind is for the caller to try.
    """
    from sentencepiece import SentencePieceProcessor

    engine = SentencePieceProcessor()
    engine.LoadFromSerializedProto(files.read_bytes(path))
    ids = range(engine.vocab_size())
    vocab = {engine.id_to_piece(id): id for id in ids}
    specials = {piece: id for piece, id in vocab.items() if engine.is_control(id)}
    ordinary = {
        piece: id
        for piece, id in vocab.items()
        if not (engine.is_control(id) or engine.is_unknown(id) or engine.is_byte(id))
    }
    steps: list[dict[str, Any]] = []
    if engine.encode("a  b") == engine.encode("a b"):  # spaces are joined, and cut at the ends
        for pattern, instead in ((r"\A +|[ ▁]+\z", ""), (" {2,}", " ")):
            steps.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": instead})
    steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": _SPACE})
    return _document(
        specials,
        bos=engine.id_to_piece(engine.bos_id()) if engine.bos_id() >= 0 else None,
        normalizer={"type": "Sequence", "normalizers": steps},
        decoder={
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        model={
            "unk_token": engine.id_to_piece(engine.unk_id()),
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(ordinary, lambda piece: -engine.get_score(ordinary[piece])),
        },
    )


def _merges(vocab: Mapping[str, int], order: Callable[[str], float]) -> list[list[str]]:
    """Each pair of tokens that spells a third; by `order` of the third, then by the pair's ids."""
    found = [
        (order(token), vocab[token[:cut]], vocab[token[cut:]], token, cut)
        for token in vocab
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    found.sort(key=lambda merge: merge[:3])
    return [[token[:cut], token[cut:]] for *_, token, cut in found]


def _document(
    specials: Mapping[str, int],
    *,
    bos: str | None,
    decoder: dict[str, Any],
    model: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
) -> dict[str, Any]:
    text, second = ({"Sequence": {"id": id, "type_id": kind}} for kind, id in enumerate("AB"))
    begin = [] if bos is None else [{"SpecialToken": {"id": bos, "type_id": 0}}]
    named = {} if bos is None else {bos: {"id": bos, "ids": [specials[bos]], "tokens": [bos]}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": name, **PLAIN_TOKEN, "special": True}
            for name, id in specials.items()
        ],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [*begin, text],
            "pair": [*begin, text, second],
            "special_tokens": named,
        },
        "decoder": decoder,
        "model": {**PLAIN_BPE, **model},
    }
