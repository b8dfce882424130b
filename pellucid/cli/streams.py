"""What a terminal gives a verb: streams that are open and fail at no character, and Ctrl-C."""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, Literal, TextIO

# For an output that knows only ASCII or Latin-1; one for one where columns and maps are drawn.
_REPLACEMENTS = {
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("─━═┄┈", "-"),
    **dict.fromkeys("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛╞╡╪┡┩╇", "+"),
    **dict.fromkeys("–—−", "-"),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("“”", '"'),
    "█": "#", "▓": "=", "▒": "-", "░": ".", "·": ".", "⋮": ":", "×": "x", "✗": "x", "✓": "v",
    "≈": "~", "≤": "<=", "≥": ">=", "→": "->", "←": "<-", "⊕": "(+)", "…": "...", "‖": "||",
    "√": "sqrt", "∞": "inf", "ᵀ": "^T", "²": "^2", "μ": "mu", "σ": "sigma", "Σ": "sum",
    "θ": "theta", "λ": "lambda", "ε": "epsilon",
}  # fmt: skip
_HANDLER = "pellucid-spell"


def prepare_streams() -> None:
    """Open what was closed (``>&-``) on the null device; spell out what cannot be encoded.

    The null device takes the numbers 0, 1 and 2 first, so that no file a verb opens gets one of
    them and is written into by a library that prints.
    """
    sys.stdin = sys.stdin or _null("r")
    sys.stdout = sys.stdout or _null("w")
    sys.stderr = sys.stderr or _null("w")
    codecs.register_error(_HANDLER, _spell)
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None and sys.stdout.errors == "strict":
        reconfigure(errors=_HANDLER)


def abandon_output() -> None:
    """Point standard output at the null device: its pipe is closed, or its disk is full."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def lasting_interrupts() -> Iterator[None]:
    """A Ctrl-C that Python loses ends the work all the same, a moment later.

    Where it falls into a destructor or a weak reference's callback (each import has one), Python
    tells `sys.unraisablehook` and goes on, as if no key had been pressed.
    """
    before, alarm = sys.unraisablehook, getattr(signal, "SIGALRM", None)
    if alarm is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def tell(lost: Any) -> None:
        if lost.exc_type is KeyboardInterrupt:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            before(lost)

    handler = signal.signal(alarm, signal.default_int_handler)
    sys.unraisablehook = tell
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = before
        signal.signal(alarm, handler)


def can_encode(characters: str, stream: TextIO) -> bool:
    """Whether a stream's encoding has all of these characters."""
    try:
        characters.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _null(mode: Literal["r", "w"]) -> TextIO:
    return open(os.devnull, mode, encoding="utf-8")


def _spell(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: each character that cannot be encoded in ASCII signs, else ``?``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_REPLACEMENTS.get(sign, "?") for sign in lost), error.end
