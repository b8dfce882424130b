"""KV caches that generations begin from: what they share with an earlier text of the model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pellucid.generate.paged import PagedCache
from pellucid.models import Cache, Model

PIECE = 256  # tokens: a prompt is read in passes that end at multiples of it, see engine.py


class KeptCache:
    """The KV cache of one row, kept from one generation to the next of the same model.

    A prompt that begins like the tokens it holds is run only from where they part. Each turn of a
    chat repeats the whole conversation: with this it costs only what is new.
    """

    def __init__(self) -> None:
        self.forget()

    def empty(self, model: Model) -> Cache:
        """A new cache for a text of the model."""
        return Cache(model.config.n_layers)

    def forget(self) -> None:
        """Empty the cache."""
        self._cache: Cache | None = None
        self._tokens: Sequence[int] = ()  # the first `_length` of them are in the cache
        self._length = 0

    def begin(self, prompt: Sequence[int], model: Model) -> tuple[Cache, Tensor | None]:
        """The cache, cropped to what `prompt` shares with it; its last token is left to run."""
        shared = shared_length(self._tokens[: self._length], prompt, len(prompt) - 1)
        if self._cache is None or shared == 0:
            return self.empty(model), None
        self._length = shared
        self._cache.crop(shared)
        return self._cache, None

    def hold(
        self, cache: Cache, tokens: Sequence[int], exact: int, logits: Tensor | None = None
    ) -> None:
        """`cache` holds the first of `tokens`; called once a whole pass has ended."""
        self._cache, self._tokens, self._length = cache, tokens, cache.length


@dataclass(eq=False)
class _Entry:
    """A generation's cache. Places below `exact` are the bits that any other would compute."""

    cache: Cache
    tokens: Sequence[int]  # grows while its generation writes
    exact: int
    read: int = 0  # tokens of the prompt, once all are read; `logits` (1, V) follow them
    logits: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return self.cache.tensors + ([] if self.logits is None else [self.logits])


class PrefixStore:
    """The caches of a model's latest generations, for prompts that begin as theirs did.

    A prompt takes over what it shares, block by block (`paged.py`), or as a copy: the places of a
    text never change once they are written, so the donor may still be writing. Only bits that the
    prompt alone would compute are shared: whole pieces of prompts (in the C decoder, whose tokens
    do not change one another's bits, any tokens), or all of an equal prompt with its logits. The
    least recently used entries go first when they hold more than `most_bytes`; one thread at a
    time.
    """

    def __init__(
        self, most_bytes: int, *, any_length: bool = False, paged: bool = False, most: int = 64
    ) -> None:
        """any_length: any number of tokens can be shared; paged: in blocks; most: entries, which a
        prompt is held against one by one."""
        self._paged, self._most_bytes, self._any_length, self._most = (
            paged,
            most_bytes,
            any_length,
            most,
        )
        self._entries: OrderedDict[int, _Entry] = OrderedDict()  # by id of the cache, latest last
        self.reused = 0  # tokens that did not have to be read again

    @property
    def nbytes(self) -> int:
        """Bytes of the caches that can be shared, of live generations too; each block once."""
        held = {id(one): one for entry in self._entries.values() for one in entry.tensors}
        return sum(one.nbytes for one in held.values())

    def sharable(self, tokens: int) -> int:
        """How many first ones of so many tokens two texts can share."""
        return tokens if self._any_length else tokens // PIECE * PIECE

    def empty(self, model: Model) -> Cache:
        """A new cache for a text of the model."""
        return PagedCache(model) if self._paged else Cache(model.config.n_layers)

    def forget(self) -> None:
        """A generation goes on with another cache than it held; what is stored stays as it is."""

    def begin(
        self, prompt: Sequence[int], model: Model, *, whole: bool = True
    ) -> tuple[Cache, Tensor | None]:
        """A new cache with what is known of `prompt`; if that is all, also the logits after it.

        whole: False leaves the last token to be run in any case.
        """
        best, longest = None, 0
        for entry in reversed(self._entries.values()):
            if whole and entry.logits is not None and entry.tokens[: entry.read] == prompt:
                self._use(entry, len(prompt))
                return entry.cache.shared(len(prompt)), entry.logits.clone()
            shared = shared_length(entry.tokens[: entry.exact], prompt, len(prompt) - 1)
            shared = self.sharable(shared)
            if shared > longest:
                best, longest = entry, shared
        if best is None:
            return self.empty(model), None
        self._use(best, longest)
        return best.cache.shared(longest), None

    def hold(
        self, cache: Cache, tokens: Sequence[int], exact: int, logits: Tensor | None = None
    ) -> None:
        """`cache` holds the first of `tokens`, the first `exact` of them in bits that others share.

        logits (1, V): of the token after the prompt, which is all of `tokens` then.
        """
        entry = self._entries.get(id(cache))
        if entry is None:
            entry = self._entries[id(cache)] = _Entry(cache, tokens, exact)
            self._make_room()
        entry.exact = exact
        if logits is not None:
            entry.read, entry.logits = len(tokens), logits.clone()

    def _make_room(self) -> None:
        while self._entries and (len(self._entries) > self._most or self.nbytes > self._most_bytes):
            self._entries.popitem(last=False)

    def _use(self, entry: _Entry, length: int) -> None:
        self._entries.move_to_end(id(entry.cache))
        self.reused += length


def shared_length(tokens: Sequence[int], prompt: Sequence[int], most: int) -> int:
    """How many first tokens two texts share, at most `most`."""
    shared, most = 0, min(len(tokens), most)
    while shared + PIECE <= most and (
        tokens[shared : shared + PIECE] == prompt[shared : shared + PIECE]
    ):
        shared += PIECE
    while shared < most and tokens[shared] == prompt[shared]:
        shared += 1
    return shared
