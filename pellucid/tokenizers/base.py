"""What all tokenizers and chat formats share: their interfaces, decoding whole and by token.

Text is a sequence of Unicode characters, a token is a sequence of bytes, and the two do not
line up: one character may need several tokens. So decoding works on bytes and makes text of them at
the very end.
"""

from __future__ import annotations

import codecs
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from pellucid.tokenizers.marked import Part, parts

Message = Mapping[str, Any]  # {"role": "system" | "user" | "assistant" | …, "content": text}

# End-of-text and end-of-turn tokens by name, in every family loaded here. A model that has one of
# them and writes it has finished its answer, whatever the one `eos_token` of its configuration
# says.
STOP_NAMES = frozenset({"<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "</s>"})

# Kinds of tokenizer.model: pieces with scores, or base64 ranks, as in the releases of Llama 3
PIECES, RANKS = "sentencepiece", "llama3"


class Tokenizer:
    """Text to token ids and back. One subclass per engine; `pellucid.tokenizers.load` makes them.

    Attributes:
        kind: the format it was read from: RANKS, PIECES, "gpt2", "gguf" or "tokenizer.json".
        vocab_size: number of ids; valid ids are 0 … vocab_size - 1.
        bos_id, eos_id: the token that begins and that ends a text, or None where there is none.
        adds_bos: whether the model expects its prompts to begin with `bos_id` (Llama does, GPT-2
            does not). `encode` never adds it by itself.
        stop_ids: generation ends at any of these.
        specials: name -> id of the tokens that the files call special.
        controls: name -> id of all tokens that no ordinary text encodes to: the special ones, and
            added tokens that a model reads as marks whatever they are called (`encode`).
        chat: how a conversation is written for this model, or None where that is unknown. That a
            format is known does not mean that this model was trained on it: base models share the
            tokenizer of the tuned ones.
    """

    def __init__(
        self,
        *,
        kind: str,
        table: Sequence[bytes | None],
        specials: dict[str, int],
        bos_id: int | None,
        eos_id: int | None,
        stop_ids: Iterable[int] = (),
        adds_bos: bool = False,
        marks: Mapping[str, int] | None = None,
    ) -> None:
        """`table[id]`: the bytes that the token adds to a text; None where an id has no token.
        `marks`: tokens beside the special ones that ordinary text must not encode to."""
        self.kind = kind
        self.specials = specials
        self.controls = specials | dict(marks or {})
        self.bos_id, self.eos_id = bos_id, eos_id
        self.adds_bos = adds_bos and bos_id is not None
        named = {id for name, id in self.controls.items() if name in STOP_NAMES}
        self.stop_ids: frozenset[int] = frozenset(
            {*stop_ids, *named, *([] if eos_id is None else [eos_id])}
        )
        self.chat: ChatFormat | None = None
        self._table = table
        self._special_ids = frozenset(specials.values())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.kind}: {self.vocab_size} tokens>"

    @property
    def vocab_size(self) -> int:
        """Number of ids; valid ids are 0 … vocab_size - 1."""
        return len(self._table)

    @cached_property
    def unused_ids(self) -> frozenset[int]:
        """Ids below `vocab_size` that no token has; a model may have logits for them."""
        return frozenset(id for id, token in enumerate(self._table) if token is None)

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, specials: bool = False
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: any string. Lone surrogates (halves of a character, as broken JSON delivers them)
                have no UTF-8 form; each becomes U+FFFD, the replacement character, so that a server
                survives them. Two halves that belong together become their character.
            bos, eos: put the begin or end token around it.
            specials: read text that spells one of `controls` as that token. Off by default, so
                that what a user types cannot end a turn or start another.

        Raises:
            ValueError: `bos` or `eos` is asked for and the tokenizer has none.
        """
        text = valid_unicode(text)
        ids = self._encode_specials(text) if specials else self._encode_plain(text)
        if bos:
            ids.insert(0, self._require(self.bos_id, "bos"))
        if eos:
            ids.append(self._require(self.eos_id, "eos"))
        return ids

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        """Token ids of a text given in parts: a control token's id, text that stays text whatever
        it spells, or ids to take as they are."""
        ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                ids += self._encode_plain(valid_unicode(part))
            elif isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(part)
        return ids

    def decode(self, ids: Iterable[int], skip_specials: bool = False) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; specials show by name, or not.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return self.decode_bytes(ids, skip_specials).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], skip_specials: bool = False) -> bytes:
        """As `decode`, before the bytes are read as UTF-8: nothing is lost at a cut character."""
        checked = [operator.index(id) for id in ids]
        parts = [self._bytes_of(id, skip_specials) for id in checked]
        for place, part in enumerate(parts):
            if part:
                parts[place] = self._at_start(checked[place], part)
                break
        return b"".join(parts)

    def token_string(self, id: int) -> str:
        """One token for display; bytes that are no whole character show as escapes like \\xe2."""
        return self._bytes_of(operator.index(id), False).decode("utf-8", "backslashreplace")

    def stream(self, skip_specials: bool = False, after: Iterable[int] = ()) -> StreamDecoder:
        """A decoder to push tokens into as they are generated.

        `after` holds the ids that already stand before them, usually the prompt: it decides whether
        a leading space is kept and completes a character that the prompt cut in half.
        """
        return StreamDecoder(self, skip_specials, after)

    # What an engine provides ----------------------------------------------------------------------

    def _encode_plain(self, text: str) -> list[int]:
        """Ids of valid Unicode text in which no control token is recognised."""
        raise NotImplementedError

    def _encode_specials(self, text: str) -> list[int]:
        """Ids of valid Unicode text in which control tokens are recognised."""
        ids: list[int] = []
        for part in self.split_specials(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._encode_plain(part))
        return ids

    def _at_start(self, id: int, data: bytes) -> bytes:
        """`data` of a text's first token, less what encoding puts in front (SentencePiece's ▁)."""
        return data

    # Shared ---------------------------------------------------------------------------------------

    def split_specials(self, text: str) -> list[int | str]:
        """`text` cut at the control tokens it spells: their ids, and the texts between, if any."""
        if self._special_pattern is None:
            return [text] if text else []
        parts = self._special_pattern.split(text)
        return [
            self.controls[part] if odd else part
            for place, part in enumerate(parts)
            if (odd := place % 2) or part
        ]

    @cached_property
    def _special_pattern(self) -> re.Pattern[str] | None:
        # Longest first: where one name begins with another, the longer one is meant.
        names = sorted(filter(None, self.controls), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None

    def _bytes_of(self, id: int, skip_specials: bool) -> bytes:
        if not 0 <= id < len(self._table):
            raise ValueError(
                f"token id {id} is outside this tokenizer's 0 … {len(self._table) - 1}; "
                f"do the model and the tokenizer belong together?"
            )
        if skip_specials and id in self._special_ids:
            return b""
        data = self._table[id]
        if data is None:
            raise ValueError(f"no token has the id {id} (this {self.kind} vocabulary has gaps)")
        return data

    def _require(self, id: int | None, which: str) -> int:
        if id is None:
            raise ValueError(
                f"{which}=True, but this {self.kind} tokenizer names no {which} token; "
                f"pass {which}=False"
            )
        return id


class ChatFormat:
    """Turns a conversation into token ids. `name` says which format it is."""

    name = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    tells_tools = False  # whether it has a place for tools and calls of them

    def encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of the conversation, begin token included.

        Args:
            messages: each with "role" and "content", both text.
            add_generation_prompt: end with what makes the model write the assistant's next message.
            tools: what the assistant may call, as JSON objects, for a format that tells it.

        Raises:
            ValueError: a message without role or content, or an order of roles that the format
                cannot write.
        """
        if not messages:
            raise ValueError("a conversation needs at least one message, got none")
        for number, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(
                        f"message {number}: {key!r} is {message.get(key)!r}; expected text"
                    )
        if not self.tells_tools and (tools or any(each.get("tool_calls") for each in messages)):
            raise ValueError(f"the chat format {self.name} has no place for tools and their calls")
        return self._encode(messages, add_generation_prompt, tools)

    def _encode(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        raise NotImplementedError

    def _ids(self, text: str) -> list[int]:
        """Ids of a text of which some may be the format's own, or tokens that the model wrote."""
        return self.tokenizer.encode_parts(parts(text, self.tokenizer.split_specials))


class StreamDecoder:
    """Text of tokens that arrive one at a time.

    All that `push` and the last `flush` return, joined, is what `decode` returns for all ids. A
    piece never holds half a character: bytes wait until the rest of their character arrives.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_specials: bool = False, after: Iterable[int] = ()
    ) -> None:
        self._tokenizer, self._skip_specials = tokenizer, skip_specials
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._started = False
        for id in after:
            self.push(id)

    def push(self, id: int) -> str:
        """The text that becomes certain with this token; often "".

        Raises:
            ValueError: an id outside the vocabulary.
        """
        id = operator.index(id)
        data = self._tokenizer._bytes_of(id, self._skip_specials)
        if data and not self._started:
            self._started = True
            data = self._tokenizer._at_start(id, data)
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What still waits when no token follows: U+FFFD for an unfinished character, else ""."""
        return self._utf8.decode(b"", final=True)


def check_ids(ids: Iterable[object], count: int, name: str) -> None:
    """ValueError for ids of `count` tokens that are no whole numbers, or far beyond their count.

    A table is as long as the largest id. Real vocabularies have gaps of some thousands; one id of
    400 million in a small file would take gigabytes.
    """
    most = 2 * count + 100_000
    for id in ids:
        if not isinstance(id, int) or isinstance(id, bool) or not 0 <= id < most:
            raise ValueError(
                f"{name}: a token has the id {id!r}; expected a whole number from 0 to {most - 1} "
                f"for {count} tokens: the file is damaged, fetch it again"
            )


def is_ordinary(name: str) -> bool:
    """Whether an added token is a word or white space, which text may well hold: no mark."""
    return all(part.isalnum() or part.isspace() or part in "▁_'" for part in name)


def valid_unicode(text: str) -> str:
    """`text` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
