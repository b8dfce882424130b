"""From one layout to the other, with a proof that nothing was lost.

    source ── mapped, one tensor at a time ──> writer ──> hidden folder ── proof ──> destination

The proof opens what was written like any checkpoint, which undoes the layout: every parameter must
come back bit for bit, the config must be the same, and so must every logit over a probe prompt. The
folder gets its name after that, so a conversion that was interrupted leaves nothing with that name.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pellucid.checkpoints.files import same_bits
from pellucid.checkpoints.formats.gguf_tokenizer import tokenizer_keys
from pellucid.checkpoints.formats.gguf_writing import as_stored, planned, types_of, write_gguf
from pellucid.checkpoints.formats.hf import PICTURES
from pellucid.checkpoints.formats.meta_writing import meta_files, write_params, write_shards
from pellucid.checkpoints.load import Checkpoint, open_checkpoint
from pellucid.checkpoints.proof import (
    AsWritten,
    Progress,
    Reader,
    check_logits,
    check_tensors,
    overall,
    word,
)
from pellucid.checkpoints.save import (
    MAX_SHARD_BYTES,
    config_json,
    hf_files,
    write_weights,
)
from pellucid.checkpoints.tokenizer_files import has_ranks, load_tokenizer, write_tokenizer
from pellucid.checkpoints.writers import size
from pellucid.families.config import DROPOUTS
from pellucid.files import folder_beside, move, read_json, refuse_current
from pellucid.models import Config
from pellucid.tokenizers import Tokenizer

LAYOUTS = ("hf", "meta", "gguf")
_ROOM = 32_000_000  # bytes for headers, config and tokenizer


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What was written, and what proves that it is the same model.

    files      name -> bytes
    tensors    parameters, each carried over once
    left_out   tensors of the source that say nothing new (buffers, a tied head written out)
    digests    parameter name -> SHA-256 of its name, dtype, shape and values in Pellucid's order,
               the same from source and destination
    digest     of all of them, whatever order they are stored in
    tokens     length of the probe prompt over which every logit is the same, bit for bit
    notes      what the layout cannot say, and what else to know
    """

    source: str
    destination: str
    layout: str
    dtype: str
    files: dict[str, int]
    tensors: int
    left_out: tuple[str, ...]
    digests: dict[str, str]
    digest: str
    tokens: int
    tokenizer: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


@dataclass(frozen=True, kw_only=True)
class _Target:
    """A layout, ready to be written: its size is known and its config could be stated."""

    bytes: int
    config: dict[str, Any]
    config_name: str
    weights: Callable[[Path, Callable[[str], Tensor]], None]

    def write(self, folder: Path, read: Callable[[str], Tensor]) -> None:
        """The weights, then the config: without it no folder looks whole."""
        self.weights(folder, read)
        stated = json.dumps(self.config, indent=2) + "\n"
        (folder / self.config_name).write_text(stated, encoding="utf-8")


def convert(
    source: str | Path,
    destination: str | Path,
    layout: str,
    *,
    dtype: torch.dtype | Literal["q8_0"] | None = None,
    shards: int | None = None,
    max_shard_bytes: int | None = None,
    context_length: int | None = None,
    progress: Progress | None = None,
) -> Conversion:
    """Write the model of `source` into the new folder `destination` in a layout, and prove it.

    layout           "hf", "meta" or "gguf" (a file); the source's own too, to split it otherwise
    dtype            None: as each tensor is stored; "q8_0", in a GGUF file only: eight bits, and
                     the proof is of the rounded values
    shards           number of weight files; None: one for Meta's layout, for Hugging Face's as
                     many as `max_shard_bytes` asks for
    context_length   what config.json states; for a source in Meta's layout, which does not state it

    No more than one tensor is in memory at a time, with a copy in its new order; for the logits,
    the embedding, the head and one block.

    Raises ValueError where the layout cannot state the model or the proof fails, OSError where the
    destination exists already or the disk has no room.
    """
    folder = Path(destination).expanduser().resolve()
    _check_request(layout, folder, dtype, split=shards is not None or max_shard_bytes is not None)
    opened = _opened(source, layout, context_length)
    if layout == "gguf":
        return _to_gguf(opened, folder, destination, dtype, progress)
    assert dtype != "q8_0", "refused above"
    dtypes = {name: dtype or opened.weights.dtype(name) for name in opened.weights}
    tokenizer = load_tokenizer(opened.folder)
    target = _target(opened, layout, dtypes, tokenizer, shards, max_shard_bytes)
    _check_room(folder, target.bytes)
    reader = Reader(opened.weights, dtypes, "writing", progress)
    with folder_beside(folder) as beside:
        target.write(beside, reader)
        reader.finish()
        tokenizer_files = write_tokenizer(tokenizer, opened.folder, beside, layout)
        written = replace(open_checkpoint(beside), source=str(destination))
        _check_config(opened, written)
        notes = [*tokenizer_files.notes, *_remarks(opened, written, tokenizer)]
        notes += _guessed(opened, layout) if context_length is None else []
        check_tensors(reader.digests, written.weights, progress)
        tokens = check_logits(opened, written, progress)
        files = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
        move(beside, folder)
    proven = {"files": files, "tokens": tokens, "tokenizer": tokenizer_files.files}
    return _conversion(opened, written, layout, reader, notes=tuple(notes), **proven)


def _to_gguf(
    opened: Checkpoint,
    path: Path,
    destination: str | Path,
    dtype: torch.dtype | Literal["q8_0"] | None,
    progress: Progress | None,
) -> Conversion:
    """Write a GGUF file and prove it, as `convert` says."""
    config, weights = opened.config, opened.weights
    wanted = torch.float32 if dtype == "q8_0" else dtype
    kept = {name: wanted or weights.dtype(name) for name in weights}
    types = "Q8_0" if dtype == "q8_0" else dict(types_of(config, kept))
    change = as_stored(config, types)
    tokenizer = load_tokenizer(opened.folder)
    keys = tokenizer_keys(tokenizer, opened.folder, config.vocab_size)
    tensors = planned(config, types)
    _check_room(path, sum(each.nbytes for each in tensors))
    reader = Reader(weights, kept, "writing", progress, change)
    with folder_beside(path) as beside:
        write_gguf(beside / path.name, config, reader, types, keys)
        reader.finish()
        written = replace(open_checkpoint(beside / path.name), source=str(destination))
        dropouts = {name: getattr(config, name) for name in DROPOUTS}
        _check_config(opened, replace(written, config=replace(written.config, **dropouts)))
        check_tensors(reader.digests, written.weights, progress)
        tokens = check_logits(
            replace(opened, weights=AsWritten(weights, change)), written, progress
        )
        size = (beside / path.name).stat().st_size
        (beside / path.name).replace(path)
    notes = [] if tokenizer else [f"no tokenizer: {opened.source} has none"]
    notes += _remarks(opened, written, tokenizer)
    proven = {"files": {path.name: size}, "tokens": tokens, "notes": tuple(notes)}
    said = ("in its keys",) if tokenizer else ()
    done = _conversion(opened, written, "gguf", reader, tokenizer=said, **proven)
    return replace(done, dtype="q8_0") if dtype == "q8_0" else done


def _conversion(
    opened: Checkpoint, written: Checkpoint, layout: str, reader: Reader, **proven: Any
) -> Conversion:
    return Conversion(
        source=opened.source,
        destination=written.source,
        layout=layout,
        dtype=word(written.dtype),
        tensors=len(reader.digests),
        left_out=opened.weights.left_out,
        digests=reader.digests,
        digest=overall(reader.digests),
        **proven,
    )


def _check_request(layout: str, folder: Path, dtype: Any, *, split: bool) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    refuse_current(folder)
    if dtype == "q8_0" and layout != "gguf":
        raise ValueError("q8_0 is a type of GGUF files: convert to gguf")
    if layout == "gguf":
        if split:
            raise ValueError("a GGUF file is one file: leave out shards and their size")
        if folder.suffix != ".gguf":
            raise ValueError(f"{folder}: expected the name of a file that ends in .gguf")
        if folder.exists():
            raise FileExistsError(f"{folder}: there already; give a new name")
        return
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: a file stands where the model's folder would go")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; convert into a new folder")


def _check_room(folder: Path, needed: int) -> None:
    place = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if needed + _ROOM > free:
        raise OSError(
            f"{folder}: the model takes {needed / 1e9:,.2f} GB and {place} has {free / 1e9:,.2f} "
            "GB free; make room or convert onto another disk"
        )


def _opened(source: str | Path, layout: str, context_length: int | None) -> Checkpoint:
    """The source, with the context length that Meta's layout does not state."""
    opened = open_checkpoint(source)
    opened.weights.check_redundant()
    if layout == "meta":
        opened = _tied_if_equal(opened)
    if context_length is None:
        return opened
    if opened.layout != "meta" or layout != "hf":
        raise ValueError(
            f"context length {context_length}: given where only Meta's layout leaves it open, on "
            f"the way to Hugging Face's; {opened.source} states {opened.config.context_length}"
        )
    return replace(opened, config=replace(opened.config, context_length=context_length))


def _tied_if_equal(opened: Checkpoint) -> Checkpoint:
    """A model whose head has the embedding's values as a tied one, which computes the same.

    Meta's layout cannot say that two equal matrices are two.
    """
    weights, config = opened.weights, opened.config
    if config.tied or not {"embed.weight", "unembed.weight"} <= weights.keys():
        return opened
    same = same_bits(weights["embed.weight"], weights["unembed.weight"])
    weights.forget("embed.weight")
    weights.forget("unembed.weight")
    if not same:
        return opened
    tied = replace(config, tied=True)
    return replace(opened, config=tied, weights=weights.without("unembed.weight"))


def _target(
    opened: Checkpoint,
    layout: str,
    dtypes: Mapping[str, torch.dtype],
    tokenizer: Tokenizer | None,
    shards: int | None,
    max_shard_bytes: int | None,
) -> _Target:
    config = opened.config
    if layout == "hf":
        files = hf_files(config, dtypes, max_shard_bytes or MAX_SHARD_BYTES, shards)
        return _Target(
            bytes=sum(size(stored) for file in files for stored in file.stored.values()),
            config=config_json(config, dtypes["embed.weight"], tokenizer),
            config_name="config.json",
            weights=lambda folder, read: write_weights(folder, files, read),
        )
    if max_shard_bytes is not None:
        raise ValueError("Meta's layout is split by a number of shards, not by their size")
    newer = _for_newer_loader(config, has_ranks(tokenizer, opened.folder))
    params = write_params(config, newer)
    split = meta_files(config, dtypes, 1 if shards is None else shards, newer)
    return _Target(
        bytes=split.shards * sum(map(size, split.parts.values())),
        config=params,
        config_name="params.json",
        weights=lambda folder, read: write_shards(folder, split, read),
    )


def _for_newer_loader(config: Config, ranks: bool | None) -> bool:
    """Whether Meta's loader of Llama 3 is to read it, or that of Llama 1 and 2.

    ranks  whether the tokenizer is of ranks, which the newer loader reads, or of pieces; None:
           neither, and RoPE's base tells them apart
    """
    if config.rope is None or config.rope.type != "default":
        return True
    return config.rope.theta != 10000.0 if ranks is None else ranks


def _check_config(opened: Checkpoint, written: Checkpoint) -> None:
    """ValueError where the config came out as another one, the context length left aside."""
    again = replace(written.config, context_length=opened.config.context_length)
    apart = [
        f"{name} {value} as {getattr(again, name, None)}"
        for name, value in vars(opened.config).items()
        if value != getattr(again, name, None)
    ]
    if apart:
        raise ValueError(f"{opened.source}: config would come out otherwise: {', '.join(apart)}")


def _remarks(opened: Checkpoint, written: Checkpoint, tokenizer: Tokenizer | None) -> list[str]:
    """What the layout leaves open, and what else matters to a user of the result."""
    notes = []
    pairs = Counter((opened.weights.dtype(n), written.weights.dtype(n)) for n in opened.weights)
    others = {pair: count for pair, count in pairs.items() if pair[0] != pair[1]}
    if others:
        most = (opened.dtype, written.dtype)
        before, after = most if most in others else max(others, key=others.__getitem__)
        some = "" if most in others else f" in {others[before, after]} tensors"
        notes.append(
            f"{word(before)} became {word(after)}{some}: digests and logits are those of "
            "the values after that, on both sides"
        )
    pictures = sum(PICTURES.match(name) is not None for name in opened.weights.left_out)
    if pictures:
        notes.append(f"{pictures} tensors of pictures are left out: this is the text part alone")
    config = written.config
    if written.layout != "meta":
        return notes
    if config.context_length != opened.config.context_length:
        notes.append(
            f"params.json does not state the context length, {opened.config.context_length:,}; who "
            f"opens the folder without knowing it takes {config.context_length:,}"
        )
    if config.rope is not None and config.rope.factor == 32:
        notes.append(
            "params.json does not state the factor by which RoPE is scaled: it is 32 for this "
            "width, while Meta's published code takes 8 for every model"
        )
    if tokenizer is not None and tokenizer.vocab_size != config.vocab_size:
        notes.append(
            f"the model has {config.vocab_size:,} words and the tokenizer "
            f"{tokenizer.vocab_size:,}: Meta's own loader wants the same number"
        )
    return notes


def _guessed(opened: Checkpoint, layout: str) -> list[str]:
    """A note where config.json had to state what params.json leaves open."""
    if opened.layout != "meta" or layout == "meta":
        return []
    if "max_seq_len" in read_json(opened.folder / "params.json"):
        return []
    return [
        f"the context length in config.json, {opened.config.context_length:,}, is that of the "
        "release that params.json looks like: it does not state its own"
    ]
