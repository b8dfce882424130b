"""The command line: ``pellucid VERB``.

A verb lives in a module that holds two functions: ``VERB_arguments(parser)`` and
``VERB(arguments) -> exit status | None``. Nothing but this table is read to print the help, and
only the module of the verb that runs is imported.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import pellucid

# verb -> (module, one line of help)
VERBS = {
    "walk": ("pellucid.cli.walk", "show each step from a text to the next token"),
    "trace": ("pellucid.cli.trace", "write every named tensor of a run into a file"),
    "diff": ("pellucid.cli.diff", "find where two implementations of a model differ, and why"),
    "generate": ("pellucid.cli.generate", "continue a prompt"),
    "chat": ("pellucid.cli.chat", "talk with a model"),
    "serve": (
        "pellucid.cli.serve",
        "serve the explorer and OpenAI's API for models, on this machine",
    ),
    "info": ("pellucid.cli.info", "count a model's parameters, bytes and FLOPs, draw its parts"),
    "code": ("pellucid.cli.code", "write one model's forward as one plain Python file"),
    "plan": ("pellucid.cli.plan", "estimate what training takes on a number of GPUs"),
    "train": ("pellucid.cli.train", "train a small model from raw text"),
    "finetune": ("pellucid.cli.finetune", "fine-tune on text, answers, labels or preferences"),
    "eval": ("pellucid.cli.evaluate", "measure perplexity on text, accuracy on tasks or labels"),
    "bench": ("pellucid.cli.bench", "measure speed against this machine's own limits"),
    "doctor": (
        "pellucid.cli.doctor",
        "check that this machine computes correctly, and how to be faster",
    ),
    "convert": ("pellucid.cli.convert", "write a model in another format, and prove it the same"),
    "fetch": ("pellucid.cli.fetch", "download a model from the Hub"),
}
_LONGEST_LINE = 1600  # characters of an error
USER_ERRORS = (ValueError, OSError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0, what the verb says, or 2 for an error a user can cause."""
    from pellucid.cli.streams import abandon_output, lasting_interrupts, prepare_streams

    prepare_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    status = 0
    try:
        with lasting_interrupts():
            status = _dispatch(words)
        sys.stdout.flush()  # here, not at exit: there a failure could only be a traceback
    except BrokenPipeError:  # `pellucid … | head`
        abandon_output()
        return 0
    except KeyboardInterrupt:
        return _say_interrupted()
    except Exception as error:
        if _was_interrupted(error):
            return _say_interrupted()
        if not isinstance(error, OSError) or "--traceback" in words:
            raise
        abandon_output()  # a full disk behind standard output
        return status or _complain(words[0] if words else "help", error)
    return status


def _was_interrupted(error: BaseException) -> bool:
    """Whether an error arose while something was left after Ctrl-C, half of it done or undone."""
    before = error.__context__
    return before is not None and (
        isinstance(before, KeyboardInterrupt) or _was_interrupted(before)
    )


def _say_interrupted() -> int:
    with contextlib.suppress(OSError):
        print(file=sys.stderr)
    return 130


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"pellucid {pellucid.__version__}")
        return 0
    verb = words[0]
    if verb not in VERBS:
        from pellucid.spelling import suggestion

        expected = f"no such verb; expected one of {', '.join(VERBS)}"
        return _complain(verb, expected + suggestion(verb, VERBS))
    return _run(verb, words[1:])


def _run(verb: str, words: list[str]) -> int:
    from pellucid.cli.parser import VerbParser

    module_name, line = VERBS[verb]
    module = import_module(module_name)
    parser = VerbParser(prog=f"pellucid {verb}", description=_sentence(line))
    getattr(module, f"{verb}_arguments")(parser)
    parser.add_argument(
        "--traceback", action="store_true", help="after an error, show where in the code it arose"
    )
    arguments = parser.parse_words(words)
    usual_format = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"pellucid {verb}: {_one_line(message)}\n"
    try:
        _check_device(arguments)
        return getattr(module, verb)(arguments) or 0
    except BrokenPipeError:
        raise  # an OSError, but no mistake of the user: see main
    except USER_ERRORS as error:
        if arguments.traceback or _was_interrupted(error):
            raise
        return _complain(verb, error)
    finally:
        warnings.formatwarning = usual_format


def _check_device(arguments: object) -> None:
    """ValueError where ``--device``, of whichever verb, is not in this machine."""
    device = getattr(arguments, "device", None)
    if device not in (None, "cpu"):
        from pellucid.devices import as_device

        as_device(device)


def _complain(verb: str, what: object) -> int:
    with contextlib.suppress(OSError):
        print(f"pellucid {verb}: {_one_line(what)}", file=sys.stderr)
    return 2


def _one_line(what: object) -> str:
    """One line that a terminal can show: no control characters, no more than a screen of text."""
    line = " ".join(str(what).split())
    if len(line) > _LONGEST_LINE:
        line = f"{line[: _LONGEST_LINE // 2]} … {line[-_LONGEST_LINE // 2 :]}"
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in line
    )


def _sentence(line: str) -> str:
    return line[0].upper() + line[1:] + "."


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    return (
        "Pellucid: language models you can see through.\n\n"
        "usage: pellucid VERB [OPTIONS]\n\n"
        f"{verbs}\n\n"
        "A model is a folder (Meta's or Hugging Face's layout), a GGUF file, owner/name\n"
        "on the Hub, or a name: demo (a Llama, the default), demo-gpt2, stdlib, stdlib-gpt2\n"
        "or smollm2.\n"
        "pellucid VERB --help lists the arguments of a verb."
    )
