"""``pellucid generate``: continue a prompt, or several at once."""

from __future__ import annotations

import argparse
import secrets
import sys
from typing import TYPE_CHECKING

from pellucid.cli.arguments import ENGINES, add_model_arguments, add_shared, load_model, read_prompt
from pellucid.cli.output import console, print_json, write_text
from pellucid.cli.writing import add_writing_arguments, sampling

if TYPE_CHECKING:
    from pellucid.generate import Completion


def generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pellucid generate``."""
    add_model_arguments(parser)
    parser.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="text to continue, - to read it from standard input; several prompts are continued in "
        "one batch (default: begin a new text)",
    )
    add_shared(parser, "--no-bos")
    parser.add_argument(
        "--specials",
        action="store_true",
        help="read <|…|> in the prompt as special tokens (default: as ordinary text)",
    )
    add_writing_arguments(parser, "128, or what is left of the model's context")
    add_shared(parser.add_argument_group("speed"), "--draft")
    add_shared(parser.add_argument_group("output"), "--json")


def generate(arguments: argparse.Namespace) -> None:
    """Continue one prompt, streaming, or several at once."""
    from pellucid.generate import default_length, encode_prompt, stream_text

    how = sampling(arguments)
    prompts = [read_prompt(prompt) for prompt in arguments.prompt or [""]]
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    lm = load_model(arguments)
    bos = False if arguments.no_bos else None
    ids = [
        encode_prompt(lm.tokenizer, prompt, bos=bos, specials=arguments.specials)
        for prompt in prompts
    ]
    length = arguments.max_new_tokens
    if length is None:
        length = default_length(lm.config, ids, slide=arguments.slide)
    stream = stream_text(
        lm.model,
        lm.tokenizer,
        ids,
        sampling=how,
        max_new_tokens=length,
        stop=arguments.stop,
        seed=seed,
        slide=arguments.slide,
        fast=ENGINES[arguments.engine],
        draft=None if arguments.draft is None else lm.draft_model(arguments.draft),
    )
    if not arguments.json and len(prompts) == 1:
        if sys.stdout.isatty():
            console().print(prompts[0], style="dim", end="", markup=False)
        for (piece,) in stream:
            write_text(piece)
        write_text("\n")
        return
    texts = list(zip(prompts, stream.complete(), strict=True))
    if arguments.json:
        results = [_as_json(prompt, completion) for prompt, completion in texts]
        if arguments.draft is not None and len(results) == 1:
            results[0] |= _guesses(texts[0][1], stream.proposed)
        many = results[0] if len(results) == 1 else {"completions": results}
        print_json({"model": lm.name, "seed": seed, **many})
    else:
        for prompt, completion in texts:
            write_text(f"{prompt}{completion.text}\n\n")


def _as_json(prompt: str, completion: Completion) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "tokens": completion.tokens,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": len(completion.prompt),
        "new_tokens": len(completion.tokens),
    }


def _guesses(completion: Completion, proposed: int) -> dict[str, object]:
    """Which tokens were taken ahead: places in ``tokens``, and how many the draft proposed."""
    places: dict[str, list[int]] = {"draft": [], "lookup": []}
    for place, source in completion.guessed.items():
        places[source].append(place)
    return {"drafted": places["draft"], "looked_up": places["lookup"], "proposed": proposed}
