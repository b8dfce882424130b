"""The engines: ours and the peers, each a small object that is prepared, prefilled and decoded.

    engine = make(NAME, path, threads)
    facts = engine.prepare()          the weights, ready to run
    engine.settle()                   as after running for long
    engine.prefill(rows, new=64)      prompts in, the first token of each row chosen
    tokens = engine.decode(64)        64 more for each row, greedily
    engine.close()

All engines get the same token ids and choose greedily; what a step costs does not depend on which
tokens they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol


class TimedEngine(Protocol):
    """What a worker drives."""

    def prepare(self) -> dict[str, Any]:
        """Load the weights; facts about them.

        "decode_bytes" is the bytes of weights that a step reads, "settings" one line that says how
        the engine is run.
        """
        ...

    def settle(self) -> None:
        """Do now what a long-running process has done already, such as moving to large pages."""
        ...

    def prefill(self, rows: Sequence[Sequence[int]], new: int) -> list[int]:
        """Forget what was, take these prompts in, with room for `new` tokens; each row's first."""
        ...

    def decode(self, n: int) -> list[list[int]]:
        """`n` more tokens of each row, as n lists of one token per row."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


@dataclass(frozen=True, kw_only=True)
class Spec:
    """An engine before it exists.

    name     as it is printed and chosen: family, mode if there is more than one, number type
    module   where its class `Runner` is, in this package
    package  what the interpreter must be able to import
    files    what it reads: "hf:DTYPE" or "gguf:TYPE"; "" for nothing
    dtype    its number type in torch's words: which peak of the matrix product bounds it
    options  keyword arguments of the Runner
    loads    whether it reads the weights, so that its load time means something
    bits     of one weight: what a worker will roughly take of memory
    """

    name: str
    module: str
    package: str
    files: str
    dtype: str
    options: dict[str, Any]
    loads: bool = True
    bits: float = 16


_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 9, "int4": 5}
_GGUF = {"f32": 32, "bf16": 16, "f16": 16, "q8_0": 8.5, "q4_0": 5}


def _specs() -> Iterator[Spec]:
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        working = "float32" if dtype == "float32" else "bfloat16"
        for mode in ("eager", "fast"):
            yield Spec(
                name=f"pellucid/{mode}/{dtype}",
                module="ours",
                package="torch",
                files=f"hf:{dtype}",
                dtype=working,
                options={"dtype": dtype, "fast": mode == "fast"},
                bits=_BITS[dtype],
            )
    for dtype in ("float32", "bfloat16"):
        for mode, compiled in (("", False), ("compiled/", True)):
            yield Spec(
                name=f"transformers/{mode}{dtype}",
                module="transformers",
                package="transformers",
                files=f"hf:{dtype}",
                dtype=dtype,
                options={"dtype": dtype, "compiled": compiled},
                bits=_BITS[dtype],
            )
    for dtype in ("float32", "bfloat16"):
        yield Spec(
            name=f"litgpt/{dtype}",
            module="litgpt",
            package="litgpt",
            files=f"hf:{dtype}",
            dtype=dtype,
            options={"dtype": dtype},
            loads=False,
            bits=_BITS[dtype],
        )
    for kind, bits in _GGUF.items():
        yield Spec(
            name=f"llama.cpp/{kind}",
            module="llama_cpp",
            package="llama_cpp",
            files=f"gguf:{kind}",
            dtype="float32" if kind == "f32" else "bfloat16",
            options={},
            bits=bits,
        )


def specs() -> dict[str, Spec]:
    """Name -> every engine that this version of Pellucid knows how to drive."""
    return {spec.name: spec for spec in _specs()}


def make(name: str, path: Path, threads: int) -> TimedEngine:
    """The engine called `name`, not yet prepared; imports what it needs.

    The torch of this process is set to `threads` threads.
    """
    spec = specs()[name]
    module = import_module(f"{__name__}.{spec.module}")
    return module.Runner(path, threads, **spec.options)
