"""`pellucid.diff`: a model, or a recording of one, against another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pellucid import graph, names
from pellucid.checkpoints.formats.gguf import GGUFWeights
from pellucid.devices import as_dtype
from pellucid.diff.options import Options
from pellucid.diff.replay.operations import SOURCES, leaf
from pellucid.diff.report import Report
from pellucid.diff.served import diff_served, is_served
from pellucid.diff.sides.foreign_side import (
    home,
    notes_of,
    recorded_modules,
    without_weights,
    write_map,
)
from pellucid.diff.sides.live import LIVE, live_folder, live_side
from pellucid.diff.sides.maps import UnknownNames, load_map, section_of
from pellucid.diff.sides.propose import as_yaml, propose_map
from pellucid.diff.sides.record import calls_of
from pellucid.diff.sides.recordings import (
    check_length,
    check_recording,
    in_memory_order,
    load_recording,
    named,
)
from pellucid.diff.sides.side import Batch, Side, demand_room, from_model, from_trace
from pellucid.diff.sides.wrappers import unwrapped
from pellucid.diff.stages import compare
from pellucid.diff.training.record import are_steps, diff_steps
from pellucid.generate.fast import trace_fast
from pellucid.language_model import LanguageModel, load
from pellucid.models import Decoder, Model, empty_model
from pellucid.models.quantised import is_quantised
from pellucid.prompts import Prompt, check_tokens, padded
from pellucid.trace import Trace

if TYPE_CHECKING:
    from pellucid.diff.replay.judge import Keep
    from pellucid.diff.stages import Progress

DEFAULT_PROMPT = "The quick brown fox jumps over the lazy dog. 1 2 3 4 5 6 7 8 9 10"


def diff(
    a: Any,
    b: Any,
    prompt: Prompt | Sequence[Sequence[int]] | None = None,
    *,
    steps: int = 0,
    dtype_a: str | torch.dtype | None = None,
    dtype_b: str | torch.dtype | None = None,
    dialect_a: str | None = None,
    dialect_b: str | None = None,
    fused: bool = False,
    copies: int = 1,
    fast: bool = False,
    name_map: str | Path | None = None,
    map_out: str | Path | None = None,
    progress: Progress | None = None,
    keep: Keep | None = None,
) -> Report:
    """Compare two implementations of one model, tensor by tensor.

    a, b       a LanguageModel, one of our models, a transformers model, any other module that
               takes token ids, a Trace, a side made by hand, or a path: a model folder, a trace
               file (.safetensors, .npz), ``hf:PATH`` to run a folder in transformers; b also the
               URL of a server, or a .jsonl file of tokens with log-probabilities (`served`)
    prompt     text, token ids, or rows of token ids (padded on the left); None takes a short
               English sentence, or the tokens of a recording
    steps      also follow so many decoding steps with the KV cache
    dtype_a, dtype_b, dialect_a, dialect_b  run that side in another dtype or dialect
    fused      B takes its attention in one kernel
    copies     B, one of our models, runs every row so many times in one batch
    fast       B, one of our models, takes the decoding steps in C
    name_map   what the names of a recording or a module mean: transformers, meta, gguf, litgpt,
               transformerlens, vllm, or a YAML file; None finds out
    map_out    a file for the name map that was found out, as YAML
    progress   called with each stage before it runs, such as "forward"
    keep       is given each judged tensor of B: name, R, what was observed

    Two recordings of a training step are compared by `diff_steps`. R, the reference, is A's
    arithmetic at higher precision. ValueError where the two cannot be
    compared or nothing was.
    """
    if are_steps(a, b) or is_served(a) or is_served(b):
        how = (dtype_a, dtype_b, dialect_b, fused, copies > 1, fast, name_map, map_out, keep)
        return _without_tensors(a, b, prompt, steps, dialect_a, any(how), progress)
    a, b = recorded_modules(a, b, as_rows(prompt) or DEFAULT_PROMPT, steps)
    left = Options(dtype=dtype_a, dialect=dialect_a, name_map=name_map)
    run_b = {"fused": fused, "copies": copies, "fast": fast, "name_map": name_map}
    right = Options(dtype=dtype_b, dialect=dialect_b, **run_b)
    if fast and not steps:
        raise ValueError("fast is about decoding: ask for steps of it (steps=8, --steps 8)")
    sides = _both_sides(((a, left), (b, right)), as_rows(prompt))
    recorded = [side.recorded for side in sides if side.recorded is not None]
    if name_map and not recorded:
        raise ValueError("name_map says what a trace file's names mean: neither side is one")
    if prompt is None and not recorded:
        prompt = DEFAULT_PROMPT
    passes = [names.step_of(name) for seen in recorded for name in seen]
    most = max([steps, *passes])
    report = compare(*sides, as_rows(prompt), steps=most, progress=progress, keep=keep)
    return _finished(report, sides, map_out)


def _without_tensors(
    a: Any,
    b: Any,
    prompt: Any,
    steps: int,
    dialect: str | None,
    told: bool,
    progress: Progress | None,
) -> Report:
    """Training steps, or a server's log-probabilities; `told`: options that are for models only."""
    if are_steps(a, b):
        if prompt is not None or steps:
            raise ValueError("a recorded training step has a batch of its own: give no prompt")
        return diff_steps(a, b)
    if told:
        raise ValueError(f"{b} says ln p of tokens: only prompt, steps and dialect_a apply")
    prompt = DEFAULT_PROMPT if prompt is None else prompt
    return diff_served(a, b, prompt, steps=steps, dialect=dialect, progress=progress)


def as_rows(prompt: Prompt | Sequence[Sequence[int]] | None) -> str | list[list[int]] | None:
    """Text as it is; token ids as one row; rows as rows."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    items: list[Any] = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
    if all(isinstance(item, int) for item in items):
        return [items]
    return [[item] if isinstance(item, int) else [int(token) for token in item] for item in items]


def assert_same_model(a: Any, b: Any, prompt: Prompt | None = None, **options: Any) -> None:
    """For tests: AssertionError with the report's first lines where a and b diverge.

    The options are those of `diff`.
    """
    report = diff(a, b, prompt, **options)
    if report.verdict == "diverged":
        raise AssertionError(report.summary())


vars(assert_same_model)["__signature__"] = signature(diff).replace(return_annotation="None")


def as_side(source: Any, label: str, options: Options | None = None) -> Side:
    """A side of a diff from whatever a user has in hand; ValueError for what is none."""
    options = options or Options()
    source = unwrapped(source) if isinstance(source, nn.Module) else source
    if is_recording(source):
        return _from_recording(source, label, options)
    if isinstance(source, str | Path) and not str(source).startswith(LIVE):
        source = load(source, dtype=options.dtype, dialect=options.dialect)
    if isinstance(source, LanguageModel | Decoder):
        return _guarded(_from_own(source, label, options))
    fixed = options
    if isinstance(source, str | Path):
        side = live_folder(str(source), options)
        fixed = replace(options, dtype=None, fused=False)
    elif isinstance(source, Side):
        side = source
    elif isinstance(source, nn.Module) and hasattr(getattr(source, "config", None), "model_type"):
        side = live_side(source, f"{label} (transformers)")
    else:
        raise ValueError(
            f"{label} is a {type(source).__name__}: expected a model, a trace, or a path to one"
        )
    if fixed.dtype or fixed.dialect or fixed.fused or fixed.copies != 1 or fixed.fast:
        raise ValueError(
            f"{side.label} is taken as it is: dtype, dialect, fused, copies and fast are for "
            "Pellucid's own models, dtype and fused also for hf:PATH"
        )
    return _guarded(side)


def is_recording(source: Any) -> bool:
    """Whether a side is a Trace or a trace file, something that cannot be run."""
    path = isinstance(source, str | Path) and str(source).endswith((".safetensors", ".npz"))
    return isinstance(source, Trace) or path


def _from_own(source: LanguageModel | Model, label: str, options: Options) -> Side:
    """One of our own models, maybe in another dtype or dialect; a loaded one can encode text."""
    whole = source if isinstance(source, LanguageModel) else None
    given: Model = source.model if isinstance(source, LanguageModel) else source
    model = _recast(given, as_dtype(options.dtype), options.dialect)
    if options.copies < 1:
        raise ValueError(f"copies is {options.copies}: expected 1 or more")
    words = [
        str(model.dtype).removeprefix("torch.") if options.dtype else "",
        options.dialect or "",
        "fused" if options.fused else "",
        f"{options.copies} copies" if options.copies > 1 else "",
        "fast" if options.fast else "",
    ]
    said = ", ".join(word for word in words if word)
    name = whole.name if whole else f"{label} ({model.config.family})"
    side = from_model(
        model,
        f"{name} ({said})" if said else name,
        encode=whole.encode if whole else None,
        bos_id=whole.tokenizer.bos_id if whole else None,
        specials=whole.tokenizer.specials if whole else None,
        fused=options.fused,
        copies=options.copies,
    )
    side.coarse = is_quantised(model)
    weights = whole.checkpoint.weights if whole and whole.checkpoint else None
    if isinstance(weights, GGUFWeights):
        side.types = {parameter: weights.type(parameter) for parameter in weights}
        side.blocks = weights.blocks
    return replace(side, run=partial(_run_fast, model)) if options.fast else side


def _run_fast(model: Model, rows: Batch, steps: int) -> Trace:
    demand_room(model, len(rows), max(map(len, rows)), steps)
    return trace_fast(model, rows, steps)


def _recast(model: Model, dtype: torch.dtype | None, dialect: str | None) -> Model:
    """The model in another dtype or dialect; what stays the same is shared, not copied."""
    held, spoken = model.dtype, model.dialect.name
    if dtype in (None, held) and dialect in (None, spoken):
        return model
    if is_quantised(model):
        raise ValueError("a quantised model is taken as it is: load it in that dtype and dialect")
    other = empty_model(model.config, dialect or spoken)
    weights = {name: tensor.to(dtype or held) for name, tensor in model.state_dict().items()}
    other.load_state_dict(weights, assign=True)
    return other.train(model.training)


def _from_recording(source: Any, label: str, options: Options) -> Side:
    if options.dtype or options.dialect or options.fused or options.copies != 1 or options.fast:
        raise ValueError(
            f"{label} is a recording: dtype, dialect, fused, copies and fast do not apply"
        )
    if isinstance(source, Trace):
        seen, label = source, f"{label} (trace)"
    elif Path(source).is_file():
        seen, label = load_recording(source), str(source)
    else:
        raise ValueError(f"{label}: there is no file {source}")
    section = section_of(options.config)
    chosen = load_map(options.name_map, section) if options.name_map else None
    weights = None
    if options.config is not None and options.weights is not None and calls_of(seen):
        seen, weights = home(seen, label, chosen, options.config, options.weights)
    else:
        seen = named(without_weights(seen), label, chosen, options.config)
    seen = in_memory_order(seen)
    if options.config is not None:
        check_recording(seen, label, options.config)
    side = replace(from_trace(seen, label), weights=weights)

    def replayed(rows: Batch, steps: int) -> Trace:
        tokens, _ = padded(rows)
        held = seen.get("tokens")
        if held is None or not torch.equal(torch.atleast_2d(held), tokens):
            side.observe(rows, steps)  # says which tokens it holds, if it does
        check_length(seen, label, tokens.shape[1])
        return seen

    return replace(side, run=replayed)


def _guarded(side: Side) -> Side:
    """The side, refusing token ids and lengths that its model has no place for."""
    run, config = side.run, side.config
    if run is None or config is None:
        return side

    def guarded(rows: Batch, steps: int) -> Trace:
        for row in rows:
            try:
                check_tokens(row, config)
            except ValueError as error:
                raise ValueError(f"{side.label}: {error}") from None
        length = max(map(len, rows)) + steps
        if config.rope is None and length > config.context_length:
            raise ValueError(
                f"{side.label} has positions for {config.context_length} tokens, the run has "
                f"{length}: shorten the prompt"
            )
        return run(rows, steps)

    return replace(side, run=guarded)


def _both_sides(
    given: Sequence[tuple[Any, Options]], rows: str | list[list[int]] | None
) -> tuple[Side, Side]:
    """Both sides; a model first, because what it is tells how to read a recording."""
    built: dict[int, Side] = {}
    for place in sorted((0, 1), key=lambda place: is_recording(given[place][0])):
        source, options = given[place]
        other = built.get(1 - place)
        known = (other.config, other.weights) if other else (None, None)
        options = replace(options, config=known[0], weights=known[1])
        try:
            built[place] = as_side(source, "AB"[place], options)
        except UnknownNames as error:
            raise _with_proposal(error, other, rows) from None
    return built[0], built[1]


def _with_proposal(
    error: UnknownNames, other: Side | None, rows: str | list[list[int]] | None
) -> UnknownNames:
    """The error with what its names seem to mean, where the other side can run the same tokens."""
    seen = error.recorded
    if other is None or other.run is None or other.recorded is not None:
        return error
    if isinstance(rows, str):
        rows = [other.encode(rows)] if other.encode else None
    if rows is None:
        advice = "give the prompt it was made of, and a map is proposed"
        return UnknownNames(f"{error} ({advice})", seen)
    proposed = propose_map(seen, other.observe(rows, 0))
    if not proposed:
        return UnknownNames(f"{error}; none of its tensors has the shape of one of ours", seen)
    advice = "proposed by value, order and shape; check it, save it as names.yaml and give"
    return UnknownNames(f"{error}; {advice} name_map='names.yaml'", seen, as_yaml(proposed))


def _finished(report: Report, sides: Sequence[Side], map_out: str | Path | None) -> Report:
    """The report with the notes of both sides; ValueError where nothing was compared."""
    _demand_judged(report)
    if map_out is not None:
        write_map(map_out, [side.recorded for side in sides if side.recorded is not None])
    notes = [report.note, *(note for side in sides for note in _notes(side, report))]
    report.note = "; ".join(note for note in notes if note)
    return report


def _notes(side: Side, report: Report) -> Iterator[str]:
    """What a recording says about itself, and what it holds that no name of ours fits."""
    seen = side.recorded
    if seen is not None and "order_of_names" in seen.meta:
        yield from notes_of(seen, report.first.name if report.first else "", side.label)
    else:
        yield _left_out(side)


def _left_out(side: Side) -> str:
    """What a recording holds under names that nothing is known of."""
    seen = side.recorded if side.recorded is not None else ()
    left = [name for name in seen if not graph.known(name)]
    left += getattr(seen, "meta", {}).get("unmapped", [])
    if not left:
        return ""
    return f"{len(left)} tensors of {side.label} have unknown names, such as {left[0]}"


def _demand_judged(report: Report) -> None:
    """ValueError where nothing was compared, or where both sides stop being numbers."""
    judged = [row for row in report.tensors if row.measure.verdict != "not-judged"]
    broken = [row.name for row in report.tensors if "not finite" in row.measure.note]
    if report.verdict == "diverged":
        return
    if broken:
        raise ValueError(
            f"{report.a} and {report.b} both have NaN or infinity from {broken[0]} on: "
            f"{len(broken)} tensors cannot be compared"
        )
    if not any(leaf(row.name) not in SOURCES for row in judged):
        raise ValueError(f"nothing of {report.a} and {report.b} was compared")
