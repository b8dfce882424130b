"""``pellucid generate`` and ``pellucid chat``."""

from __future__ import annotations

import argparse
import contextlib
import secrets
import sys
from typing import TYPE_CHECKING

from pellucid.cli.common import add_model_arguments, console, load_model, print_json

if TYPE_CHECKING:
    from pellucid.generate import Completion, Conversation, Sampling

FAST = {"auto": None, "fast": True, "plain": False}  # --engine
COMMANDS = """\
/system TEXT  how the model should behave from now on; without TEXT, nothing special
/reset        forget the conversation, keep the system message
/help         this list
Ctrl-C        stop an answer
Ctrl-D        leave"""


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid generate``."""
    parser.add_argument(
        "prompt",
        nargs="*",
        default=[""],
        metavar="PROMPT",
        help="text to continue, - for standard input; several make a batch, none starts a new text",
    )
    _add_text_arguments(parser, "128, less where the context ends before")
    parser.add_argument("--no-bos", action="store_true", help="do not begin with the bos token")
    parser.add_argument(
        "--specials",
        action="store_true",
        help="read <|…|> in the prompt as special tokens, not as text",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    add_model_arguments(parser)


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid chat``."""
    parser.add_argument("--system", metavar="TEXT", help="how the model should behave")
    _add_text_arguments(parser, "until the model ends its answer, or the context ends")
    add_model_arguments(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"in the conversation:\n{COMMANDS}"


def _add_text_arguments(parser: argparse.ArgumentParser, length: str) -> None:
    group = parser.add_argument_group("text")
    group.add_argument(
        "-n", "--max-new-tokens", type=int, metavar="N", help=f"tokens to write (default: {length})"
    )
    group.add_argument(
        "--temperature", type=float, default=0.8, help="0: always the likeliest (default 0.8)"
    )
    group.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest (default: all)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw from the likeliest that have probability P together (default 1: all)",
    )
    group.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from those at least P times as likely as the likeliest (default 0: all)",
    )
    group.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: make what was already written less likely (default 1)",
    )
    group.add_argument("--seed", type=int, help="the same seed gives the same text")
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text (repeatable)",
    )
    group.add_argument(
        "--slide",
        action="store_true",
        help="past the context, go on from the last tokens (GPT-2 always does)",
    )
    group.add_argument(
        "--engine",
        choices=("auto", "fast", "plain"),
        default="auto",
        help="plain: only the model's own code; fast: steps in C, on a GPU as CUDA graphs; "
        "auto: fast on a CPU as soon as it is compiled (default)",
    )


def _sampling(arguments: argparse.Namespace) -> Sampling:
    from pellucid.generate import Sampling

    return Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
    )


def generate(arguments: argparse.Namespace) -> None:
    """Continue one prompt, streaming, or several at once."""
    from pellucid.generate import encode_prompt, stream_text, usual_length

    sampling = _sampling(arguments)
    prompts = [_from_stdin() if prompt == "-" else prompt for prompt in arguments.prompt]
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    lm = load_model(arguments)
    bos = False if arguments.no_bos else None
    ids = [
        encode_prompt(lm.tokenizer, prompt, bos=bos, specials=arguments.specials)
        for prompt in prompts
    ]
    length = arguments.max_new_tokens
    if length is None:
        length = usual_length(lm.config, ids, slide=arguments.slide)
    stream = stream_text(
        lm.model,
        lm.tokenizer,
        ids,
        sampling=sampling,
        max_new_tokens=length,
        stop=arguments.stop,
        seed=seed,
        slide=arguments.slide,
        fast=FAST[arguments.engine],
    )
    if arguments.json:
        results = [
            _as_json(prompt, completion)
            for prompt, completion in zip(prompts, stream.complete(), strict=True)
        ]
        many = results[0] if len(results) == 1 else {"completions": results}
        print_json({"model": lm.name, "seed": seed, **many})
    elif len(prompts) == 1:
        if sys.stdout.isatty():
            console().print(prompts[0], style="dim", end="", markup=False)
        for (piece,) in stream:
            _write(piece)
        _write("\n")
    else:
        for prompt, completion in zip(prompts, stream.complete(), strict=True):
            _write(f"{prompt}{completion.text}\n\n")


def _from_stdin() -> str:
    """Standard input, without the line break that `echo` and editors put at the end."""
    return sys.stdin.read().removesuffix("\n")


def _as_json(prompt: str, completion: Completion) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt),
        "new_tokens": len(completion.tokens),
    }


def chat(arguments: argparse.Namespace) -> None:
    """Questions from the keyboard (or a pipe, one per line), answers as they are written."""
    from pellucid.generate import Conversation

    sampling = _sampling(arguments)
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
            _answer(conversation, line, sampling, arguments)


def _question() -> str | None:
    """The next line, or None at the end. Ctrl-C throws away a line that was begun."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        if sys.stdin.isatty():
            _write("\n")
        return None
    except KeyboardInterrupt:
        _write("\n")
        return ""


def _command(conversation: Conversation, line: str) -> None:
    command, _, rest = line.partition(" ")
    if command == "/reset":
        conversation.reset()
    elif command == "/system":
        conversation.system = rest.strip() or None
    elif command == "/help":
        _write(f"{COMMANDS}\n")
    else:
        _write(f"{command} is no command; /help lists them\n")


def _answer(
    conversation: Conversation, question: str, sampling: Sampling, arguments: argparse.Namespace
) -> None:
    """Write one answer. What cannot be answered ends the turn, not the session."""
    pieces = conversation.answer(
        question,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        seed=arguments.seed,
        slide=arguments.slide,
        fast=FAST[arguments.engine],
    )
    try:
        with contextlib.closing(pieces):
            for piece in pieces:
                _write(piece)
    except KeyboardInterrupt:
        pass  # the part that was written stays in the conversation
    except ValueError as error:
        sys.stdout.flush()
        print(f"pellucid chat: {error}; /reset begins anew", file=sys.stderr)
        return
    _write("\n")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
