"""The parser of a verb: argparse, with its errors in one line that names the nearest flag."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from typing import NoReturn

from pellucid.cli.arguments import settle_model
from pellucid.spelling import suggestion


class VerbHelp(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of an epilog, and names such as llama-3-8b in one piece."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class VerbParser(argparse.ArgumentParser):
    """Errors end with status 2 and one line on standard error; usage is what ``--help`` prints."""

    words: Sequence[str] = ()

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, formatter_class=VerbHelp)

    def parse_words(self, words: Sequence[str]) -> argparse.Namespace:
        """As `parse_args`; an error names a flag among `words` that does not exist."""
        self.words = words
        given, beyond = self.parse_known_args(words)
        if beyond and not any(word.startswith("-") for word in beyond):
            # argparse gives all positional arguments what stands before the first flag
            given, beyond = self.parse_known_intermixed_args(words)
        if beyond:
            self.error(f"unrecognized arguments: {' '.join(beyond)}")
        problem = settle_model(given)
        if problem:
            self.error(problem)
        for action in self._actions:
            if _beyond(getattr(given, action.dest, None)):
                name = "/".join(action.option_strings) or action.dest
                self.error(f"argument {name}: a whole number beyond 2^63")
        return given

    def error(self, message: str) -> NoReturn:
        """Write one line, about the mistyped flag if there is one, and end with status 2."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for word in long_flags(self.words):
            if not any(flag.startswith(word) for flag in flags):  # argparse takes abbreviations
                hint = suggestion(word, flags) or f"; {self.prog} --help lists the flags"
                message = f"there is no flag {word}{hint}"
                break
        self.exit(2, f"{self.prog}: {' '.join(message.split())}\n")


def _beyond(value: object) -> bool:
    """Whether there is a whole number in a value that takes more than 64 bits: none is meant."""
    if isinstance(value, list | tuple):
        return any(map(_beyond, value))
    return isinstance(value, int) and abs(value) >= 1 << 63


def long_flags(words: Sequence[str]) -> list[str]:
    """The words that argparse takes for long flags, without values written behind ``=``."""
    until = words.index("--") if "--" in words else len(words)
    given = [word.partition("=")[0] for word in words[:until] if word.startswith("--")]
    return [flag for flag in given if " " not in flag]  # argparse: text, such as a prompt
