"""SentencePiece: `tokenizer.model` of Llama 1 and 2, a protocol buffer of pieces and scores.

A space is written as the piece character ▁ (U+2581), encoding puts one in front of the text, and
decoding takes it away again. A character that no piece covers becomes its UTF-8 bytes, one token
<0xE2> each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING

from pellucid import files
from pellucid.tokenizers.base import PIECES, Tokenizer, check_ids, is_ordinary
from pellucid.tokenizers.chat import Llama2Chat, chat_for
from pellucid.tokenizers.marked import Part
from pellucid.tokenizers.neighbours import Roles, added_tokens, find_roles
from pellucid.tokenizers.pieces import USER_DEFINED, number_field, pieces_in, with_names

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

LLAMA2_PIECES = 32_000
_MODEL = "tokenizer.model"
_NOT_STRIPPING = {"<unk>", "<s>", "<|endoftext|>"}
_NOWHERE = Path(os.devnull)  # no file is in it


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model. Decoding equals the library's own, except that invalid UTF-8 is
    replaced per cut character (as everywhere in Python) and not per byte.

    With `encode(specials=True)` each stretch of text between two special tokens is encoded on its
    own, with its own space in front: this is how Meta's code builds a conversation.

    Encoding is linear: 0.2 s for a million equal letters, spaces or line breaks.
    """

    def __init__(
        self,
        engine: SentencePieceProcessor,
        folder: Path | None = None,
        roles: Roles | None = None,
        stripping: bool = False,
    ) -> None:
        """`folder`: where files that name roles and a chat template may lie beside the model;
        `roles`: where they are known already; `stripping`: marks take the white space behind them
        with them, as Phi-3's do."""
        size, model = engine.vocab_size(), engine.serialized_model_proto()
        pieces = [engine.id_to_piece(id) for id in range(size)]
        specials = {pieces[id]: id for id in range(size) if engine.is_control(id)}
        ids = dict(zip(pieces, range(size), strict=True))
        added = _added(folder, ids) if folder else {}
        specials |= {name: id for name, (id, special) in added.items() if special}
        ids |= {name: id for name, (id, _) in added.items()}
        # The library says -1 for "none".
        begin, end = ([pieces[id]] if id >= 0 else [] for id in (engine.bos_id(), engine.eos_id()))
        roles = roles or find_roles(folder or _NOWHERE, ids, bos=begin, eos=end)
        table = [_piece_bytes(engine, id) for id in range(size)]
        last = max([size - 1, *(id for id, _ in added.values())])
        texts: dict[int, bytes] = {id: name.encode() for name, (id, _) in added.items()}
        super().__init__(
            kind=PIECES,
            table=[*table, *(texts.get(id) for id in range(size, last + 1))],
            specials=specials,
            bos_id=roles.bos_id,
            eos_id=roles.eos_id,
            stop_ids=roles.stop_ids,
            adds_bos=roles.adds_bos is not False,
            marks=self._marks(model, roles) | {name: id for name, (id, _) in added.items()},
        )
        self._engine = engine
        # A mark among the pieces is inert in text only under a name that no text spells.
        inert = {name: f"{token_hex(16)}{id}" for name, id in self.controls.items() if id < size}
        inert = {name: other for name, other in inert.items() if name not in specials}
        self._plain = engine_of(with_names(model, inert), self.kind) if inert else engine
        self._unknown = engine.unk_id()
        names = self.controls.keys() - _NOT_STRIPPING if stripping else ()
        self._stripping = frozenset(self.controls[name] for name in names)
        # Only pieces carry the space that encoding added; a byte token 0x20 is a space of the text.
        self._spaced = frozenset(id for id in range(size) if pieces[id].startswith("▁"))
        # Whether encoding puts a space in front is not in the library's interface, so try it.
        self._adds_space = "".join(engine.encode("a", out_type=str)).startswith("▁")
        self.chat = chat_for(
            self,
            roles.chat_template,
            roles.template_values,
        )
        if self.chat is None and size >= LLAMA2_PIECES and self.bos_id is not None:
            self.chat = Llama2Chat(self)

    @staticmethod
    def _marks(model: bytes, roles: Roles) -> dict[str, int]:
        """Pieces that are taken whole wherever text spells them, and that are no words."""
        template = roles.chat_template or ""
        if number_field(3, USER_DEFINED) not in model:  # as in most: not a field says so
            return {}
        return {
            piece.text: id
            for id, piece in enumerate(pieces_in(model))
            if piece.type == USER_DEFINED
            and not piece.text.isspace()
            and (id in roles.stop_ids or piece.text in template or not is_ordinary(piece.text))
        }

    def _encode_plain(self, text: str) -> list[int]:
        return self._plain.encode(text)

    def _encode_specials(self, text: str) -> list[int]:
        return self.encode_parts(self.split_specials(text))

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        return super().encode_parts(self._stripped(parts))

    def _stripped(self, parts: Iterable[Part]) -> Iterator[Part]:
        before: Part = ""
        for part in parts:
            text = isinstance(part, str) and before in self._stripping
            yield part.lstrip() if text and isinstance(part, str) else part
            before = part

    def _at_start(self, id: int, data: bytes) -> bytes:
        return data[1:] if self._adds_space and id in self._spaced else data

    def token_string(self, id: int) -> str:
        # Decoding an unknown piece gives " ⁇ ", which says less than its name.
        return "<unk>" if id == self._unknown else super().token_string(id)


def _added(folder: Path, pieces: dict[str, int]) -> dict[str, tuple[int, bool]]:
    """Tokens that the files in `folder` add to the model's own pieces.

    Raises ValueError where one takes the id of another piece, or is a word or white space: such a
    token cuts ordinary text, which the sentencepiece library does not know.
    """
    added = added_tokens(folder)
    size = len(pieces)
    check_ids((id for id, _ in added.values()), size + len(added), str(folder))
    ids: dict[int, str] = {id: name for name, id in pieces.items()}
    for name, (id, special) in added.items():
        if ids.setdefault(id, name) != name or pieces.get(name, id) != id:
            raise ValueError(
                f"{folder}: the added token {name!r} has the id {id}, but the model has "
                f"{ids[id]!r} there: do the files belong together?"
            )
        if name not in pieces and not special and is_ordinary(name):
            raise ValueError(
                f"{folder} adds the word {name!r} to the tokens, which {_MODEL} does not know; "
                "save the tokenizer as tokenizer.json (transformers does) and load that"
            )
    return {name: found for name, found in added.items() if name not in pieces}


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
        ValueError: the file is no SentencePiece model, or tokens were added beside it that it
            cannot have.
    """
    return SentencePieceTokenizer(engine_of(files.read_bytes(path), str(path)), path.parent)


def engine_of(model: bytes, name: str) -> SentencePieceProcessor:
    """The library's engine for the content of a `.model` file; ValueError where it is none."""
    from sentencepiece import SentencePieceProcessor

    engine = SentencePieceProcessor()
    try:
        engine.LoadFromSerializedProto(model)
        size = engine.vocab_size()
    except RuntimeError as error:
        raise ValueError(
            f"{name}: the sentencepiece library cannot read it ({error}); fetch it again"
        ) from None
    if size == 0:
        raise ValueError(f"{name}: a SentencePiece model without pieces; fetch it again")
    return engine
