"""Llama 3: `tokenizer.model` is a text file of "base64 rank" lines for tiktoken, 128,000 of them.

The 256 special tokens stand in no file of Meta's layout; Meta's code appends them. Their names
changed once.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pellucid import files
from pellucid.tokenizers.base import RANKS
from pellucid.tokenizers.bytelevel import LLAMA3_SPLIT, ByteLevelTokenizer
from pellucid.tokenizers.chat import Llama3Chat
from pellucid.tokenizers.neighbours import read_json

Version = Literal["3.0", "3.1"]
N_RANKS = 128_000
SPECIALS = 256

# Places among the 256 that have a use; all others are <|reserved_special_token_0|>, _1 … in order.
# Both tables are those of the released tokenizer.json files, so that the same checkpoint has the
# same names in either layout. (Meta's code for 3.1+ calls two of the reserved ones <|step_id|>, at
# 5, and <|image|>, at 11; no text model writes them.)
_NAMED: dict[Version, dict[int, str]] = {
    "3.0": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        9: "<|eot_id|>",
    },
    "3.1": {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        4: "<|finetune_right_pad_id|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|eom_id|>",
        9: "<|eot_id|>",
        10: "<|python_tag|>",
    },
}


def special_tokens(version: Version, first_id: int = N_RANKS) -> dict[str, int]:
    """Name -> id of the 256 special tokens of Llama 3.0, or of 3.1 and later ("3.1")."""
    named = _NAMED[version]
    reserved = (f"<|reserved_special_token_{n}|>" for n in range(SPECIALS))
    return {named.get(n) or next(reserved): first_id + n for n in range(SPECIALS)}


def check_version(version: str | None) -> Version | None:
    """`version` as one of the two that differ.

    Raises:
        ValueError: another one.
    """
    if version is None or version in get_args(Version):
        return cast(Version | None, version)
    raise ValueError(
        f"Llama 3 special tokens of version {version!r}: expected '3.0' or '3.1' "
        f"(3.2 and 3.3 have those of 3.1)"
    )


def from_ranks(ranks: dict[bytes, int], version: Version = "3.1") -> ByteLevelTokenizer:
    """A Llama 3 tokenizer over these ranks; the special tokens follow the last rank."""
    specials = special_tokens(version, first_id=len(ranks))
    tokenizer = ByteLevelTokenizer(
        ranks,
        LLAMA3_SPLIT,
        specials,
        kind=RANKS,
        bos_id=specials["<|begin_of_text|>"],
        eos_id=specials["<|end_of_text|>"],
        adds_bos=True,
    )
    tokenizer.chat = Llama3Chat(tokenizer)
    return tokenizer


def from_file(path: Path, version: Version | None = None) -> ByteLevelTokenizer:
    """Meta's `tokenizer.model` of Llama 3.

    Args:
        path: the file.
        version: whose special tokens; None finds out from the files beside it (`find_version`).

    Raises:
        ValueError: not 128,000 well-formed ranks.
    """
    ranks = read_ranks(path)
    if len(ranks) != N_RANKS:
        raise ValueError(
            f"{path}: {len(ranks):,} ranks, but Llama 3 has {N_RANKS:,}; the file is cut off or "
            f"belongs to another model (fetch it again, or use the model's tokenizer.json)"
        )
    return from_ranks(ranks, version or find_version(path.parent))


def read_ranks(path: Path) -> dict[bytes, int]:
    """The "base64 rank" lines of a tiktoken file, as token bytes -> rank.

    Raises:
        ValueError: a malformed line, a token or rank that comes twice, ranks that are not 0 … n-1.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(files.read_bytes(path).splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            value = int(rank)
        except (ValueError, binascii.Error):
            shown = line[:40].decode("utf-8", "backslashreplace")
            raise ValueError(
                f"{path}, line {number}: {shown!r}; expected a base64 token and its rank. "
                f"The file is damaged: fetch it again"
            ) from None
        if token in ranks:
            raise ValueError(
                f"{path}, line {number}: the token of rank {ranks[token]} comes again as rank "
                f"{value}; the file is damaged: fetch it again"
            )
        ranks[token] = value
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(
            f"{path}: {len(ranks)} tokens whose ranks are not 0 … {len(ranks) - 1} once each; "
            f"the file is damaged: fetch it again"
        )
    return ranks


def find_version(folder: Path) -> Version:
    """Which special tokens the model in `folder` has, from what lies beside its tokenizer.model.

    With no evidence it is "3.1": the two differ in what 128004, 128008 and 128010 are called, and
    only there does the name matter, because a 3.1+ model ends a message with 128008 (<|eom_id|>)
    and must be stopped by it. A 3.0 model never writes it.
    """
    for name in ("tokenizer_config.json", "tokenizer.json"):
        file = folder / name
        if file.is_file():
            text = files.read_bytes(file).decode("utf-8", "replace")
            if "<|begin_of_text|>" in text:
                return "3.1" if "<|eom_id|>" in text or "<|python_tag|>" in text else "3.0"
    params = read_json(folder / "params.json")
    if params:
        return "3.1" if params.get("use_scaled_rope") else "3.0"
    config = read_json(folder / "config.json")
    if "max_position_embeddings" in config:
        scaling: Any = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = scaling.get("rope_type", scaling.get("type"))
        return "3.1" if kind == "llama3" else "3.0"
    return "3.1"
