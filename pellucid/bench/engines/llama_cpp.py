"""llama.cpp as an engine, through the C interface that llama-cpp-python exposes.

No Python of the peer stands in its inner loop: one ``llama_decode`` per step, then an argmax over
the logits where they lie. Settings are its defaults but for the threads: memory-mapped weights,
repacking where it likes, flash attention as it decides, a float16 KV cache.

Imports neither PyTorch nor the rest of Pellucid, so that any interpreter with llama-cpp-python
will do. As a program it quantises: ``python -m pellucid.bench.engines.llama_cpp SRC DST TYPE``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pellucid.gguf_file import read_header

_FILE_TYPES = {  # llama.cpp's enum llama_ftype
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q4_k_m": 15, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
_QUIET: list[Any] = []  # the callback: the library keeps a pointer to it while the process lives
_MOST_TOKENS = 4096  # of one call of llama_decode: a prefill of 8 rows fits


class Runner:
    """A GGUF file with greedy choice."""

    def __init__(self, path: Path, threads: int) -> None:
        self._numpy: Any = import_module("numpy")
        self._library: Any = import_module("llama_cpp")
        self._path, self._threads = path, threads
        self._contexts: dict[tuple[int, int], Any] = {}
        self._batch = self._library.llama_batch_init(_MOST_TOKENS, 0, 1)

    def prepare(self) -> dict[str, Any]:
        """Map the file."""
        library = self._library
        if not _QUIET:
            _QUIET.append(library.llama_log_callback(lambda level, text, data: None))
        library.llama_log_set(_QUIET[0], ctypes.c_void_p(0))
        library.llama_backend_init()
        parameters = library.llama_model_default_params()
        self._model = library.llama_model_load_from_file(str(self._path).encode(), parameters)
        if not self._model:
            raise ValueError(f"{self._path}: llama.cpp cannot load this file")
        header = read_header(self._path)
        looked_up = {"position_embd.weight"}
        if "output.weight" in header.tensors:
            looked_up.add("token_embd.weight")
        self._vocab_size = header.tensors["token_embd.weight"].shape[0]
        read = sum(each.nbytes for name, each in header.tensors.items() if name not in looked_up)
        return {
            "decode_bytes": read,
            "settings": f"llama-cpp-python {library.__version__}, its defaults",
        }

    def settle(self) -> None:
        """No warm-up is needed."""

    def prefill(self, rows: Sequence[Sequence[int]], new: int) -> list[int]:
        """One batch of all prompts, logits of each row's last token."""
        self._context = self._context_for(len(rows), len(rows[0]) + new + 1)
        library = self._library
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        self._length = 0
        return self._run(rows)

    def decode(self, n: int) -> list[list[int]]:
        """`n` batches of one token per row."""
        return [self._run([[token] for token in self._chosen]) for _ in range(n)]

    def _context_for(self, rows: int, room: int) -> Any:
        """A context for so many rows of so many tokens, made once for each size."""
        room = -(-room // 256) * 256
        if (rows, room) not in self._contexts:
            parameters = self._library.llama_context_default_params()
            parameters.n_ctx, parameters.n_seq_max = rows * room, rows
            parameters.n_batch = _MOST_TOKENS
            parameters.n_threads = parameters.n_threads_batch = self._threads
            context = self._library.llama_init_from_model(self._model, parameters)
            if not context:
                raise ValueError(f"llama.cpp cannot make a context for {rows} × {room} tokens")
            self._contexts[rows, room] = context
        return self._contexts[rows, room]

    def _run(self, rows: Sequence[Sequence[int]]) -> list[int]:
        batch, place, last = self._batch, 0, []
        for row, tokens in enumerate(rows):
            for offset, token in enumerate(tokens):
                batch.token[place] = token
                batch.pos[place] = self._length + offset
                batch.n_seq_id[place] = 1
                batch.seq_id[place][0] = row
                batch.logits[place] = offset == len(tokens) - 1
                place += 1
            last.append(place - 1)
        batch.n_tokens = place
        self._length += len(rows[0])
        status = self._library.llama_decode(self._context, batch)
        if status:
            raise ValueError(f"llama_decode failed with status {status}")
        self._chosen = [self._likeliest(place) for place in last]
        return self._chosen

    def _likeliest(self, place: int) -> int:
        logits = self._library.llama_get_logits_ith(self._context, place)
        return int(self._numpy.ctypeslib.as_array(logits, (self._vocab_size,)).argmax())

    def close(self) -> None:
        """Free contexts and model."""
        for context in self._contexts.values():
            self._library.llama_free(context)
        self._library.llama_model_free(self._model)


def quantise(source: Path, target: Path, kind: str) -> None:
    """A GGUF file from another one, as ``llama-quantize SOURCE TARGET KIND`` makes it."""
    library: Any = import_module("llama_cpp")
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = _FILE_TYPES[kind]
    parameters.allow_requantize = True  # the source is bfloat16
    beside = target.with_name(target.name + ".part")
    failed = library.llama_model_quantize(
        str(source).encode(), str(beside).encode(), ctypes.byref(parameters)
    )
    if failed:
        raise ValueError(f"llama.cpp cannot quantise {source} to {kind}")
    beside.replace(target)


if __name__ == "__main__":
    quantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
