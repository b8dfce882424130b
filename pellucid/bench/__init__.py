"""How fast, against this machine's own limits: the measurements behind ``pellucid bench``.

A decoding step reads every weight once, so memory bandwidth bounds it; a prefill multiplies large
matrices, so the matrix units bound it. Both bounds are measured first and again between the runs,
because they change while one looks: another guest of the same machine, a warmer chip.

    orchestrator ──JSON lines──┬── worker: the machine itself (bandwidth, matrix product)
      (rounds.py)              ├── worker: pellucid/fast/bfloat16
                               ├── worker: transformers/bfloat16
                               └── worker: llama.cpp/bf16         one process per engine, A B A B …

Importing this package imports nothing heavy: a worker may run in an interpreter that has neither
PyTorch nor Pellucid's dependencies, only the peer it drives.
"""
