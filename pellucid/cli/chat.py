"""``pellucid chat``: a conversation with a model."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from pellucid.cli.arguments import ENGINES, add_model_arguments, load_model
from pellucid.cli.output import console, write_text
from pellucid.cli.writing import add_writing_arguments, sampling

if TYPE_CHECKING:
    from pellucid.generate import Conversation, Sampling

COMMANDS = """\
/system TEXT  set the system message, how the model should behave; no TEXT, none
/reset        forget the conversation, keep the system message
/help         print this list
Ctrl-C        stop an answer
Ctrl-D        leave"""


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid chat``."""
    add_model_arguments(parser)
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system message: tells the model how to behave (default: none)",
    )
    add_writing_arguments(parser, "until the model ends its answer or its context is full")
    parser.epilog = f"in the conversation:\n{COMMANDS}"


def chat(arguments: argparse.Namespace) -> None:
    """Questions from the keyboard (or a pipe, one per line), answers as they are written."""
    from pellucid.generate import Conversation

    how = sampling(arguments)
    lm = load_model(arguments)
    conversation = Conversation(lm.model, lm.tokenizer, arguments.system)
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  lets `input` edit the line and recall earlier ones

        console().print(f"{lm.name}: /help for commands, Ctrl-D to leave", style="dim")
    while (line := _question()) is not None:
        if line.startswith("/"):
            _command(conversation, line)
        elif line:
            _answer(conversation, line, how, arguments)


def _question() -> str | None:
    """The next line, or None at the end. Ctrl-C throws away a line that was begun."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            write_text("\n")
        return None
    except KeyboardInterrupt:
        write_text("\n")
        return ""


def _command(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest.strip() or None
    elif command == "/help":
        write_text(f"{COMMANDS}\n")
    else:
        write_text(f"{command} is no command; /help lists them\n")


def _answer(
    conversation: Conversation, question: str, how: Sampling, arguments: argparse.Namespace
) -> None:
    """Write one answer. What cannot be answered ends the turn, not the session."""
    pieces = conversation.answer(
        question,
        sampling=how,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        seed=arguments.seed,
        slide=arguments.slide,
        fast=ENGINES[arguments.engine],
    )
    try:
        with contextlib.closing(pieces):
            for number, piece in enumerate(pieces):
                if number == 0 and conversation.forgotten:
                    _note(f"the context is full: {_oldest(conversation.forgotten)} forgotten")
                write_text(piece)
    except KeyboardInterrupt:
        pass  # the part that was written stays in the conversation
    except ValueError as error:
        sys.stdout.flush()
        _note(str(error))
        return
    write_text("\n")
    if conversation.cut:
        _note(f"this answer was cut: {conversation.cut}")


def _oldest(turns: int) -> str:
    if turns == 1:
        return "the oldest question and its answer are"
    return f"the {turns} oldest questions and their answers are"


def _note(text: str) -> None:
    """A line beside the conversation, on the error stream so that a pipe holds answers alone."""
    sys.stdout.flush()
    print(f"pellucid chat: {text}", file=sys.stderr)
