"""Text to train on, and text that breaks tokenizers."""

from __future__ import annotations

import random

CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock, they're late!\n\n"
    "def f(x):\n    return x  # naïve façade\n\n\t日本語のテキスト, русский текст, 🦙🦙 emoji.\n"
    "aaaa bbbb aaaa the the then there other mother; and everything is    spaced   out.\r\n"
)


def long_texts(size: int) -> dict[str, str]:
    draw = random.Random(0)
    letters = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=size))
    return {
        "one letter": "a" * size,
        "spaces": " " * size,
        "spaces, then a word": " " * size + "x",
        "line breaks": "\n" * size,
        "punctuation, then line breaks": "!" + "\r\n" * (size // 2) + " x",
        "white space": " \t" * (size // 2) + "\n  y",
        "letters": letters,
        "punctuation": "!" * size,
        "CJK": "".join(chr(draw.randint(0x4E00, 0x9FFF)) for _ in range(size // 4)),
        "just below the limit": (" " * 24_999 + "x") * (size // 25_000),
        "words": "the quick brown fox " * (size // 20),
    }
