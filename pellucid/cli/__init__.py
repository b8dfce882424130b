"""The command line: ``pellucid VERB``.

A verb lives in a module that holds two functions: ``VERB_arguments(parser)`` and
``VERB(arguments) -> exit status | None``. Nothing but this table is read to print the help, and
only the module of the verb that runs is imported.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

import pellucid

# verb -> (module, one line of help)
VERBS = {
    "walk": ("pellucid.cli.inside", "from the text to the next token, one named tensor at a time"),
    "trace": ("pellucid.cli.inside", "write every named tensor of a run into a file"),
    "diff": ("pellucid.cli.diff", "where two implementations of one model part, and why"),
    "generate": ("pellucid.cli.text", "continue a prompt"),
    "chat": ("pellucid.cli.text", "talk with a model"),
    "info": ("pellucid.cli.info", "what a model is made of, counted, without loading it"),
    "plan": ("pellucid.cli.plan", "what training takes on so many cards, nothing allocated"),
    "train": ("pellucid.cli.train", "train a small model from raw text"),
    "finetune": ("pellucid.cli.finetune", "teach a model text, answers, labels or preferences"),
    "eval": ("pellucid.cli.evaluate", "loss, perplexity and bits per byte over text"),
    "bench": ("pellucid.cli.bench", "how fast, against this machine's own limits"),
    "convert": ("pellucid.cli.convert", "between the layouts, with a proof that nothing was lost"),
    "fetch": ("pellucid.cli.fetch", "download a model from the Hub"),
}
USER_ERRORS = (ValueError, OSError, KeyError, IndexError, TypeError, NotImplementedError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; the exit status: 0, what the verb says, or 2 for an error a user can cause."""
    try:
        status = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # not at exit, where a reader that has left can no longer be met
    except BrokenPipeError:  # `pellucid … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"pellucid {pellucid.__version__}")
        return 0
    verb = argv[0]
    if verb not in VERBS:
        return _complain(verb, f"no such verb; expected one of {', '.join(VERBS)}")
    return _run(verb, argv[1:])


def _run(verb: str, argv: list[str]) -> int:
    module_name, line = VERBS[verb]
    module = import_module(module_name)
    parser = argparse.ArgumentParser(prog=f"pellucid {verb}", description=_sentence(line))
    getattr(module, f"{verb}_arguments")(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    arguments = parser.parse_args(argv)
    usual_format = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"pellucid {verb}: {_one_line(message)}\n"
    try:
        return getattr(module, verb)(arguments) or 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        raise  # an OSError, but nobody's error: see main
    except USER_ERRORS as error:
        if arguments.traceback:
            raise
        return _complain(verb, error.args[0] if isinstance(error, KeyError) else error)
    finally:
        warnings.formatwarning = usual_format


def _complain(verb: str, what: object) -> int:
    print(f"pellucid {verb}: {_one_line(what)}", file=sys.stderr)
    return 2


def _one_line(what: object) -> str:
    return " ".join(str(what).split())


def _sentence(line: str) -> str:
    return line[0].upper() + line[1:] + "."


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {line}" for verb, (_, line) in VERBS.items())
    return (
        "Pellucid: language models you can see through.\n\n"
        "usage: pellucid VERB [OPTIONS]\n\n"
        f"{verbs}\n\n"
        "A model is a folder (Meta's or Hugging Face's layout), owner/name on the Hub, or one\n"
        "that ships with the package: demo (a Llama, the default) and demo-gpt2.\n"
        "pellucid VERB --help says what a verb takes."
    )
