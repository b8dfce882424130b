"""The tokenizer in the keys of a GGUF file: byte-level BPE or SentencePiece, roles, chat template.

llama.cpp names the rule that cuts text by a word, ``tokenizer.ggml.pre``, and has the patterns in
its code (``src/llama-vocab.cpp``). A wrong one gives other tokens and no error, so an unknown word
is refused and none is guessed. Both kinds are read as the files that say the same: a
``tokenizer.json``, or a SentencePiece model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from pellucid.gguf_file import read_header
from pellucid.tokenizers import hf
from pellucid.tokenizers.base import STOP_NAMES, Tokenizer
from pellucid.tokenizers.bytelevel import GPT2_SPLIT, LLAMA3_SPLIT, SINGLE_DIGIT_SPLIT
from pellucid.tokenizers.neighbours import Roles
from pellucid.tokenizers.pieces import (
    BYTE,
    CONTROL,
    UNUSED,
    USER_DEFINED,
    Piece,
    field,
    number_field,
    piece_field,
)
from pellucid.tokenizers.sentence_piece import SentencePieceTokenizer, engine_of

T = TypeVar("T")
_START = "tokenizer.ggml."
_PIECES, _BYTE_LEVEL = "llama", "gpt2"  # llama.cpp's words for SentencePiece and byte-level BPE
_STRIPPING = (
    "phi-3",
    "phi3",
)  # in the names of models whose marks take the white space behind them
_USUAL = {"unknown": 0, "bos": 1, "eos": 2}  # ids where a SentencePiece file states none
_PUNCTUATION, _THREE = r"[\p{P}\$\+<=>\^~\|]+", "[0-9][0-9][0-9]"
_GPT2 = (GPT2_SPLIT.pattern,)
_DIGITS = (r"\p{N}", *_GPT2)
_LLAMA3, _QWEN2 = (LLAMA3_SPLIT.pattern,), (SINGLE_DIGIT_SPLIT.pattern,)
# Upper-case letters before lower-case ones, as in o200k and Mistral's Tekken
_CAPITALS = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_TEKKEN = rf"{_CAPITALS}*{_SMALL}+|{_CAPITALS}+{_SMALL}*|\p{{N}}|{_REST}"
_O200K = rf"{_CAPITALS}*{_SMALL}+{_ENDS}|{_CAPITALS}+{_SMALL}*{_ENDS}|\p{{N}}{{1,3}}|{_REST}"
_SEED = SINGLE_DIGIT_SPLIT.pattern.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
# Words for how text is cut -> the patterns, applied one after the other
PRE: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "roberta-bpe"), _GPT2),
    **dict.fromkeys(("exaone4", "trillion", "granite-docling", "mellum", "gigachat"), _GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez"), _QWEN2),
    **dict.fromkeys(("solar-open", "grok-2", "kormo"), _QWEN2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _DIGITS),
    "minerva-7b": _DIGITS,
    "tekken": (_TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2"), (_O200K,)),
    "seed-coder": (_SEED,),
    **dict.fromkeys(("hunyuan-dense", "deepseek-v3"), _DEEPSEEK),
    "default": (_PUNCTUATION, *_GPT2, r"\p{N}+", _THREE),
}
# Text begins with BOS where no key says otherwise
_BEGIN = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2", "tekken"})
_WHOLE_PIECES = _BEGIN | {"glm4"}  # a piece that is a token is taken whole
# To NFC, as these tokenizers' own files say
_NORMALISED = frozenset({"qwen2", "deepseek-r1-qwen", "olmo", "command-r"})
_STOPS = STOP_NAMES | {"<|im_end|>", "<end_of_turn>", "<|end|>"}
_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def from_file(path: Path) -> Tokenizer:
    """The tokenizer of a GGUF file.

    FileNotFoundError where it has none; ValueError for a kind, a word for how text is cut, or lists
    that Pellucid does not know or that do not fit each other.
    """
    return from_keys(read_header(path).keys, str(path))


def from_keys(keys: Mapping[str, Any], name: str) -> Tokenizer:
    """As `from_file`; `name` is what errors call the file."""
    kind, tokens, types = _vocabulary(keys, name)
    roles = _roles(keys, tokens, types)
    if kind == _PIECES:
        engine = engine_of(sentence_piece_model(keys, name), name)
        return SentencePieceTokenizer(engine, roles=roles, stripping=_strips(keys))
    document = document_of(keys, name)
    return hf.from_document(document, Path(), kind="gguf", name=name, roles=roles)


def files_of(path: Path) -> dict[str, bytes | dict[str, Any]]:
    """The same tokenizer as files of a folder: name -> bytes, or what is written as JSON."""
    keys = read_header(path).keys
    try:
        kind, tokens, types = _vocabulary(keys, str(path))
    except FileNotFoundError:
        return {}
    roles = _roles(keys, tokens, types)
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer" if kind == _PIECES else "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": None,
        **roles.template_values,
        "add_bos_token": bool(roles.adds_bos),
    }
    if roles.chat_template is not None:
        config["chat_template"] = roles.chat_template
    files: dict[str, bytes | dict[str, Any]] = {"tokenizer_config.json": config}
    if kind == _PIECES:
        return files | {"tokenizer.model": sentence_piece_model(keys, str(path))}
    generation = {"eos_token_id": sorted(roles.stop_ids), "bos_token_id": roles.bos_id}
    document = document_of(keys, str(path))
    return files | {"tokenizer.json": document, "generation_config.json": generation}


def _vocabulary(keys: Mapping[str, Any], name: str) -> tuple[str, list[str], list[int]]:
    """Kind, tokens and their types."""
    kind = keys.get(f"{_START}model", "none")
    if kind in ("none", "no_vocab"):
        raise FileNotFoundError(f"{name}: it has no tokenizer; give token ids")
    if kind not in (_BYTE_LEVEL, _PIECES):
        raise ValueError(
            f"{name}: its tokenizer is of the kind {kind!r}; expected {_BYTE_LEVEL} or {_PIECES}"
        )
    tokens = keys.get(f"{_START}tokens")
    types = keys.get(f"{_START}token_type", [1] * len(tokens or ()))
    fit = _are(tokens, str) and _are(types, int) and len(tokens) == len(types)
    if not fit or not tokens:
        raise ValueError(f"{name}: expected a token and a type for each id of its vocabulary")
    return kind, tokens, types


def _are(values: Any, kind: type[T]) -> TypeGuard[list[T]]:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _roles(keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Roles:
    usual = _USUAL if keys.get(f"{_START}model") == _PIECES else {}
    ids = {
        role: id
        for role in ("bos", "eos", "unknown", "padding", "eot", "eom")
        if isinstance(id := keys.get(f"{_START}{role}_token_id", usual.get(role)), int)
        and 0 <= id < len(tokens)
    }
    stops = {ids[role] for role in ("eos", "eot", "eom") if role in ids}
    marks = {id for id, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
    stops |= {id for id in marks if tokens[id] in _STOPS}
    begins = keys.get(f"{_START}model") == _PIECES or _word(keys) in _BEGIN
    names = {"unknown": "unk", "padding": "pad"}
    template = keys.get("tokenizer.chat_template")
    return Roles(
        bos_id=ids.get("bos"),
        eos_id=ids.get("eos"),
        stop_ids=frozenset(stops),
        adds_bos=bool(keys.get(f"{_START}add_bos_token", begins)),
        chat_template=template if isinstance(template, str) else None,
        template_values={
            f"{names.get(role, role)}_token": tokens[id]
            for role, id in ids.items()
            if role not in ("eot", "eom")
        },
    )


def _strips(keys: Mapping[str, Any]) -> bool:
    """Whether marks take the white space behind them: no key says so, llama.cpp goes by the name
    (src/llama-vocab.cpp)."""
    name = str(keys.get("general.name", "")).lower()
    return any(word in name for word in _STRIPPING)


def _word(keys: Mapping[str, Any]) -> str:
    """The word for how text is cut; "" where there is none."""
    word = keys.get(f"{_START}pre")
    return word if isinstance(word, str) else ""


def document_of(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The content of a tokenizer.json for a byte-level BPE of a GGUF file."""
    _, tokens, types = _vocabulary(keys, name)
    merges, pre = keys.get(f"{_START}merges"), _word(keys)
    if pre not in PRE:
        raise ValueError(
            f"{name}: its pre-tokenizer (tokenizer.ggml.pre) is {pre!r}, and a guess could give "
            f"other tokens; Pellucid knows {', '.join(sorted(PRE))}"
        )
    pairs = [merge.split(" ") for merge in merges] if _are(merges, str) else [[]]
    if not all(len(pair) == 2 for pair in pairs):
        raise ValueError(f"{name}: expected merges of two tokens with one space between")
    level = {**_LEVEL, "use_regex": PRE[pre][-1] == GPT2_SPLIT.pattern}
    cuts = PRE[pre][: -1 if level["use_regex"] else None]
    steps = [
        {"type": "Split", "pattern": {"Regex": cut}, "behavior": "Isolated", "invert": False}
        for cut in cuts
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **hf.PLAIN_TOKEN, "special": types[id] == CONTROL}
            for id, token in enumerate(tokens)
            if types[id] in (CONTROL, USER_DEFINED)
        ],
        "normalizer": {"type": "NFC"} if pre in _NORMALISED else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, level]} if steps else level,
        "post_processor": None,
        "decoder": {**_LEVEL, "use_regex": True},
        "model": {
            **hf.PLAIN_BPE,
            "ignore_merges": pre in _WHOLE_PIECES,
            "vocab": {token: id for id, token in enumerate(tokens) if types[id] != UNUSED},
            "merges": pairs,
        },
    }


def sentence_piece_model(keys: Mapping[str, Any], name: str) -> bytes:
    """A SentencePiece BPE model file of a GGUF file's pieces, scores and types."""
    _, tokens, types = _vocabulary(keys, name)
    scores = keys.get(f"{_START}scores")
    if not _are(scores, float) or len(scores or ()) != len(tokens):
        raise ValueError(f"{name}: expected a score for each of its {len(tokens):,} pieces")
    assert scores is not None, "checked above"
    made = b"".join(map(piece_field, map(Piece, tokens, scores, types)))
    # BPE, and bytes for what has no piece
    trainer = number_field(3, 2) + number_field(35, BYTE in types)
    for number, role in ((40, "unknown"), (41, "bos"), (42, "eos")):
        id = keys.get(f"{_START}{role}_token_id")
        trainer += number_field(number, id if isinstance(id, int) else _USUAL[role])
    trainer += number_field(43, -1)
    normaliser = field(1, b"identity")
    normaliser += number_field(3, bool(keys.get(f"{_START}add_space_prefix", True)))
    normaliser += number_field(4, bool(keys.get(f"{_START}remove_extra_whitespaces", False)))
    return made + field(2, trainer) + field(3, normaliser + number_field(5, 1))
