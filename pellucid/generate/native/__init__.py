"""Decoding in C: the model's own step, near the speed at which weights can be read.

| file | holds |
|---|---|
| decode.c | one decoding step: norms, products, rotation, attention, on threads of its own |
| kernels.h | a matrix times a few vectors, for AVX-512, AVX2, NEON and anything else |
| build.py | compiles them once for this processor |
| kept.py | keeps what was compiled, and loads nothing else |
| structures.py | the model's tensors and features, as decode.c reads them |
| decoder.py | which models it can run; a step's tokens in, its logits out |
| recording.py | a step's own tensors, under the names of a trace |
| pages.py | moves matrices to large memory pages, once that pays |
"""

from pellucid.generate.native.build import NotBuilt, building, instruction_sets, library
from pellucid.generate.native.decoder import MOST, NativeDecoder, settle, unsupported
from pellucid.generate.native.pages import account
from pellucid.generate.native.recording import Recording

__all__ = [
    "MOST",
    "NativeDecoder",
    "NotBuilt",
    "Recording",
    "account",
    "building",
    "instruction_sets",
    "library",
    "settle",
    "unsupported",
]
