"""llama.cpp as a reference: logits of every position and token ids, with nothing but float32.

Its defaults keep keys and values in float16; here they are float32 and attention is not fused, so
that what is left is the order in which it adds up.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_FLOAT32, _NOT_FUSED = 0, 0
_QUIET: list[Any] = []  # the library keeps a pointer to it as long as the process lives


class LlamaCpp:
    """A GGUF file in llama.cpp, used with ``with``."""

    def __init__(self, path: Path, vocabulary_only: bool = False) -> None:
        import llama_cpp

        self._library: Any = llama_cpp
        if not _QUIET:
            _QUIET.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
        llama_cpp.llama_log_set(_QUIET[0], ctypes.c_void_p(0))
        how: Any = llama_cpp.llama_model_default_params()
        how.vocab_only = vocabulary_only
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), how)
        assert model, f"llama.cpp cannot load {path}"
        self._model: Any = model
        self._vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._size = llama_cpp.llama_vocab_n_tokens(self._vocab)

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self._library.llama_model_free(self._model)

    def logits(self, tokens: Sequence[int], steps: int = 0) -> tuple[list[int], np.ndarray]:
        """The tokens and `steps` more, chosen greedily; logits after each of them but the last.

        The prompt is one pass, each further token one more, with the cache.
        """
        library, seen = self._library, list(tokens)
        how = library.llama_context_default_params()
        how.n_ctx, how.n_seq_max = -(-(len(seen) + steps) // 256) * 256, 1
        how.n_threads = how.n_threads_batch = 1
        how.type_k = how.type_v = _FLOAT32
        how.flash_attn_type, how.swa_full = _NOT_FUSED, False
        context: Any = library.llama_init_from_model(self._model, how)
        assert context, "llama.cpp cannot make a context"
        try:
            found = self._pass(context, seen, 0)
            for _ in range(steps - 1):
                seen.append(int(found[-1].argmax()))
                found = np.concatenate((found, self._pass(context, seen[-1:], len(seen) - 1)))
            if steps:
                seen.append(int(found[-1].argmax()))
        finally:
            library.llama_free(context)
        return seen, found

    def _pass(self, context: Any, tokens: Sequence[int], past: int) -> np.ndarray:
        batch: Any = self._library.llama_batch_init(len(tokens), 0, 1)
        try:
            for place, token in enumerate(tokens):
                batch.token[place], batch.pos[place] = token, past + place
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
                batch.logits[place] = True
            batch.n_tokens = len(tokens)
            status = self._library.llama_decode(context, batch)
            assert status == 0, f"llama_decode failed with status {status}"
            rows = [
                np.ctypeslib.as_array(
                    self._library.llama_get_logits_ith(context, place), (self._size,)
                ).copy()
                for place in range(len(tokens))
            ]
        finally:
            self._library.llama_batch_free(batch)
        return np.stack(rows)

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Token ids of a text, no BOS in front."""
        data = text.encode()
        room = (self._library.llama_token * (len(data) + 16))()
        count = self._library.llama_tokenize(
            self._vocab, data, len(data), room, len(room), False, specials
        )
        assert count >= 0, "more tokens than bytes"
        return list(room[:count])
