"""Seeded damage: to bytes, to JSON by its structure, to text. All chance is a `random.Random`'s."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

SIZES = (
    0,
    1,
    2,
    7,
    8,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63 - 1,
    2**64 - 1,
)
WORDS = (
    "", "\0", "a" * 5000, "\ud800", "é\u202e", "../../../../etc/passwd", "/dev/zero", "{{ 7 * 7 }}",
    "{% for a in range(10**12) %}x{% endfor %}", "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "!!python/object/apply:os.system ['touch executed']", "%s%n", "*", "nan", "-1", "1e999",
    "<|im_start|>", "<s>", "Ġ", "(a+)+$", "model.layers.0.self_attn.q_proj.weight",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    *SIZES, -1, -(2**31), -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), True, None, 400_000_000,
)  # fmt: skip


def value(draw: random.Random) -> Any:
    """Something that JSON can hold and nobody expects."""
    kind = draw.randrange(6)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice(WORDS)
    if kind == 3:
        return [value(draw) for _ in range(draw.randrange(4))]
    if kind == 4:
        return {draw.choice(WORDS): value(draw) for _ in range(draw.randrange(3))}
    nested: Any = draw.choice((0, "x"))
    for _ in range(draw.choice((3, 30, 200))):
        nested = [nested] if draw.random() < 0.5 else {"a": nested}
    return nested


def damaged_json(text: str, draw: random.Random) -> bytes:
    """JSON text with some values replaced, dropped, moved or doubled; at times as broken bytes."""
    if draw.random() < 0.15:
        return damaged_bytes(text.encode(), draw)
    found = json.loads(text)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        holders = list(_holders(found))
        if not holders:
            break
        holder = draw.choice(holders)
        place = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        what = draw.randrange(5)
        if what == 0:
            del holder[place]
        elif what == 1 and isinstance(holder, dict):
            holder[draw.choice(WORDS)] = holder.pop(place)
        elif what == 2:
            other = draw.choice(holders)
            holder[place] = copy.deepcopy(other) if _depth(other) < 20 else None
        else:
            holder[place] = value(draw)
    return json.dumps(found).encode("utf-8", "surrogatepass")


def damaged_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes cut, doubled, flipped, or with a size in them overwritten."""
    made = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 5))):
        place = draw.randrange(len(made) + 1)
        # Headers hold what matters, and they come first.
        place = place if draw.random() < 0.4 else place % 256 % (len(made) + 1)
        what = draw.randrange(6)
        if what == 0:
            del made[place:]
        elif what == 1 and place < len(made):
            made[place] ^= 1 << draw.randrange(8)
        elif what == 2:
            size = draw.choice(SIZES).to_bytes(8, "little")[: draw.choice((1, 2, 4, 8))]
            made[place : place + len(size)] = size
        elif what == 3:
            made[place:place] = made[place : place + draw.choice((1, 8, 64, 1000))]
        elif what == 4:
            del made[place : place + draw.choice((1, 4, 100))]
        else:
            made[place:place] = draw.choice(WORDS).encode("utf-8", "surrogatepass")
    return bytes(made)


def damaged_text(text: str, draw: random.Random) -> bytes:
    """Text with words of `WORDS` and numbers of `NUMBERS` put in, lines moved, or broken bytes."""
    if draw.random() < 0.3:
        return damaged_bytes(text.encode(), draw)
    parts = text.split(" ") if draw.random() < 0.5 else text.split("\n")
    between = " " if "\n" in "".join(parts) else "\n"
    for _ in range(draw.choice((1, 2, 3))):
        place = draw.randrange(len(parts))
        new = draw.choice(WORDS) if draw.random() < 0.6 else str(draw.choice(NUMBERS))[:500]
        what = draw.randrange(3)
        parts[place : place + (what > 0)] = [new] if what < 2 else [parts[place]] * 3
    return between.join(parts).encode("utf-8", "surrogatepass")


def _holders(found: Any) -> list[Any]:
    inside: list[Any] = []
    waiting = [found]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict | list) and here:
            inside.append(here)
            waiting.extend(here.values() if isinstance(here, dict) else here[:50])
    return inside


def _depth(found: Any) -> int:
    deepest, level = 0, [found]
    while level and deepest < 30:
        level = [v for h in level if isinstance(h, dict | list)
                 for v in (h.values() if isinstance(h, dict) else h)]  # fmt: skip
        deepest += 1
    return deepest
