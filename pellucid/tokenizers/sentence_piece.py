"""SentencePiece: `tokenizer.model` of Llama 1 and 2, a protocol buffer of pieces and scores.

A space is written as the piece character ▁ (U+2581), encoding puts one in front of the text, and
decoding takes it away again. A character that no piece covers becomes its UTF-8 bytes, one token
<0xE2> each.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pellucid.tokenizers.base import Tokenizer
from pellucid.tokenizers.chat import Llama2Chat, chat_for
from pellucid.tokenizers.neighbours import find_roles

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

LLAMA2_PIECES = 32_000


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Decoding equals the library's own, except that invalid UTF-8 is
    replaced per cut character (as everywhere in Python) and not per byte.

    With `encode(specials=True)` each stretch of text between two special tokens is encoded on its
    own, with its own space in front: this is how Meta's code builds a conversation.

    Encoding is linear: 0.2 s for a million equal letters, spaces or line breaks.
    """

    def __init__(self, engine: SentencePieceProcessor, folder: Path | None = None) -> None:
        """`folder`: where files that name roles and a chat template may lie beside the model."""
        size = engine.vocab_size()
        pieces = [engine.id_to_piece(id) for id in range(size)]
        specials = {pieces[id]: id for id in range(size) if engine.is_control(id)}
        roles = find_roles(folder, dict(zip(pieces, range(size), strict=True))) if folder else None
        bos_id, eos_id = engine.bos_id(), engine.eos_id()
        super().__init__(
            kind="sentencepiece",
            table=[_piece_bytes(engine, id) for id in range(size)],
            specials=specials,
            # The library says -1 for "none".
            bos_id=bos_id if bos_id >= 0 else None,
            eos_id=eos_id if eos_id >= 0 else None,
            stop_ids=roles.stop_ids if roles else (),
            adds_bos=roles is None or roles.adds_bos is not False,
        )
        self._engine = engine
        self._unknown = engine.unk_id()
        # Only pieces carry the space that encoding added; a byte token 0x20 is a space of the text.
        self._spaced = frozenset(id for id in range(size) if pieces[id].startswith("▁"))
        # Whether encoding puts a space in front is not in the library's interface, so try it.
        self._adds_space = "".join(engine.encode("a", out_type=str)).startswith("▁")
        self.chat = chat_for(
            self,
            roles.chat_template if roles else None,
            roles.template_values if roles else {},
        )
        if self.chat is None and size >= LLAMA2_PIECES and self.bos_id is not None:
            self.chat = Llama2Chat(self)

    def _encode_plain(self, text: str) -> list[int]:
        return self._engine.encode(text)

    def _at_start(self, id: int, data: bytes) -> bytes:
        return data[1:] if self._adds_space and id in self._spaced else data

    def token_string(self, id: int) -> str:
        # Decoding an unknown piece gives " ⁇ ", which says less than its name.
        return "<unk>" if id == self._unknown else super().token_string(id)


def _piece_bytes(engine: SentencePieceProcessor, id: int) -> bytes:
    piece = engine.id_to_piece(id)
    if engine.is_control(id):
        return piece.encode()
    if engine.is_unknown(id):
        return engine.decode([id]).encode()
    if engine.is_byte(id):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode()


def from_file(path: Path) -> SentencePieceTokenizer:
    """A SentencePiece `.model` file.

    Raises:
        ValueError: the file is no SentencePiece model, or tokens were added beside it.
    """
    from sentencepiece import SentencePieceProcessor

    if (path.parent / "added_tokens.json").is_file():
        raise ValueError(
            f"{path.parent / 'added_tokens.json'} adds tokens that {path.name} does not know; "
            f"save the tokenizer as tokenizer.json (transformers does) and load that"
        )
    engine = SentencePieceProcessor()
    try:
        engine.LoadFromSerializedProto(path.read_bytes())
        size = engine.vocab_size()
    except RuntimeError as error:
        raise ValueError(
            f"{path}: the sentencepiece library cannot read it ({error}); fetch it again"
        ) from None
    if size == 0:
        raise ValueError(f"{path}: a SentencePiece model without pieces; fetch it again")
    return SentencePieceTokenizer(engine, path.parent)
