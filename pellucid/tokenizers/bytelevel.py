"""Byte-level BPE through tiktoken: GPT-2, Llama 3, and each tokenizer.json that is built alike.

A regular expression cuts the text into pieces, and inside a piece the pair of neighbours with the
lowest rank is merged until no pair is known (Sennrich et al. 2016; on bytes: Radford et al. 2019).
tiktoken does exactly this with rank = token id. The textbook form stands in
tests/tokenizers/textbook_bpe.py, and the tests hold this against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from pellucid.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    import tiktoken


@dataclass(frozen=True, kw_only=True)
class Split:
    """A pattern that cuts text into pieces.

    `newline_pieces`: white space up to its last line break is a piece of its own, and line breaks
    right after punctuation belong to the punctuation (Llama 3 and its relatives; not GPT-2).
    """

    pattern: str
    newline_pieces: bool


GPT2_SPLIT = Split(
    pattern=r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    newline_pieces=False,
)
LLAMA3_SPLIT = Split(
    pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    newline_pieces=True,
)
# Llama 3's with single digits: Qwen 2 and many small Llama-shaped models.
SINGLE_DIGIT_SPLIT = Split(
    pattern=LLAMA3_SPLIT.pattern.replace(r"\p{N}{1,3}", r"\p{N}"), newline_pieces=True
)
KNOWN_SPLITS = (GPT2_SPLIT, LLAMA3_SPLIT, SINGLE_DIGIT_SPLIT)

# tiktoken's regular expression engine keeps one stack entry per character that `\s+(?!\S)` may give
# back, and panics at a million of them. A fortieth of that leaves room and is more white space in
# one run than real text has.
LONGEST_SPACE = 25_000
# Unicode's White_Space, which is \s in tiktoken; Python's \s has four more (U+001C … U+001F).
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# The look-behind lets a match start only where a run starts, else the search is quadratic in the
# run's length.
_LONG_SPACE = re.compile(f"(?<![{_SPACE}])[{_SPACE}]{{{LONGEST_SPACE},}}")


class ByteLevelTokenizer(Tokenizer):
    """Byte-level BPE by ranks.

    Encoding is linear in practice (about 0.5 s for a million letters without a space; tiktoken ≥
    0.13, older ones are quadratic in the length of a piece) and the result is that of the whole
    text, without exception: a long run of white space is cut at the places where the pattern itself
    cuts it (`_cut_space`).
    """

    def __init__(
        self,
        ranks: dict[bytes, int],
        split: Split,
        specials: dict[str, int],
        *,
        kind: str,
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: Iterable[int] = (),
        adds_bos: bool = False,
    ) -> None:
        """`ranks`: bytes of a token -> its id; lower ids merge first; all 256 bytes are in it.

        Raises:
            ValueError: a byte is missing, or two tokens share an id.
        """
        import tiktoken

        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(
                f"{len(missing)} of the 256 single bytes have no token (the first is "
                f"0x{missing[0]:02x}); a byte-level vocabulary needs all of them"
            )
        by_id: dict[int, bytes] = {id: token for token, id in ranks.items()}
        by_id.update((id, name.encode()) for name, id in specials.items())
        if len(by_id) != len(ranks) + len(specials):
            raise ValueError(
                f"{len(ranks)} tokens and {len(specials)} special tokens share {len(by_id)} ids; "
                f"every token needs its own"
            )
        super().__init__(
            kind=kind,
            table=[by_id.get(id) for id in range(max(by_id) + 1)],
            specials=specials,
            bos_id=bos_id,
            eos_id=eos_id,
            stop_ids=stop_ids,
            adds_bos=adds_bos,
        )
        self._ranks, self._split = ranks, split
        self._engine = tiktoken.Encoding(
            kind, pat_str=split.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def _encode_plain(self, text: str) -> list[int]:
        if not _may_hold_long_space(text):
            return self._engine.encode_ordinary(text)
        ids: list[int] = []
        done = 0
        for run in _LONG_SPACE.finditer(text):
            head, cuts = self._cut_space(text, run.start(), run.end())
            ids += self._engine.encode_ordinary(text[done:head])
            for start, end in zip([head, *cuts], cuts, strict=False):
                ids += self._one_piece.encode_ordinary(text[start:end])
            done = cuts[-1] if cuts else head
        return ids + self._engine.encode_ordinary(text[done:])

    def _cut_space(self, text: str, start: int, end: int) -> tuple[int, list[int]]:
        """How the pattern cuts the white space text[start:end], a whole run.

        No alternative of the patterns looks back, so matching may stop at any piece's end and go on
        from there.

        Returns:
            where the run's first own piece starts (line breaks before it belong to punctuation),
            and where each of its pieces ends. What is left, at most one character, goes with the
            text behind it.
        """
        head, cuts = start, []
        if self._split.newline_pieces:
            if start > 0 and not _is_letter_or_number(text[start - 1]):
                while head < end and text[head] in "\r\n":
                    head += 1
            last_break = max(text.rfind("\r", head, end), text.rfind("\n", head, end))
            if last_break >= 0:
                cuts.append(last_break + 1)
        rest = cuts[-1] if cuts else head
        # `\s+(?!\S)` takes the rest at the end of the text, and all but one character before
        # something visible.
        last = end if end == len(text) else end - 1
        if last > rest:
            cuts.append(last)
        return head, cuts

    @cached_property
    def _one_piece(self) -> tiktoken.Encoding:
        """The same merges without cutting; made only when white space has to be cut by hand."""
        import tiktoken

        return tiktoken.Encoding(
            f"{self.kind} piece",
            pat_str=r"(?s:.+)",
            mergeable_ranks=self._ranks,
            special_tokens={},
        )


def _may_hold_long_space(text: str) -> bool:
    """False if the text surely has no run of LONGEST_SPACE; a hundredth of the work of looking."""
    # Such a run covers one of the blocks of half its length. isspace() takes more than \s does.
    block = LONGEST_SPACE // 2
    return len(text) >= LONGEST_SPACE and any(
        text[start : start + block].isspace() for start in range(0, len(text), block)
    )


@cache
def _letters_and_numbers() -> tiktoken.Encoding:
    import tiktoken

    single_bytes = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding(
        "classes", pat_str=r"[\p{L}\p{N}]", mergeable_ranks=single_bytes, special_tokens={}
    )


def _is_letter_or_number(character: str) -> bool:
    # Asked of the engine itself: Python's unicodedata knows another version of Unicode, with fewer
    # letters.
    return bool(_letters_and_numbers().encode_ordinary(character))


@cache
def byte_characters() -> dict[str, int]:
    """Character -> byte, as the files of byte-level BPE write tokens in printable text (GPT-2).

    Printable bytes of Latin-1 stand for themselves; the others, in order, take the characters from
    U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + place): byte for place, byte in enumerate(others)
    }


def token_bytes(written: str) -> bytes:
    """The bytes of a token as byte-level files write it: "Ġthe" -> b" the".

    Raises:
        KeyError: a character that stands for no byte.
    """
    characters = byte_characters()
    return bytes(characters[character] for character in written)


def ranks_from_merges(
    vocab: dict[str, int], merges: list[tuple[str, str]], whole_pieces: bool = False
) -> dict[bytes, int] | None:
    """Ranks with which merging by id gives what the list gives, or None where there are none.

    A list merges listed pairs in its order; ranks merge any neighbours that spell a token, lowest
    id first. The merges inside a stretch of text that nothing outside is merged with are those of
    the stretch alone, so a token is only ever made of the one pair that its own text comes down
    to. Hence the two agree if the list makes tokens in the order of their ids and has that pair
    for each token. Training gives such lists; those joined from two vocabularies may not be such.

    Args:
        vocab: written token -> id.
        merges: pairs of written tokens, first merge first.
        whole_pieces: a piece that is a token is taken whole, without merging ("ignore_merges").
            tiktoken always does. Without it, tokens that merging never makes would stay unused.
    """
    characters = byte_characters()
    if not characters.keys() <= vocab.keys() or not characters.keys() >= set().union(*vocab):
        return None
    last = 0
    for left, right in merges:
        id = vocab.get(left + right, -1)
        if id < last or left not in vocab or right not in vocab:
            return None
        last = id
    # Llama 3's list has every pair, and tokens that no pair makes; a trained one has one pair each.
    if not (whole_pieces and _has_every_pair(vocab, merges)) and not _makes_all(vocab, merges):
        return None
    return {token_bytes(token): id for token, id in vocab.items()}


def _has_every_pair(vocab: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether the list has each way to put a token together from two others."""
    listed = set(merges)
    return all(
        (token[:cut], token[cut:]) in listed or token[:cut] not in vocab or token[cut:] not in vocab
        for token in vocab
        for cut in range(1, len(token))
    )


def _makes_all(vocab: dict[str, int], merges: list[tuple[str, str]]) -> bool:
    """Whether the text of every token comes down to a listed pair."""
    parts: dict[str, tuple[str, str]] = {}
    made: dict[tuple[str, str], int] = {}
    for left, right in merges:
        id = vocab[left + right]
        if vocab[left] >= id or vocab[right] >= id:
            return False
        if left + right not in parts and _stays_whole(left, right, vocab, parts, made):
            parts[left + right] = left, right
        made[left, right] = id
    return len(parts) == len(vocab) - 256


def _stays_whole(
    left: str,
    right: str,
    ids: dict[str, int],
    parts: dict[str, tuple[str, str]],
    made: dict[tuple[str, str], int],
) -> bool:
    """Whether merging the text of `left` and `right` comes down to these two.

    Goes back in time from the two: whichever was made later falls apart, and two that stood at the
    border together must have no merge that came before one of them changed.
    """
    while len(left) > 1 or len(right) > 1:
        if len(left) > 1 and (len(right) == 1 or ids[left] > ids[right]):
            if left not in parts:
                return False
            limit, left = ids[left], parts[left][1]
        else:
            if right not in parts:
                return False
            # Of equal merges that overlap the first in the text is done, here the one across.
            limit, right = ids[right] + 1, parts[right][0]
        if made.get((left, right), limit) < limit:
            return False
    return True
